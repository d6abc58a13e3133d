"""What was trained, on the disk: a configuration, the tensors, and the manifest that makes them one checkpoint.

Read into memory, no larger than the model explains, and never as pickle.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import disk
from .config import APTConfig
from .errors import naming

CONFIG_FILE = "apt_config.json"
TENSORS_FILE = "apt_model.safetensors"
MANIFEST_FILE = "apt_manifest.json"
_FILES = (CONFIG_FILE, TENSORS_FILE)
_FORMAT = 1  # of the two files
_MOST_TEXT = 1 << 20  # bytes of a configuration, and of what a header holds beside its tensors' entries
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def save(path: str | os.PathLike[str], config: APTConfig, tensors: dict[str, Tensor], stream: bool) -> None:
    """Write a checkpoint into the directory `path`; what `APTModel.save_pretrained` promises.

    stream  whether masks of hidden dimensions are among the tensors
    """
    from safetensors.torch import save as serialize

    directory = Path(path)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"path: expected a directory or a missing one, got a file: {directory}")
    text = json.dumps({"format": _FORMAT, "stream": stream, **config.to_dict()}, indent=2) + "\n"
    # Copies: safetensors refuses tensors that share memory, as tied weights do.
    copies = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    with disk.made(directory), disk.stage(directory, MANIFEST_FILE) as new:
        (new / TENSORS_FILE).write_bytes(serialize(copies, {"format": "pt"}))
        (new / CONFIG_FILE).write_text(text, encoding="utf-8")
        disk.seal(new, MANIFEST_FILE)
        disk.commit(new, directory, MANIFEST_FILE, _FILES)


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Checkpoint]:
    """The checkpoint in the directory `path`, one and the same whatever is saved there meanwhile. ValueError naming the file."""
    with disk.opened(Path(path), MANIFEST_FILE, _FILES) as files:
        yield Checkpoint(files)


class Checkpoint:
    """One that is open; its methods read and judge. ValueError naming the file."""

    def __init__(self, files: dict[str, disk.Sealed]) -> None:
        self._config, self._tensors = files[CONFIG_FILE], files[TENSORS_FILE]
        self.stream = False  # whether hidden masks are in it, once `config` was read

    def config(self) -> APTConfig:
        """The configuration that it was saved with."""
        with naming(str(self._config.path), ValueError):
            if self._config.size > _MOST_TEXT:
                raise ValueError(f"expected at most {_MOST_TEXT} bytes, got {self._config.size}")
            values = disk.json_object(self._config.content().decode("utf-8"))
            if (version := values.pop("format", None)) != _FORMAT:
                raise ValueError(f'expected "format": {_FORMAT}, which this version of apt_ext reads, got {version!r}')
            self.stream = values.pop("stream", False) is True
            return APTConfig.from_dict(values)

    def load(self, expected: dict[str, Tensor], then: Callable[[dict[str, Tensor]], None]) -> None:
        """Call `then` with the tensors if they are those of `expected` in name, shape and dtype; a rank may be any that fits."""
        with naming(str(self._tensors.path), ValueError):
            then(_read_tensors(self._tensors, expected))


def _read_tensors(file: disk.Sealed, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The header is judged before the data is read, so no more is read than the model explains."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    length = int.from_bytes(file.start(8), "little")
    most = min(_MOST_TEXT + sum(len(name) + 300 for name in expected), file.size - 8)
    if length > most:
        raise ValueError(f"expected a safetensors header of at most {max(most, 0)} bytes, got {length}")
    start = file.start(8 + length)
    found = disk.json_object(start[8:].decode("utf-8"))
    found.pop("__metadata__", None)
    if found.keys() != expected.keys():
        missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        raise ValueError(f"expected the tensors of this model: {len(missing)} missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}")
    entries = 0
    for name, value in expected.items():
        entries += _checked_entries(name, found[name].get("shape") if isinstance(found[name], dict) else None, value)
    if file.size > 8 + length + 8 * entries:
        raise ValueError(f"expected at most {8 * entries} bytes of data for its shapes, got {file.size - 8 - length}")
    content = file.content()
    if not content.startswith(start):
        raise ValueError("expected a file at rest, but it was written to while it was read")
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    for name, value in expected.items():
        got = tensors[name].dtype
        if got != value.dtype and not (got in _FLOATS and value.is_floating_point()):
            raise ValueError(f"{name}: expected dtype {value.dtype}, got {got}")
    return tensors


def _checked_entries(name: str, shape: Any, like: Tensor) -> int:
    """The number of entries of `shape`, which must be `like`'s, except that a factor may have any rank that its linear allows."""
    free = {"lora_A": 0, "lora_B": 1}.get(name.rpartition(".")[2])
    good = isinstance(shape, list) and len(shape) == like.dim()
    for dim, size in enumerate(like.shape if good else ()):
        fits = type(shape[dim]) is int and (0 <= shape[dim] <= max(like.shape) if dim == free else shape[dim] == size)
        good = good and fits
    if not good:
        expected = [("rank" if dim == free else size) for dim, size in enumerate(like.shape)]
        raise ValueError(f"{name}: expected shape {expected}, got {shape}")
    return math.prod(shape)
