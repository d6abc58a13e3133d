"""save_pretrained and from_pretrained: what was trained comes back, and a file that is not what was written is refused by name."""

import json
import shutil
import struct

import pytest
import torch
from tiny_bert import DOWN, QUERY, assert_same, batch, half, snapshot, tiny_bert, trained

from apt_ext.config import APTConfig
from apt_ext.model import APTModel, adapters, get_apt_model
from apt_ext.storage import atomic_dir
from apt_ext.storage.checkpoint import MANIFEST_FILE
from apt_ext.wrapping import cut_states

FILES = ["apt_config.json", "apt_manifest.json", "apt_model.safetensors"]


def everything(path, **fields):
    """Save an APTModel in which all that can be saved has been changed."""
    config = APTConfig(r=2, target_modules=["query", "value"], **fields)
    apt = trained(tiny_bert(), config)
    found = dict(adapters(apt))
    found[QUERY].increase_rank(5)
    with torch.no_grad():
        found[QUERY].lora_B[:, :5].add_(0.1)
        apt.classifier.weight.mul_(2.0)
    apt.set_block_mask("1.neurons", half() * 0.25)
    found[QUERY].merge_weights()
    apt.save_pretrained(path)
    return apt


@pytest.mark.parametrize(
    "fields",
    [{}, {"max_rank": 8}, {"modules_to_save": ["classifier", "layer.1.output.dense"]}, {"modules_to_save": ["layer.1.intermediate"]}],
    ids=str,
)
def test_what_was_saved_comes_back(tmp_path, fields):
    apt = everything(tmp_path / "saved", **fields)
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == FILES
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]  # nothing temporary stays
    other = APTModel.from_pretrained(tiny_bert(), tmp_path / "saved")
    if not fields.get("modules_to_save") or "classifier" in fields["modules_to_save"]:
        assert torch.equal(other(**batch()).logits, apt(**batch()).logits)
    ours, theirs = apt.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    head_differs = {"model.classifier.weight"} if "classifier" not in apt.saved else set()
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == head_differs
    assert [(a.rank, a.merged) for _, a in adapters(other)] == [(a.rank, a.merged) for _, a in adapters(apt)]
    assert other.apt_config == apt.apt_config
    trains = {name for name, p in apt.named_parameters() if p.requires_grad}
    assert {name for name, p in other.named_parameters() if p.requires_grad} == trains


