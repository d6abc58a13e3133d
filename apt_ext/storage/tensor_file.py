"""A safetensors file, read into memory and trusted in nothing: the header is judged whole before any data is read.

One pass, each tensor into memory of its own, no mapping: a file that shrinks meanwhile is an error and not the end of the process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from . import atomic_dir

_MOST_TEXT = 1 << 20  # bytes of a header beside its entries
_ENTRY = 300  # bytes of an entry beside its name
_MOST_DIMS = 16
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Entry(NamedTuple):
    """What a header says of one tensor; its place is checked."""

    dtype: torch.dtype
    shape: list[int]
    size: int  # in bytes


def read(file: atomic_dir.Sealed, names: Iterable[str], judge: Callable[[dict[str, Entry]], None]) -> dict[str, Tensor]:
    """The tensors of `file`, once `judge` has seen their entries and not raised.

    names  those that may be in it: the header is no longer than they explain

    ValueError unless the entries cover the data, each byte once, and it is what the manifest says.
    """
    most = min(_MOST_TEXT + sum(len(name) + _ENTRY for name in names), file.size - 8)
    length = int.from_bytes(file.read(min(8, file.size)), "little")
    if length > most:
        raise ValueError(f"expected a safetensors header of at most {max(most, 0)} bytes, got {length}")
    entries = _entries(file.read(length), file.size - 8 - length)
    judge(entries)
    tensors = {name: _tensor(name, entry, file) for name, entry in entries.items()}
    file.done()
    return tensors


def _entries(header: bytearray, room: int) -> dict[str, Entry]:
    """The entries, in the order of their data, which must fill `room` bytes."""
    if not header.startswith(b"{"):
        raise ValueError("expected a safetensors header, which begins with '{'")
    found = atomic_dir.json_object(header.decode("utf-8"))
    metadata = found.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"__metadata__: expected an object of strings, got {metadata!r:.100}")
    placed: list[tuple[int, int, str, Entry]] = []
    for name, said in found.items():
        said = said if isinstance(said, dict) else {}
        dtype, shape, place = said.get("dtype"), said.get("shape"), said.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ValueError(f"{name}: expected a dtype of {', '.join(_DTYPES)}, got {dtype!r:.40}")
        if not _whole(shape) or len(shape) > _MOST_DIMS:
            raise ValueError(f"{name}: expected shape of at most {_MOST_DIMS} whole numbers, got {shape!r:.100}")
        if not _whole(place) or len(place) != 2:
            raise ValueError(f"{name}: expected data_offsets, two whole numbers, got {place!r:.100}")
        placed.append((place[0], place[1], name, Entry(_DTYPES[dtype], shape, math.prod(shape) * _DTYPES[dtype].itemsize)))
    placed.sort(key=lambda each: each[:2])
    end = 0
    for start, stop, name, entry in placed:
        if start != end or stop - start != entry.size:
            raise ValueError(f"{name}: expected {entry.size} bytes from {end} for its shape, got data_offsets [{start}, {stop}]")
        end = stop
    if end != room:
        raise ValueError(f"expected {end} bytes of data for its shapes, got {room}")
    return {name: entry for _, _, name, entry in placed}


def _whole(numbers: Any) -> TypeGuard[list[int]]:
    return isinstance(numbers, list) and all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)


def _tensor(name: str, entry: Entry, file: atomic_dir.Sealed) -> Tensor:
    data = file.read(entry.size)
    if entry.dtype is torch.bool and data and max(data) > 1:
        raise ValueError(f"{name}: expected bytes of 0 and 1 for its dtype bool, got others")
    if not data:
        return torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    return torch.frombuffer(data, dtype=entry.dtype).view(entry.shape)
