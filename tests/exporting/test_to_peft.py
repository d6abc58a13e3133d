"""to_peft: stock PEFT and transformers load the two directories and compute the same, or a refusal says why."""

import json
import sys
import warnings

import pytest
import torch
from families import FAMILIES, adapted, keep_first, mask_all, outputs, some

from apt_ext import APTConfig, APTModel, Controller, adapters, get_apt_model, to_peft
from apt_ext.exporting import directories, peft_directories
from apt_ext.storage import atomic_dir

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.usefixtures("loaded_here"),
    pytest.mark.filterwarnings(
        "ignore:.*is_gradient_checkpointing:FutureWarning", "ignore:.*tie_word_embeddings:UserWarning", "ignore:.*tied:UserWarning"
    ),
]

EVERY_KIND = ("bert", "roberta", "distilbert", "llama", "llama-tied", "qwen3", "gemma", "gpt2", "t5", "t5-gated")


def loaded(path, family, kind=None):
    """What stock PEFT makes of `path`, over the base there or one that was made as before."""
    base = family.model()
    if (path / "base").exists():
        base = getattr(transformers, kind or family.kind).from_pretrained(path / "base", dtype="auto")
    return peft.PeftModel.from_pretrained(base, path / "adapter").eval()


def check(apt, path, family, kind=None, within=1e-6):
    """The same logits from disk; the APTModel is untouched."""
    before = {name: value.clone() for name, value in apt.state_dict().items()}
    expected = outputs(apt, family.inputs())[0]
    assert to_peft(apt, path) is None
    model = loaded(path, family, kind)
    torch.testing.assert_close(outputs(model, family.inputs())[0], expected, rtol=within, atol=within)
    after = apt.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    return model


def config_in(path):
    return json.loads((path / "adapter" / "adapter_config.json").read_text())


@pytest.mark.parametrize("name", EVERY_KIND)
def test_an_adapter_alone_goes_onto_the_base_that_it_was_trained_on(name, tmp_path):
    family = FAMILIES[name]
    check(adapted(family), tmp_path / "out", family)
    assert [child.name for child in tmp_path.iterdir()] == ["out"]
    assert {child.name for child in (tmp_path / "out").iterdir()} == {"adapter"}
    assert {child.name for child in (tmp_path / "out" / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "apt_export.json",
    }  # fmt: skip


@pytest.mark.parametrize("name", EVERY_KIND)
def test_a_cut_base_goes_with_it(name, tmp_path):
    family = FAMILIES[name]
    apt = keep_first(adapted(family), neurons=8)
    model = check(apt, tmp_path / "out", family)
    assert {child.name for child in (tmp_path / "out").iterdir()} == {"adapter", "base"}
    assert config_in(tmp_path / "out")["base_model_name_or_path"] == str(tmp_path / "out" / "base")
    assert model.get_base_model().num_parameters() < adapted(family).model.num_parameters()
