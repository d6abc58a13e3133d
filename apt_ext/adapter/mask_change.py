"""Change an adapter's masks, and notice what others wrote into them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..common.checks import on_host
from .mask import SIDES, Mask

if TYPE_CHECKING:
    from .layer import APTAdapter


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


def is_read_by_forward(buffer: Tensor) -> bool:
    """True where each forward looks at the values of the mask, whoever wrote them."""
    return buffer.is_cpu


def settle(adapter: APTAdapter, call: str) -> None:
    """Do what `APTAdapter.settle` promises."""
    found: dict[str, Mask] = {}
    for name in SIDES:
        buffer = adapter.get_buffer(name)
        if not buffer.is_meta and not is_read_by_forward(buffer):
            expected, values = adapter.placed.expected(name, buffer), on_host(buffer)
            if expected is not None and not bool((values == expected).all()):
                found[name] = Mask.of(values)
    for name, mask in found.items():
        adapter.note_mask(name, mask)
    if found:
        if adapter.packing.current is not None:
            adapter.packing.change(adapter, {})()
        warnings.warn(
            f"{adapter.naming(call)}: {' and '.join(found)} was written without torch counting it (through .data, NumPy or a pointer): "
            "forward passes since then may have used the values from before, from now on the new ones are used; set_masks changes masks",
            stacklevel=4,
        )
    adapter.adopt_rank()
