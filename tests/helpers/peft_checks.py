"""What stock PEFT and transformers make of the directories that to_peft writes."""

import json

import pytest
import torch
from families import outputs

from apt_ext import to_peft

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
WARNINGS = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning", "ignore:.*tie_word_embeddings:UserWarning", "ignore:.*tied:UserWarning"
)


def loaded(path, family, kind=None, dtype=torch.float64):
    """A PeftModel of `path`, over the base there or one that was made as before."""
    base = family.model(dtype)
    if (path / "base").exists():
        base = getattr(transformers, kind or family.kind).from_pretrained(path / "base", dtype="auto")
    return peft.PeftModel.from_pretrained(base, path / "adapter").eval()


def check(apt, path, family, kind=None, within=1e-6):
    """The same logits from disk, and the APTModel is untouched; returns the PeftModel."""
    before = {name: value.clone() for name, value in apt.state_dict().items()}
    expected = outputs(apt, family.inputs())[0]
    generator = torch.get_rng_state()
    assert to_peft(apt, path) == str(path)
    assert torch.equal(torch.get_rng_state(), generator)
    model = loaded(path, family, kind)
    torch.testing.assert_close(outputs(model, family.inputs())[0], expected, rtol=within, atol=within)
    after = apt.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    return model


def config_in(path):
    return json.loads((path / "adapter" / "adapter_config.json").read_text())
