"""export: stock transformers loads the directory, or a refusal says why."""

import copy
import json
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from tiny_bert import MASKS, batch, first, half, masked, tiny_bert, trained

from apt_ext.config import APTConfig
from apt_ext.exporting import directories as export_module
from apt_ext.exporting.directories import export
from apt_ext.exporting.shrinking import shrink
from apt_ext.model import APTModel
from apt_ext.storage import atomic_dir

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("loaded_here")


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("masks", [{}, MASKS["half"], {"0.neurons": half() * 0.37, "1.neurons": half()}, MASKS["empty"]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_auto_class_loads_the_same_function(tmp_path, masks, dtype):
    apt = masked(masks, dtype)
    export(apt, tmp_path / "small")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element")  # torch, for layers without neurons
        loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "small", dtype="auto")
    small = shrink(apt)
    assert type(loaded) is type(small) and loaded.config.intermediate_size == small.config.intermediate_size
    # a copy: loaded tensors lie at addresses for which the BLAS may add in another order
    assert torch.equal(copy.deepcopy(loaded)(**batch()).logits, small(**batch()).logits)
    assert [file.name for file in tmp_path.iterdir()] == ["small"]


def test_a_fresh_process_needs_no_apt_ext(tmp_path):
    apt = masked(MASKS["half"])
    export(apt, tmp_path / "small")
    torch.save((batch()["input_ids"], shrink(apt)(batch()["input_ids"]).logits), tmp_path / "expected.pt")
    script = """
        import copy, sys, torch
        sys.modules["apt_ext"] = None  # an import of it would fail
        from transformers import AutoModelForSequenceClassification
        tokens, expected = torch.load("expected.pt")
        model = AutoModelForSequenceClassification.from_pretrained("small", dtype="auto")
        assert torch.equal(copy.deepcopy(model)(tokens).logits, expected)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, check=True, timeout=120)


def test_an_export_is_no_checkpoint_and_says_what_loads_it(tmp_path):
    export(masked(MASKS["half"]), tmp_path / "small")
    with pytest.raises(ValueError, match=r"apt_manifest.json: .*holds a whole model, .* or with apt_ext.load_export where"):
        APTModel.from_pretrained(tiny_bert(), tmp_path / "small")


def test_shrinks_result_is_exported_as_it_is(tmp_path):
    small = shrink(masked(MASKS["half"]))
    export(small, tmp_path / "small")
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "small", dtype="auto")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in small.state_dict().items())


def test_different_widths_are_refused_with_the_constraint(tmp_path):
    apt = masked(MASKS["different widths"])
    for model in (apt, shrink(apt)):
        with pytest.raises(ValueError, match="intermediate_size of BertConfig can say .*0.neurons: 17, 1.neurons: 40"):
            export(model, tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_an_unchanged_earlier_export_is_replaced_and_nothing_else(tmp_path):
    target = tmp_path / "small"
    target.mkdir()  # empty is good
    export(masked(MASKS["half"]), target)
    export(masked({name: first(8) for name in ("0.neurons", "1.neurons")}), target)
    assert json.loads((target / "config.json").read_text())["intermediate_size"] == 8
    assert [file.name for file in tmp_path.iterdir()] == ["small"]
    whole = content(target)

    def refused():
        before = content(target)
        with pytest.raises(ValueError, match="path: expected a missing or empty directory, or an unchanged earlier export"):
            export(masked(MASKS["half"]), target)
        assert content(target) == before

    (target / "notes.txt").write_text("mine")
    refused()
    (target / "notes.txt").unlink()
    (target / "model.safetensors").write_bytes(whole["model.safetensors"] + b"tuned")
    refused()
    (target / "model.safetensors").write_bytes(whole["model.safetensors"])
    (target / export_module.MANIFEST).unlink()
    refused()
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="path: expected a directory"):
        export(masked(MASKS["half"]), file)


@pytest.mark.parametrize("fails", ["save", "compare", "seal", "place", "sync"])
def test_a_failure_leaves_the_old_export(tmp_path, monkeypatch, fails):
    target = tmp_path / "small"
    export(masked(MASKS["half"]), target)
    before = content(target)

    def broken(*_, **__):
        raise OSError(28, "No space left on device")

    if fails == "save":
        monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", broken)
    elif fails == "compare":
        monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", broken)
    else:
        real = getattr(atomic_dir, fails)

        def last_fails(*args):
            return broken() if args[0] == tmp_path or fails != "sync" else real(*args)

        monkeypatch.setattr(atomic_dir, fails, last_fails)
    with pytest.raises(OSError, match="No space"):
        export(masked(MASKS["none"]), target)
    assert content(target) == before and [file.name for file in tmp_path.iterdir()] == ["small"]


def test_what_does_not_come_back_is_refused(tmp_path):
    mixed = shrink(masked({}))
    mixed.classifier.float()
    with pytest.raises(ValueError, match="to load the same values again, but classifier.weight comes back as torch.float64"):
        export(mixed, tmp_path / "small")
    buffer = shrink(masked({}))
    buffer.bert.embeddings.position_ids.add_(1)
    with pytest.raises(ValueError, match="values of bert.embeddings.position_ids differ"):
        export(buffer, tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_other_models_are_refused(tmp_path):
    class Mine(transformers.BertForSequenceClassification):
        pass

    small = shrink(masked({}))
    small.__class__ = Mine
    with pytest.raises(ValueError, match="expected a class of transformers, .*Mine"):
        export(small, tmp_path / "small")
    with pytest.raises(TypeError, match="with adapters in it"):
        export(masked({}).model, tmp_path / "small")
    with pytest.raises(TypeError, match="expected a model of transformers inside, got Linear"):
        export(torch.nn.Linear(2, 2), tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_without_transformers_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    apt = trained(tiny_bert(), APTConfig(r=2))
    apt.set_block_mask("0.neurons", half())
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'export needs transformers; run: python -m pip install "apt_ext\[hf\]"'):
        export(apt, tmp_path / "small")
