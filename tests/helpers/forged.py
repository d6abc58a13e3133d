"""A small checkpoint that is good, a copy to damage, and what must hold whenever one is loaded."""

import json
import struct

import torch
from torch import nn

from apt_ext.config import APTConfig
from apt_ext.model import APTModel, adapters, get_apt_model
from apt_ext.storage import atomic_dir
from apt_ext.storage.checkpoint import MANIFEST_FILE

CONFIG, TENSORS, MANIFEST = "apt_config.json", "apt_model.safetensors", MANIFEST_FILE
FILES = [CONFIG, TENSORS, MANIFEST]


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5, dtype=torch.float64), nn.Linear(5, 4, dtype=torch.float64))


def save_good(directory):
    """A checkpoint, of an adapter and of a module that trains whole; returns the directory."""
    apt = get_apt_model(base(), APTConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    adapter = apt.model[0]
    with torch.no_grad():
        adapter.lora_B.normal_()
    adapter.set_masks(mask_in=torch.tensor([1.0, 0, 1, 0.5, 1, 1]))
    apt.save_pretrained(directory)
    return directory


def state(model):
    return {
        name: (value.clone(), value.requires_grad)
        for name, value in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items()
    }


def load(directory):
    """What is loaded, or the ValueError; the base model is then as it was and the error names a file of the directory."""
    model = base()
    before = state(model)
    try:
        return APTModel.from_pretrained(model, directory)
    except ValueError as error:
        after = state(model)
        assert before.keys() == after.keys() and not list(adapters(model))
        assert all(torch.equal(value, after[name][0]) and flag == after[name][1] for name, (value, flag) in before.items())
        assert any(f"{directory}/{file}: " in str(error) for file in FILES), error
        return error


def refused(directory, file, words):
    error = load(directory)
    assert isinstance(error, ValueError) and f"{directory}/{file}: " in str(error) and words in str(error), error


def same(directory, good):
    """Whether the checkpoint loads and is the good one."""
    loaded = load(directory)
    return isinstance(loaded, APTModel) and all(
        torch.equal(value, other) for value, other in zip(loaded.state_dict().values(), load(good).state_dict().values(), strict=True)
    )


def reseal(directory):
    (directory / MANIFEST).unlink(missing_ok=True)
    atomic_dir.seal(directory, MANIFEST)


def parts(content):
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_tensors(directory, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (directory / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text + data)
    reseal(directory)
