"""Change an adapter's masks, and notice what others wrote into them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from ..common.checks import all_on_host
from ..distributed.dtensor import is_sharded, replicated
from .mask import SIDES, Mask
from .rank import adopt_ranks

if TYPE_CHECKING:
    from .layer import APTAdapter

_settled: ContextVar[frozenset[int]] = ContextVar("settled", default=frozenset())  # ids of adapters, within `settled`


def mask_change(adapter: APTAdapter, masks: Mapping[str, Tensor | Mask]) -> Callable[[], None]:
    """Do what `APTAdapter.mask_change` promises."""
    new = {name: Mask.of(mask).known() for name, mask in masks.items()}
    if all(_holds(adapter, name, mask) for name, mask in new.items()) and adapter.packing.already_applied(adapter):
        return lambda: None
    present = {name: adapter.get_buffer(name) for name in new}
    with torch.inference_mode(False):
        resized = {name: mask.values for name, mask in new.items() if mask.values.shape != present[name].shape}
        others = {name: values.to(present[name].device, copy=True) for name, values in resized.items()}
    follow = adapter.packing.change(adapter, new)

    def make() -> None:
        with torch.no_grad():
            for name, mask in new.items():
                if name in others:
                    adapter._buffers[name] = others[name]
                else:  # pageable memory is read before this returns
                    adapter.get_buffer(name).copy_(mask.values, non_blocking=True)
                adapter.note_mask(name, mask)
        follow()

    return make


def _holds(adapter: APTAdapter, name: str, mask: Mask) -> bool:
    """True if this mask is in place already, and is known as what it is."""
    buffer = adapter._buffers[name]
    if buffer is None or not adapter.placed.lies_in(name, buffer) or buffer.is_meta or mask.values.is_meta:
        return False
    # The cheap question first: the other may wait for the device.
    return adapter.placed.is_ones(name, buffer) == mask.all_ones and torch.equal(adapter.host_mask(name), mask.values)


def see_written(adapter: APTAdapter) -> None:
    """Do what `APTAdapter.see_written_masks` promises."""
    adapter.packing.follow_written(adapter)
    for name in SIDES:
        adapter.note_mask(name, Mask.of(adapter.get_buffer(name)))
    adapter.history.check()


def mask_gradients(adapter: APTAdapter) -> None:
    """Do what `APTAdapter.apply_grad_mask` promises."""
    entries = ((adapter.lora_A.grad, adapter.mask_in, 1), (adapter.lora_B.grad, adapter.mask_out, 0))
    held = [(grad, (mask != 0).to(torch.float32), dim) for grad, mask, dim in entries if grad is not None and not is_sharded(grad)]
    if held:
        grads, masks, dims = zip(*held, strict=True)
        ops.mask_grads_(list(grads), list(masks), list(dims))
    for grad, mask, dim in entries:
        if grad is not None and is_sharded(grad):
            grad.masked_fill_(replicated(mask == 0, grad).unsqueeze(1 - dim), 0.0)


def is_read_by_forward(buffer: Tensor) -> bool:
    """True where each forward looks at the values of the mask, whoever wrote them."""
    return buffer.is_cpu


def settle(adapter: APTAdapter, call: str) -> None:
    """Do what `APTAdapter.settle` promises."""
    if id(adapter) not in _settled.get():
        settle_all([adapter], call, stacklevel=5)


@contextmanager
def settled(adapters: Sequence[APTAdapter], call: str) -> Iterator[None]:
    """Settle these with one wait for each device; within this context `settle` of one of them has nothing left to do."""
    settle_all(adapters, call)
    token = _settled.set(_settled.get() | {id(adapter) for adapter in adapters})
    try:
        yield
    finally:
        _settled.reset(token)


def settle_all(adapters: Sequence[APTAdapter], call: str, stacklevel: int = 3) -> None:
    """The same for several, with one wait for each device."""
    seen = [
        (adapter, name, expected)
        for adapter in adapters
        for name in SIDES
        if not is_read_by_forward(buffer := adapter.get_buffer(name))
        and not buffer.is_meta
        and (expected := adapter.placed.expected(name, buffer)) is not None
    ]
    found: dict[APTAdapter, dict[str, Mask]] = {}
    for (adapter, name, expected), values in zip(seen, all_on_host([a.get_buffer(n) for a, n, _ in seen]), strict=True):
        if not bool((values == expected).all()):
            found.setdefault(adapter, {})[name] = Mask.of(values)
    for adapter, masks in found.items():
        for name, mask in masks.items():
            adapter.note_mask(name, mask)
        adapter.packing.follow_written(adapter)
        warnings.warn(
            f"{adapter.naming(call)}: {' and '.join(masks)} was written without torch counting it (through .data, NumPy or a pointer): "
            "forward passes since then may have used the values from before, from now on the new ones are used; set_masks changes masks",
            stacklevel=stacklevel,
        )
    adopt_ranks(adapters)
