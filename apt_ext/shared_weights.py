"""Adapters that read the same memory: who has merged into it, and who must not compute with it meanwhile.

    hold, release     an adapter has merged into its weight; has taken the merge back, or made it the weight for good
    merged_into       which merged adapters hold a tensor
    is_read_by_other  whether another adapter has the very same Parameter

Looked up by memory: a tie can be one Parameter in two layers, or two Parameters over one storage (a self-teacher's copy).
"""

from __future__ import annotations

from itertools import count
from threading import Lock
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

if TYPE_CHECKING:
    from .merging import Merging

_living: WeakSet[Merging] = WeakSet()
_merged: WeakSet[Merging] = WeakSet()
_marks = count()
_lock = Lock()  # threads merge adapters of their own, and a set that grows cannot be walked


def join(adapter: Merging) -> None:
    """It may read memory that others merge into."""
    with _lock:
        _living.add(adapter)


def hold(adapter: Merging) -> None:
    """Its weight and bias carry a merge from now on: adapters that read the same memory refuse to compute."""
    with _lock:
        _merged.add(adapter)
    name = adapter.label or "another adapter"
    for other in _readers(adapter):
        if not other.merged:  # else it is a copy that was made of the merged one
            other.foreign_merges[adapter.merge_mark] = f"its base layer carries the merge of {name}; call unmerge_weights() there first"


def release(adapter: Merging, for_good: bool = False) -> None:
    """Its weight and bias are as before the merge; `for_good`: the merged ones stay, and the adapter is not to be used again."""
    with _lock:
        _merged.discard(adapter)
    name = adapter.label or "another adapter"
    for other in _readers(adapter):
        if for_good:
            other.foreign_merges[adapter.merge_mark] = (
                f"its base layer shares memory with that of {name}, which was merged for good (merge_and_unload); load the base weight "
                "again, or merge a copy.deepcopy of the model"
            )
        elif other.merged:
            other.foreign_merges[adapter.merge_mark] = f"its merge was undone in memory that it shares with {name}; call unmerge_weights()"
        else:
            other.foreign_merges.pop(adapter.merge_mark, None)
    adapter.foreign_merges.pop(adapter.merge_mark, None)


def next_mark() -> int:
    """What tells one merge from the others."""
    return next(_marks)


def merged_into(tensor: Tensor) -> list[tuple[Merging, str]]:
    """(adapter, "weight" or "bias") of what merged adapters hold and is, or shares memory with, ``tensor``."""
    with _lock:
        holders = list(_merged)
    held = ((adapter, name, getattr(adapter, name)) for adapter in holders for name in adapter.merged_names())
    return [(adapter, name) for adapter, name, other in held if other is tensor or _meet(_memory(other), _memory(tensor))]


def is_read_by_other(adapter: Merging) -> bool:
    """Whether another living adapter has the very Parameter that is this one's weight."""
    with _lock:
        others = list(_living)
    weight = adapter.weight
    return weight is not None and any(other is not adapter and other.weight is weight for other in others)


def _readers(adapter: Merging) -> list[Merging]:
    """The other living adapters whose weight or bias shares memory with those of this one."""
    with _lock:
        others = [other for other in _living if other is not adapter]
    mine = [_memory(tensor) for tensor in _tensors(adapter)]
    return [other for other in others if any(_meet(one, _memory(tensor)) for tensor in _tensors(other) for one in mine)]


def _tensors(adapter: Merging) -> list[Tensor]:
    base = adapter._modules.get("base_layer")
    found = [] if base is None else [base._parameters.get(name) for name in ("weight", "bias")]
    return [tensor for tensor in found if tensor is not None]


_Memory = tuple[torch.device, int, int]  # first byte, and one past the last


def _memory(tensor: Tensor) -> _Memory | None:
    """None of what has no memory of its own: on meta, fake, sharded, empty or wrapped by a transform."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or not tensor.numel() or is_functorch_wrapped_tensor(tensor):
        return None
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return tensor.device, start, start + (reach + 1) * tensor.element_size()


def _meet(one: _Memory | None, other: _Memory | None) -> bool:
    return one is not None and other is not None and one[0] == other[0] and one[1] < other[2] and other[1] < one[2]
