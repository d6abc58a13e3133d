"""A checkpoint on the disk: how it is written so that it is whole whatever happens, and read so that nothing in it is trusted."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from .config import APTConfig
from .errors import naming

CONFIG_FILE = "apt_config.json"
TENSORS_FILE = "apt_model.safetensors"
_FORMAT = 1  # of the two files
_MOST_TEXT = 1 << 20  # bytes of a configuration, and of what a header holds beside its tensors' entries


def save(path: str | os.PathLike[str], config: APTConfig, tensors: dict[str, Tensor]) -> None:
    """Write both files into the directory `path`; what `APTModel.save_pretrained` promises."""
    from safetensors.torch import save as serialize

    directory = Path(path)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"path: expected a directory or a missing one, got a file: {directory}")
    text = json.dumps({"format": _FORMAT, **config.to_dict()}, indent=2) + "\n"
    # Copies: safetensors refuses tensors that share memory, as tied weights do.
    copies = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    with sibling_directory(directory) as temporary:
        (temporary / TENSORS_FILE).write_bytes(serialize(copies, {"apt_config": text}))
        (temporary / CONFIG_FILE).write_text(text, encoding="utf-8")
        sync(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        for name in (TENSORS_FILE, CONFIG_FILE):
            os.replace(temporary / name, directory / name)
        sync(directory, files=False)


def load_config(path: str | os.PathLike[str]) -> tuple[str, APTConfig]:
    """The configuration in the directory `path`, as text and as what it says. ValueError naming the file."""
    file = Path(path) / CONFIG_FILE
    with naming(str(file), ValueError):
        return _read_config(file)


def load_tensors(
    path: str | os.PathLike[str], expected: dict[str, Tensor], config_text: str, then: Callable[[dict[str, Tensor]], None]
) -> None:
    """Call `then` with the tensors in the directory `path`, checked against `expected`. ValueError naming the file, of `then` as well."""
    file = Path(path) / TENSORS_FILE
    with naming(str(file), ValueError):
        then(_read_tensors(file, expected, config_text))


@contextmanager
def sibling_directory(path: Path) -> Iterator[Path]:
    """A new directory beside `path`, so in the same file system, where a rename is one step; gone with its contents afterwards."""
    path = path.absolute()
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    temporary.mkdir(parents=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(directory: Path, files: bool = True) -> None:
    """Have the directory's entries, and its files, on the disk when this returns."""
    for path in [*(directory.iterdir() if files else ()), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _regular_size(file: Path) -> int:
    if not file.is_file():
        raise ValueError("expected a regular file, found none")
    return file.stat().st_size


def _read_config(file: Path) -> tuple[str, APTConfig]:
    """The text of apt_config.json and what it says."""
    if _regular_size(file) > _MOST_TEXT:
        raise ValueError(f"expected at most {_MOST_TEXT} bytes, got {_regular_size(file)}")
    text = file.read_text(encoding="utf-8")
    values = _json_object(text)
    if (version := values.pop("format", None)) != _FORMAT:
        raise ValueError(f'expected "format": {_FORMAT}, which this version of apt_ext reads, got {version!r}')
    return text, APTConfig.from_dict(values)


def _read_tensors(file: Path, expected: dict[str, Tensor], config_text: str) -> dict[str, Tensor]:
    """The tensors of a file with the names and shapes of `expected`, but for the ranks, which may be any that the linears allow.

    ValueError otherwise. The header is judged before the data is read, so no more is read than the model explains.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    size = _regular_size(file)
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        most = 2 * _MOST_TEXT + 300 * len(expected)
        if len(start) < 8 or length > min(most, size - 8):
            raise ValueError(f"expected a safetensors header of at most {min(most, max(size - 8, 0))} bytes, got {length}")
        header = stream.read(length)
        found = _json_object(header.decode("utf-8"))
        metadata = found.pop("__metadata__", {})
        if isinstance(metadata, dict) and metadata.get("apt_config", config_text) != config_text:
            raise ValueError(f"expected the {CONFIG_FILE} that was written with it, got another: they come from different saves")
        if found.keys() != expected.keys():
            missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
            raise ValueError(
                f"expected the tensors of this model: {len(missing)} missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}"
            )
        entries = 0
        for name, value in expected.items():
            shape = found[name].get("shape") if isinstance(found[name], dict) else None
            entries += _checked_entries(name, shape, value)
        if size > 8 + length + 8 * entries:
            raise ValueError(f"expected at most {8 * entries} bytes of data for its shapes, got {size - 8 - length}")
        data = stream.read(size - 8 - length)
    try:
        tensors = load(start + header + data)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    for name, value in expected.items():
        got = tensors[name].dtype
        if got != value.dtype and not (got.is_floating_point and value.is_floating_point()):
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


def _json_object(text: str) -> dict[str, Any]:
    """A JSON object none of whose objects has a key twice; ValueError otherwise."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("expected each key once in a JSON object, got one twice")
        return values

    values = json.loads(text, object_pairs_hook=unique)
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, got {type(values).__name__}")
    return values