def test_a_frozen_weight_is_not_in_the_file(tmp_path):
    from safetensors import safe_open

    everything(tmp_path)
    with safe_open(tmp_path / "apt_model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert "classifier.weight" in keys and f"{QUERY}.lora_A" in keys and f"{DOWN}.mask_in" in keys
    assert not any("base_layer" in key or "embeddings" in key for key in keys)


def reseal(directory):
    """A manifest that fits what is there now, as somebody who means harm would write it."""
    (directory / MANIFEST_FILE).unlink()
    atomic_dir.seal(directory, MANIFEST_FILE)


def rewritten(change):
    """A damage: `change(header) -> header` of the safetensors file, data as it was."""

    def damage(directory):
        file = directory / "apt_model.safetensors"
        content = file.read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        header = change(content[8 : 8 + length].decode())
        file.write_bytes(struct.pack("<Q", len(header)) + header.encode() + content[8 + length :])

    return damage


def edited(**changes):
    def change(header):
        values = json.loads(header)
        for name, update in changes.items():
            key = next(key for key in values if key.endswith(name))
            values[key] = {**values[key], **update}
        return json.dumps(values)

    return rewritten(change)


def tensors_with(name, value):
    def damage(directory):
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file

        file = directory / "apt_model.safetensors"
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        save_file({**load_file(file), name: value}, file, metadata)

    return damage


def config_with(text):
    return lambda directory: (directory / "apt_config.json").write_text(text)


def truncated(directory):
    file = directory / "apt_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "file", "words"),
    [
        (config_with("{"), "apt_config.json", "Expecting"),
        (config_with("[]"), "apt_config.json", "expected a JSON object"),
        (config_with("[" * 100_000), "apt_config.json", "recursion"),
        (config_with('{"format": 2}'), "apt_config.json", 'expected "format": 1'),
        (config_with('{"format": 1, "r": 8, "r": 4}'), "apt_config.json", "each key once"),
        (config_with('{"format": 1, "rr": 8}'), "apt_config.json", "nearest: r"),
        (config_with('{"format": 1, "r": "8"}'), "apt_config.json", "r: expected an int"),
        (config_with(" " * 2_000_000), "apt_config.json", "at most 1048576 bytes"),
        (truncated, "apt_model.safetensors", "."),
        (lambda directory: (directory / "apt_model.safetensors").write_bytes(b""), "apt_model.safetensors", "header"),
        (lambda d: (d / "apt_model.safetensors").write_bytes(b"\xff" * 64), "apt_model.safetensors", "header"),
        (rewritten(lambda header: "{"), "apt_model.safetensors", "."),
        (rewritten(lambda header: '{"a": 1, ' + header[1:]), "apt_model.safetensors", "expected a safetensors file, got another"),
        (tensors_with("a", torch.zeros(0)), "apt_model.safetensors", "1 unknown .*'a'"),
        (rewritten(lambda header: header.replace(f"{DOWN}.mask_in", "x")), "apt_model.safetensors", "1 missing .*1 unknown"),
        (
            rewritten(lambda header: '{"classifier.bias": {}, ' + header[1:]),
            "apt_model.safetensors",
            "expected a safetensors file, got another",
        ),
        (edited(**{"mask_in": {"shape": [31]}}), "apt_model.safetensors", "invalid shape, data type, or offset"),
        (tensors_with(f"{DOWN}.mask_in", torch.ones(47)), "apt_model.safetensors", r"mask_in: expected shape \[48\], got \[47\]"),
        (edited(**{"lora_A": {"shape": [10**9, 32]}}), "apt_model.safetensors", "invalid shape, data type, or offset"),
        (tensors_with(f"{QUERY}.lora_A", torch.ones(33, 32)), "apt_model.safetensors", r"lora_A: expected shape \['rank', 32\], got"),
        (edited(**{"lora_A": {"shape": [-1, 32]}}), "apt_model.safetensors", "integer `-1`"),
        (edited(**{"classifier.bias": {"dtype": "I64"}}), "apt_model.safetensors", "dtype|."),
        (tensors_with(f"{DOWN}.mask_in", torch.full((48,), float("nan"))), "apt_model.safetensors", "mask_in must hold values"),
        (tensors_with(f"{DOWN}.rank", torch.tensor(1)), "apt_model.safetensors", "rank must lie between 0 and"),
        (tensors_with("classifier.weight", torch.ones(3, 32, dtype=torch.int64)), "apt_model.safetensors", "expected dtype torch.float64"),
        (tensors_with(f"{QUERY}.lora_A", torch.ones(4, 32)), "apt_model.safetensors", "lora_A.*and.*lora_B"),
    ],
)
def test_a_bad_file_is_named_and_the_base_model_left_alone(tmp_path, damage, file, words):
    everything(tmp_path)
    damage(tmp_path)
    base = tiny_bert()
    before = snapshot(base)
    with pytest.raises(ValueError, match=f"{file}: "):
        APTModel.from_pretrained(base, tmp_path)
    reseal(tmp_path)
    with pytest.raises(ValueError, match=f"(?s){file}: .*{words}"):
        APTModel.from_pretrained(base, tmp_path)
    assert_same(before, snapshot(base))


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(tmp_path, file):
    everything(tmp_path)
    (tmp_path / file).unlink()
    base = tiny_bert()
    before = snapshot(base)
    with pytest.raises(ValueError, match=f"{file}: expected a regular file, found none"):
        APTModel.from_pretrained(base, tmp_path)
    assert_same(before, snapshot(base))
    with pytest.raises(ValueError, match="nowhere/apt_manifest.json: expected a regular file, found none"):
        APTModel.from_pretrained(base, tmp_path / "nowhere")


