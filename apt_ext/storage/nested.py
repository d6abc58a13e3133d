"""A state of nested dicts and lists as two flat things: plain values for JSON, and named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_TENSOR = "tensor"  # {this: name} stands in the plain values where a tensor does in the state


def split(state: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Return (what JSON can hold, {name: contiguous copy on the CPU}); `joined` puts them together again."""
    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().contiguous().clone()
            return {_TENSOR: name}
        if isinstance(value, Mapping):
            return {"dict": [[key, plain(one)] for key, one in value.items()]}
        return [plain(one) for one in value] if isinstance(value, list | tuple) else value

    return plain(state), tensors


def joined(value: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the state that `split` took apart; ValueError for values that it did not make."""
    state = _joined(value, tensors)
    if not isinstance(state, dict):
        raise ValueError(f'expected "state" to be a dict, got {type(state).__name__}')
    return state


def _joined(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_joined(one, tensors) for one in value]
    if not isinstance(value, dict):
        return value
    if isinstance(name := value.get(_TENSOR), str) and name in tensors and len(value) == 1:
        return tensors[name]
    entries = value.get("dict")
    if (
        len(value) != 1
        or not isinstance(entries, list)
        or any(not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str) for entry in entries)
    ):
        raise ValueError(f"expected a dict or the name of a tensor, got {str(value)[:80]}")
    return {key: _joined(one, tensors) for key, one in entries}
