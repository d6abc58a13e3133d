"""to_peft: what no stock base and adapter hold is refused in words, and a failure leaves what was there."""

import json
import re
import sys

import pytest
import torch
from families import FAMILIES, adapted, keep_first, mask_all, outputs, some
from peft_checks import WARNINGS, check, loaded

from apt_ext import APTConfig, Controller, adapters, get_apt_model, to_peft
from apt_ext.exporting import peft_directories
from apt_ext.storage import atomic_dir

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.usefixtures("loaded_here"), WARNINGS]


def refused(name):
    family = FAMILIES[name.split(" ")[0]]
    apt = adapted(family)
    what = name.split(" ", 1)[1]
    if what == "fractions":
        return (
            mask_all(apt, some(family, apt.blocks, ("neurons",), "soft")),
            ValueError,
            "since PEFT has no masks, got fractions in block '0.neurons'; set them",
        )
    if what == "fractions by hand":
        dict(adapters(apt))["bert.pooler.dense"].set_masks(mask_out=torch.full((24,), 0.5))
        return apt, ValueError, "got fractions in mask_out of bert.pooler.dense"
    if what == "widths":
        masks = some(family, apt.blocks, ("neurons",), "hard")
        masks["0.neurons"][:] = 1
        return (
            mask_all(apt, masks),
            ValueError,
            r"one width for all layers.*intermediate_size.*uniform=True.*export\(model, path, per_layer=True\)",
        )
    if what == "heads":
        return keep_first(apt, heads=2), ValueError, "BertConfig makes heads of .*would pass.*uniform=True"
    if what == "part of a head":
        value = dict(adapters(apt))["bert.encoder.layer.0.attention.self.value"]
        value.set_masks(mask_out=(torch.arange(24) > 2).float())
        return apt, ValueError, "attention.self.value: expected masks that set_block_mask has set.* within one of block '0.heads'"
    if what == "no ranks":
        apt = get_apt_model(family.model(), APTConfig(r=2, target_modules=["output.dense"], exclude_modules=["attention.output.dense"]))
        masks = {name: torch.zeros(block.count) for name, block in apt.blocks.items() if block.kind == "neurons"}
        return mask_all(apt, masks), ValueError, "expected an adapter with a rank on what is kept, got none"
    if what == "tied by hand":
        keep_first(apt, hidden=16)
        apt.model.lm_head.set_masks(mask_out=(torch.arange(50) > 2).float())
        return apt, ValueError, "lm_head: expected .*got zeros over a weight that is tied: .*embed_tokens.weight = lm_head.weight"
    if what == "norm by hand":
        keep_first(apt, hidden=16)
        apt.model.model.norm.set_masks((torch.arange(24) < 15).float())
        return apt, ValueError, "model.norm: expected .*got zeros there that no block has"
    if what == "meta":
        return apt.to("meta"), RuntimeError, "to_peft: expected a model whose values are all here, got .* on meta"
    if what == "stock":
        return apt.model, TypeError, "model: expected an APTModel, got BertForSequenceClassification"
    raise AssertionError(what)


REFUSED = ("fractions", "fractions by hand", "widths", "heads", "part of a head", "meta", "stock", "no ranks")


@pytest.mark.parametrize("name", [*(f"bert {what}" for what in REFUSED), "llama-tied tied by hand", "llama-tied norm by hand"])
def test_what_no_stock_base_and_adapter_hold_is_refused_in_words(name, tmp_path):
    apt, kind, words = refused(name)
    with pytest.raises(kind, match=words):
        to_peft(apt, tmp_path / "deep" / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_model_is_refused_unless_it_is_asked_for(tmp_path):
    apt = adapted(FAMILIES["llama"])
    optimizer = torch.optim.AdamW(p for p in apt.parameters() if p.requires_grad)
    controller = Controller(apt, optimizer, total_steps=20, density=0.8, prune=["neurons"], schedule={"start": 10, "end": 18})
    inputs = FAMILIES["llama"].inputs()
    for _ in range(3):
        apt(**inputs, labels=inputs["input_ids"]).loss.backward()
        controller.observe()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="to_peft: the model is not finished: its masks keep .*density of 0.8"):
        to_peft(apt, tmp_path / "out")
    with pytest.raises(TypeError, match="unfinished must be a bool"):
        to_peft(apt, tmp_path / "out", unfinished=1)
    assert list(tmp_path.iterdir()) == []
    to_peft(apt, tmp_path / "out", unfinished=True)
    torch.testing.assert_close(outputs(loaded(tmp_path / "out", FAMILIES["llama"]), inputs)[0], outputs(apt.eval(), inputs)[0])