def test_files_of_two_saves_are_noticed(tmp_path):
    apt = everything(tmp_path / "one")
    apt.set_block_mask("0.neurons", half())
    apt.save_pretrained(tmp_path / "two")
    for file in ("apt_model.safetensors", "apt_manifest.json"):
        mixed = tmp_path / file / "mixed"
        shutil.copytree(tmp_path / "one", mixed)
        shutil.copy(tmp_path / "two" / file, mixed / file)
        with pytest.raises(ValueError, match="apt_model.safetensors: expected content with SHA-256"):
            APTModel.from_pretrained(tiny_bert(), mixed)


def test_a_refused_value_takes_back_what_was_loaded_before_it(tmp_path):
    apt = everything(tmp_path, modules_to_save=["embeddings"])
    with torch.no_grad():
        apt.bert.embeddings.LayerNorm.weight.zero_()
    apt.save_pretrained(tmp_path)
    tensors_with(f"{DOWN}.mask_in", torch.full((48,), 2.0))(tmp_path)  # the embeddings come first
    reseal(tmp_path)
    base = tiny_bert()
    before = snapshot(base)
    with pytest.raises(ValueError, match="mask_in must hold values"):
        APTModel.from_pretrained(base, tmp_path)
    assert_same(before, snapshot(base))


def test_another_base_model_is_refused(tmp_path):
    everything(tmp_path)
    for other in (tiny_bert(num_hidden_layers=1), tiny_bert(hidden_size=16), tiny_bert(num_labels=5)):
        with pytest.raises(ValueError, match="apt_model.safetensors: .*expected (the tensors of this model|shape)"):
            APTModel.from_pretrained(other, tmp_path)
        assert not list(adapters(other))


def test_other_files_stay_and_a_file_in_the_way_is_refused(tmp_path):
    apt = everything(tmp_path)
    (tmp_path / "mine.txt").write_text("stays")
    with torch.no_grad():
        apt.classifier.weight.zero_()
    apt.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [*FILES, "mine.txt"] and (tmp_path / "mine.txt").read_text() == "stays"
    assert not APTModel.from_pretrained(tiny_bert(), tmp_path).classifier.weight.any()
    with pytest.raises(ValueError, match="path: expected a directory"):
        apt.save_pretrained(tmp_path / "mine.txt")
    (tmp_path / "other" / "apt_model.safetensors").mkdir(parents=True)
    with pytest.raises(ValueError, match="path: expected no directory of this name, got one: .*apt_model.safetensors"):
        apt.save_pretrained(tmp_path / "other")
    assert [file.name for file in (tmp_path / "other").iterdir()] == ["apt_model.safetensors"]


def test_saving_over_what_was_loaded(tmp_path):
    everything(tmp_path)
    apt = APTModel.from_pretrained(tiny_bert(), tmp_path)
    expected = apt(**batch()).logits
    apt.save_pretrained(tmp_path)
    assert torch.equal(apt(**batch()).logits, expected)
    assert torch.equal(APTModel.from_pretrained(tiny_bert(), tmp_path)(**batch()).logits, expected)


def test_a_checkpoint_of_a_cut_model_of_an_older_version_says_which_widths_differ(tmp_path, monkeypatch):
    """It does not say what was cut, and fits a base that was cut alike."""
    apt = trained(tiny_bert(), APTConfig(r=2))
    for name in ("0.neurons", "1.neurons"):
        apt.set_block_mask(name, half())
    with monkeypatch.context() as older:
        older.setattr(cut_states, "tensors_of", lambda *_: {})
        apt.cut().save_pretrained(tmp_path)
    base = tiny_bert()
    before = snapshot(base)
    words = r"model.safetensors: .*layer.0.intermediate.dense.mask_out: expected shape \[48\], got \[24\]; .*does not say what was cut"
    with pytest.raises(ValueError, match=words):
        APTModel.from_pretrained(base, tmp_path)
    assert_same(before, snapshot(base))
    cut = get_apt_model(tiny_bert(), APTConfig(r=1, target_modules=["query"], modules_to_save=[]))
    for name in ("0.neurons", "1.neurons"):
        cut.set_block_mask(name, half())
    other = APTModel.from_pretrained(cut.cut().merge_and_unload(), tmp_path)
    assert torch.allclose(other(**batch()).logits, apt(**batch()).logits, rtol=0, atol=1e-12)
