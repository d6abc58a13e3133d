"""A directory whose layers have widths of their own: the stock files, and beside them what no stock config can say.

config.json there is that of a model as wide as the widest layer, rounded up to what the config accepts. Stock classes refuse the tensors as
mismatched; `load_export` makes that wide model and cuts it to the widths of apt_widths.json before it loads them.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import disk, tensor_file
from ..arguments import checked_path
from ..errors import naming
from .architectures import Architecture, architecture_of, find_blocks
from .cutting import configs, lanes_for, parameter_changes, replace_parameters, tell_blocks, tell_constants, tell_modules
from .formats import Sizes

MANIFEST = "apt_export.json"  # of every export
FILE = "apt_widths.json"
_FORMAT = 1
_MOST_TEXT = 1 << 20  # bytes of each JSON file


def save(model: Any, directory: Path, max_shard_size: int | str) -> None:
    """Write a model whose architecture is in the table."""
    row = architecture_of(model)
    assert row is not None
    sizes = Sizes.of(model)
    wide = copy.copy(model)  # the same modules under another config
    wide.config = copy.deepcopy(model.config)
    entries = _widest(row, model.config, sizes)
    for field, width in entries.items():
        setattr(wide.config, field, width)
    wide.save_pretrained(directory, max_shard_size=max_shard_size)
    says = {
        "format": _FORMAT,
        "class": type(model).__name__,
        "widths": {name: block.count for name, block in find_blocks(model).items()},
        "config": {field: getattr(model.config, field) for field in entries},
    }
    (directory / FILE).write_text(json.dumps(says, indent=2) + "\n", encoding="utf-8")


def load_export(path: str | os.PathLike[str]) -> nn.Module:
    """The model in a directory that `export(..., per_layer=True)` wrote, of its stock class, in evaluation mode and in its own dtype.

    A directory that stock transformers can load has no apt_widths.json and is not for this function. Nothing is read as pickle.

    Raises ValueError naming the file where it is missing, damaged, or does not fit the tensors. ImportError without transformers.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError('load_export needs transformers: pip install "apt_ext[hf]"') from error
    directory = checked_path(path)
    with disk.opened(directory, MANIFEST) as files:
        if FILE not in files or "config.json" not in files:
            raise ValueError(f"{directory / FILE}: expected it and config.json in {MANIFEST}, got {sorted(files)[:8]}")
        with naming(str(directory / FILE), ValueError):
            said = files[FILE].json(_MOST_TEXT)
            kind = getattr(transformers, str(said.get("class")), None)
            if said.get("format") != _FORMAT or not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
                raise ValueError(f'expected "format": {_FORMAT} and the name of a model class of transformers, got {str(said)[:200]}')
            counts, entries = said.get("widths"), said.get("config")
            for name, numbers, also in (("widths", counts, ()), ("config", entries, (None,))):
                good = isinstance(numbers, dict) and all(
                    number in also or (type(number) is int and number >= 0) for number in numbers.values()
                )
                if not good:
                    raise ValueError(f'expected "{name}" to be numbers, got {str(numbers)[:200]}')
            model = _shaped(kind, files["config.json"], counts or {}, entries or {})
        _load_tensors(model, directory, [file for name, file in files.items() if name.endswith(".safetensors")])
    return model.eval()  # type: ignore[no-any-return]


def _shaped(kind: Any, file: disk.Sealed, counts: dict[str, int], entries: dict[str, int]) -> Any:
    """A model with these numbers of blocks, whose values are of no account."""
    with naming("config.json"):
        config = kind.config_class.from_dict(file.json(_MOST_TEXT))
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(config, "dtype", None) or before)
    try:
        model = kind(config)
    finally:
        torch.set_default_dtype(before)
    blocks = find_blocks(model)
    if blocks.keys() != counts.keys() or any(counts[name] > block.count for name, block in blocks.items()):
        raise ValueError(f'expected "widths" of the blocks of this model, got {str(counts)[:200]}')
    kept = {name: torch.arange(block.count, device="cpu") < counts[name] for name, block in blocks.items()}
    lanes = lanes_for(model, blocks, kept)
    with torch.no_grad():
        replace_parameters(model, parameter_changes(model, lanes))
        tell_modules(model, lanes)
        tell_blocks(model)
        if "hidden" in counts:
            tell_constants(model, counts["hidden"])
    for own in configs(model):
        for field, width in entries.items():
            setattr(own, field, width)
    return model


def _load_tensors(model: nn.Module, directory: Path, files: list[disk.Sealed]) -> None:
    """ValueError unless the files hold each of the model's tensors, a tied one under any of its names, and no other."""
    state = model.state_dict(keep_vars=True)

    def judge(found: dict[str, tensor_file.Entry]) -> None:
        wrong = [name for name, entry in found.items() if name not in state or list(state[name].shape) != entry.shape]
        if wrong or found.keys() & tensors.keys():
            raise ValueError(f"expected the tensors of {FILE}, each once: unknown, of another shape or twice {(wrong or list(found))[:3]}")

    tensors: dict[str, Tensor] = {}
    for file in files:
        with naming(str(file.path), ValueError):
            tensors |= tensor_file.read(file, state, judge)
    came = {id(state[name]) for name in tensors}
    missing = [name for name, tensor in state.items() if id(tensor) not in came]
    with naming(str(directory), ValueError):
        if missing:
            raise ValueError(f"expected the tensors of {FILE}: missing {missing[:3]}")
        model.load_state_dict(tensors, strict=False)


def _widest(row: Architecture, config: Any, sizes: Sizes) -> dict[str, int]:
    """Entries of a config that accepts them, each at least as large as in any layer."""
    largest = {field: max(found.values()) for field, found in sizes.widths.items()}
    hidden = largest.setdefault("hidden_size", config.hidden_size)
    heads = largest.get("num_attention_heads")
    if heads is not None:
        groups = largest.get("num_key_value_heads")
        shared = _shared(sizes) if groups is not None else 1
        heads = max(heads, shared)
        if row.derives_head_size:
            heads = max(heads, -(-hidden // sizes.head_size))
            hidden = heads * sizes.head_size
        elif row.heads_divide:
            hidden = -(-hidden // heads) * heads
        largest |= {"num_attention_heads": heads, "hidden_size": hidden}
        if groups is not None:
            largest["num_key_value_heads"] = heads // shared
    return {field: max(width, 1) for field, width in largest.items()}


def _shared(sizes: Sizes) -> int:
    """How many query heads share a KV head."""
    groups = sizes.widths["num_key_value_heads"]
    return next((heads // groups[name] for name, heads in sizes.widths["num_attention_heads"].items() if groups[name]), 1)
