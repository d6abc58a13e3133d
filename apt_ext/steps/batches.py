"""What a batch is to a graph: the tensors that it reads, and everything else of it, by which another graph is told apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

MASKS = ("attention_mask", "decoder_attention_mask")
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class Ungraphable(Exception):
    """Why a batch cannot be part of a graph, in words."""


def signature(batch: Any, device: torch.device, name: str = "batch") -> tuple[Hashable, list[Tensor]]:
    """Return what tells the graph of this batch apart, and its tensors in order.

    Lists, tuples and dicts may lie within each other. Raises Ungraphable for a tensor that is elsewhere than on `device`, that requires a
    gradient or that is no plain one, and for an object of another type, whose values a graph would keep.
    """
    tensors: list[Tensor] = []

    def told(value: Any, name: str) -> Hashable:
        if isinstance(value, Tensor):
            if type(value) is not Tensor or value.layout != torch.strided:
                raise Ungraphable(f"{name} is a {type(value).__name__} of layout {value.layout}")
            if value.device != device:
                raise Ungraphable(f"{name} is on {value.device} and the model on {device}; move it to the model's device")
            if value.requires_grad:
                raise Ungraphable(f"{name} requires a gradient")
            tensors.append(value)
            return value.shape, value.dtype
        if isinstance(value, float | complex):
            return type(value), _exactly(value)
        if isinstance(value, _PLAIN):
            return type(value), value
        if isinstance(value, Mapping):  # whose order a model may read
            return type(value), tuple((key, told(one, f"{name}[{key!r}]")) for key, one in value.items())
        if isinstance(value, list | tuple):
            return type(value), tuple(told(one, f"{name}[{i}]") for i, one in enumerate(value))
        raise Ungraphable(f"{name} is a {type(value).__name__}, whose values a graph would keep")

    return told(batch, name), tensors


def _exactly(value: float | complex) -> Hashable:
    """What a number is to a graph: NaN is NaN, and -0.0 is not 0.0, which `==` has the other way."""
    return float.hex(value) if isinstance(value, float) else (float.hex(value.real), float.hex(value.imag))


def with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return `value` with every tensor in it changed; mappings, dataclasses of outputs, lists and tuples keep their type.

    Objects of other types (a cache of keys and values) become None: they cannot be handed over.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        made = {key: with_tensors(one, change) for key, one in value.items()}
        return type(value)(**made) if dataclasses.is_dataclass(value) else _of_type(type(value), made)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(with_tensors(one, change) for one in value))
    if isinstance(value, list | tuple):
        return type(value)(with_tensors(one, change) for one in value)
    return None


def _of_type(kind: type, made: dict[Any, Any]) -> Any:
    try:
        return kind(made)
    except TypeError:
        return made


def is_padded(batch: Mapping[str, Any]) -> bool:
    """Return True if a token of the batch may be masked. Waits once for the device, where the masks are on one."""
    masks = [mask for mask in (batch.get(name) for name in MASKS) if isinstance(mask, Tensor)]
    if not masks:
        return False
    if any(mask.dim() != 2 for mask in masks):
        return True  # it says more than which tokens are padding
    found = [(mask == 0).any() for mask in masks]
    return bool(found[0] if len(found) == 1 else torch.stack(found).any())
