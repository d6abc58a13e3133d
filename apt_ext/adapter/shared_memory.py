"""Adapters that read the same memory: who has merged into it, and who must not compute with it meanwhile.

    hold, release     an adapter has merged into its weight; has taken the merge back, or made it the weight for good
    merged_into       which merged adapters hold a tensor
    readers_of        which adapters read a tensor
    is_read_by_other  whether another adapter has the very same Parameter

Looked up by memory: a tie can be one Parameter in two layers, or two Parameters over one storage (a self-teacher's copy). A look-up goes
through all adapters, which takes a fraction of a millisecond for hundreds, unless it is made within `indexed`, as those for a whole
model are.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate, count
from threading import Lock, local
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from .. import _C

if TYPE_CHECKING:
    from .layer import APTAdapter

_living: WeakSet[APTAdapter] = WeakSet()
_merged: WeakSet[APTAdapter] = WeakSet()
_marks = count()
_joined = count()
_last_joined = -1
_of_thread = local()  # `index`: an _Index within `indexed`
_lock = Lock()  # threads merge adapters of their own, and a set that grows cannot be walked


def join(adapter: APTAdapter) -> None:
    """It may read memory that others merge into."""
    global _last_joined
    with _lock:
        _living.add(adapter)
        _last_joined = next(_joined)


@contextmanager
def indexed() -> Iterator[None]:
    """Within this context look-ups by this thread take no longer however many adapters there are.

    Base layers must not be given other memory meanwhile, except by the adapters themselves, which share none of that.
    """
    before = getattr(_of_thread, "index", None)
    _of_thread.index = before or _living_index()
    try:
        yield
    finally:
        _of_thread.index = before


def hold(adapter: APTAdapter) -> None:
    """Its weight and bias carry a merge from now on: adapters that read the same memory refuse to compute."""
    with _lock:
        _merged.add(adapter)
    name = adapter.label or "another adapter"
    for other in _readers(adapter):
        if not other.merged:  # else it is a copy that was made of the merged one
            other.merge.foreign[adapter.merge.mark] = f"its base layer carries the merge of {name}; call unmerge_weights() there first"


def release(adapter: APTAdapter, for_good: bool = False) -> None:
    """Its weight and bias are as before the merge; `for_good`: the merged ones stay, and the adapter is not to be used again."""
    with _lock:
        _merged.discard(adapter)
    name = adapter.label or "another adapter"
    for other in _readers(adapter):
        if for_good:
            other.merge.foreign[adapter.merge.mark] = (
                f"its base layer shares memory with that of {name}, which was merged for good (merge_and_unload); load the base weight "
                "again, or merge a copy.deepcopy of the model"
            )
        elif other.merged:
            other.merge.foreign[adapter.merge.mark] = f"its merge was undone in memory that it shares with {name}; call unmerge_weights()"
        else:
            other.merge.foreign.pop(adapter.merge.mark, None)
    adapter.merge.foreign.pop(adapter.merge.mark, None)


def next_mark() -> int:
    """What tells one merge from the others."""
    return next(_marks)


def merged_into(tensor: Tensor) -> list[tuple[APTAdapter, str]]:
    """(adapter, "weight" or "bias") of what merged adapters hold and is, or shares memory with, ``tensor``."""
    with _lock:
        holders = set(_merged)
    if not holders:
        return []
    index = _index()
    found = index.readers(tensor) if index is not None else _scanned(holders, tensor)
    return [(adapter, name) for adapter, name in found if adapter in holders and name in adapter.merge.originals]


def is_read_by_other(adapter: APTAdapter) -> bool:
    """Whether another living adapter has the very Parameter that is this one's weight."""
    weight = adapter.weight
    return weight is not None and any(other is not adapter and other.weight is weight for other, _ in readers_of(weight))


def _readers(adapter: APTAdapter) -> list[APTAdapter]:
    """The other living adapters whose weight or bias shares memory with those of this one."""
    found = dict.fromkeys(other for tensor in _tensors(adapter).values() for other, _ in readers_of(tensor))
    return [other for other in found if other is not adapter]


def readers_of(tensor: Tensor) -> list[tuple[APTAdapter, str]]:
    """(adapter, "weight" or "bias") of what living adapters hold and is, or shares memory with, ``tensor``."""
    index = _index()
    if index is not None:
        return index.readers(tensor)
    with _lock:
        living = list(_living)
    return _scanned(living, tensor)


def _scanned(adapters: Iterable[APTAdapter], tensor: Tensor) -> list[tuple[APTAdapter, str]]:
    """What `_Index(adapters).readers(tensor)` gives, for one look-up."""
    owners = [(adapter, base._parameters) for adapter in adapters if (base := adapter._modules["base_layer"]) is not None]
    found = [(name, _C.sharing(tensor, [own.get(name) for _, own in owners])) for name in ("weight", "bias")]
    return [(owners[i][0], name) for name, places in found for i in places]


def _index() -> _Index | None:
    """That of `indexed`, made anew where adapters have come since; None outside of it."""
    index: _Index | None = getattr(_of_thread, "index", None)
    if index is not None and index.last_joined != _last_joined:
        index = _of_thread.index = _living_index()
    return index


def _living_index() -> _Index:
    with _lock:
        return _Index(list(_living))


class _Index:
    """Which adapters' weights and biases are a tensor, or share memory with it, as they lay when this was made."""

    def __init__(self, adapters: Iterable[APTAdapter]) -> None:
        self.last_joined = _last_joined
        self._same: dict[int, list[tuple[APTAdapter, str]]] = {}
        rows: dict[torch.device, list[tuple[int, int, APTAdapter, str]]] = {}
        for adapter in adapters:
            for name, tensor in _tensors(adapter).items():
                self._same.setdefault(id(tensor), []).append((adapter, name))
                memory = _memory(tensor)
                if memory is not None:
                    device, start, end = memory
                    rows.setdefault(device, []).append((start, end, adapter, name))
        self._rows = {device: sorted(found, key=lambda row: row[:2]) for device, found in rows.items()}
        self._starts = {device: [row[0] for row in found] for device, found in self._rows.items()}
        # How far memory reaches of a row and of all before it.
        self._reach = {device: list(accumulate((row[1] for row in found), max)) for device, found in self._rows.items()}

    def readers(self, tensor: Tensor) -> list[tuple[APTAdapter, str]]:
        """(adapter, "weight" or "bias") of each."""
        found = dict.fromkeys(self._same.get(id(tensor), ()))
        memory = _memory(tensor)
        if memory is not None and memory[0] in self._rows:
            device, start, end = memory
            last = bisect_left(self._starts[device], end)
            while last and self._reach[device][last - 1] > start:
                last -= 1
                found[self._rows[device][last][2:]] = None
        return [(adapter, name) for adapter, name in found if self._holds(adapter, name, tensor, memory)]

    @staticmethod
    def _holds(adapter: APTAdapter, name: str, tensor: Tensor, memory: _Memory | None) -> bool:
        """Whether it still does."""
        own = _tensors(adapter).get(name)
        return own is not None and (own is tensor or _meet(_memory(own), memory))


def _tensors(adapter: APTAdapter) -> dict[str, Tensor]:
    base = adapter._modules.get("base_layer")
    found = {} if base is None else {name: base._parameters.get(name) for name in ("weight", "bias")}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


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