def content(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_an_unchanged_earlier_result_is_replaced_and_nothing_else(tmp_path):
    family, target = FAMILIES["llama"], tmp_path / "out"
    target.mkdir()  # empty is good
    check(keep_first(adapted(family), neurons=8), target, family)
    check(adapted(family), target, family)
    assert {child.name for child in target.iterdir()} == {"adapter"}  # no base of before
    check(keep_first(adapted(family), neurons=8), target, family)
    apt, before = adapted(family), content(target)

    def refused_now():
        there = content(target)
        with pytest.raises(ValueError, match="path: expected a missing or empty directory, or an unchanged earlier result of to_peft"):
            to_peft(apt, target)
        assert content(target) == there

    for name in ("notes.txt", "adapter/notes.txt", "base/notes.txt"):
        (target / name).write_text("mine")
        refused_now()
        (target / name).unlink()
    for name in ("adapter/adapter_model.safetensors", "base/config.json", "adapter/apt_export.json"):
        (target / name).write_bytes(before[name] + b" ")
        if name != "adapter/apt_export.json":
            refused_now()
        (target / name).write_bytes(before[name])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="path: expected a directory"):
        to_peft(apt, tmp_path / "file")
    assert {child.name for child in tmp_path.iterdir()} == {"out", "file"}


@pytest.mark.parametrize("fails", ["save the base", "load the base", "save the adapter", "load the adapter", "place"])
def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch, fails):
    family, target = FAMILIES["llama"], tmp_path / "out"
    to_peft(adapted(family), target)
    before = content(target)

    def broken(*_, **__):
        raise OSError(28, "No space left on device")

    where = {
        "save the base": (transformers.PreTrainedModel, "save_pretrained"),
        "load the base": (transformers.PreTrainedModel, "from_pretrained"),
        "save the adapter": (peft.LoraConfig, "save_pretrained"),
        "load the adapter": (peft.PeftModel, "from_pretrained"),
        "place": (atomic_dir, "place"),
    }
    monkeypatch.setattr(*where[fails], broken)
    with pytest.raises(OSError, match="No space"):
        to_peft(keep_first(adapted(family), neurons=8), target)
    assert content(target) == before and [child.name for child in tmp_path.iterdir()] == ["out"]


def changed(tensors, config):
    """Ways for a written adapter to be another one than it should be, with what is said."""

    def values():
        name = next(name for name in tensors if name.endswith("down_proj.lora_B.weight"))
        tensors[name] = tensors[name] + 1
        return "the values of model.layers.0.mlp.down_proj.lora_B differ"

    def scaling():
        config["lora_alpha"] = 3
        return "the scaling of model.layers.0.self_attn.q_proj is 1.5 instead of 8"

    def missing():
        del config["modules_to_save"]
        return "PEFT to load the (same )?adapter again, but"

    def head():
        tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.lm_head.weight"] * 2
        return "the values of lm_head.weight differ"

    def absent():
        del tensors["base_model.model.lm_head.weight"]
        return "PEFT to load the adapter again, but it does not: KeyError"

    return {"values": values, "scaling": scaling, "missing": missing, "head": head, "absent": absent}


@pytest.mark.parametrize("what", ["values", "scaling", "missing", "head", "absent"])
def test_what_does_not_come_back_is_refused(what, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    real = peft_directories._save

    def save(parts, config, directory, card):
        real(parts, config, directory, card)
        tensors, values = load_file(directory / "adapter_model.safetensors"), json.loads((directory / "adapter_config.json").read_text())
        words.append(changed(tensors, values)[what]())
        save_file(tensors, directory / "adapter_model.safetensors")
        (directory / "adapter_config.json").write_text(json.dumps(values))

    apt = adapted(FAMILIES["llama"], APTConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]))
    words = []
    monkeypatch.setattr(peft_directories, "_save", save)
    with pytest.raises(ValueError) as raised:
        to_peft(apt, tmp_path / "out")
    assert re.search(words[0], str(raised.value)) and list(tmp_path.iterdir()) == []


def test_a_mask_by_hand_that_contradicts_its_block_is_found_by_an_output(tmp_path):
    apt = keep_first(adapted(FAMILIES["gemma"]), hidden=16)
    apt.model.model.embed_tokens.set_masks((torch.arange(24) < 15).float())  # which the others add to
    with pytest.raises(ValueError, match="compute the same, but an output differs by .*set by hand"):
        to_peft(apt, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_within_disable_adapter_it_is_refused(tmp_path):
    apt = adapted(FAMILIES["llama"])
    with apt.disable_adapter(), pytest.raises(RuntimeError, match="call it outside of disable_adapter"):
        to_peft(apt, tmp_path / "out")


def test_without_peft_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    apt = adapted(FAMILIES["llama"])
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="to_peft needs peft; run: python -m pip install peft"):
        to_peft(apt, tmp_path / "out")
