"""`hold_pruned`: optimizer steps that leave pruned entries of the factors alone.

A pruned entry has a zero gradient, and yet weight decay, old momentum and optimizers that mix entries (Muon) move it. So each step is
bracketed: a copy before it, and after it the pruned entries back and their optimizer state at its start value.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .growth import optimizers_of, start_value, state_starts


class HoldHandle:
    """What hold_pruned registered or found registered; `remove()` ends it, for every handle of the same pairs."""

    def __init__(self, pairs: list[tuple[_Hold, nn.Module]]) -> None:
        self._pairs = pairs

    def remove(self) -> None:
        """Steps are ordinary again; a second call does nothing."""
        while self._pairs:
            hold, adapter = self._pairs.pop()
            hold.adapters.pop(adapter, None)


def hold_pruned(optimizer: object, adapters: object) -> HoldHandle:
    """From now on each step of `optimizer` leaves the pruned entries of the adapters' factors bitwise as they were.

    Pruned, by the masks when the step begins: lora_A[:, mask_in == 0] and lora_B[mask_out == 0, :], in whichever of the optimizers holds
    that Parameter. After the step their state is what the optimizer starts with (zero momentum), whatever the weight decay; of an optimizer
    unknown here, each floating state tensor of the Parameter's shape is zero there. It costs a copy of the factors during the step and
    about five small launches a factor, and waits for no device. Registered once for each optimizer and adapter: a second call adds nothing.
    A deepcopy of the optimizer does not hold.

    optimizer  a torch optimizer, accelerate's wrapper, or a list of them
    adapters   an adapter (`lora_A` [R, K], `lora_B` [N, R], `mask_in` [K], `mask_out` [N]), an iterable of them, or of (name, adapter)

    Raises TypeError for anything else; nothing is then registered.
    """
    optimizers = optimizers_of(optimizer)
    if not optimizers:
        raise TypeError(f"optimizer: expected torch's Optimizer, accelerate's wrapper or a list of them, got {optimizer!r}")
    found = _adapters_of(adapters)
    pairs = []
    for one in optimizers:
        hold = _holds.get(one)
        if hold is None:
            hold = _holds[one] = _Hold(one)
        for adapter in found:
            hold.adapters[adapter] = None
            pairs.append((hold, adapter))
    return HoldHandle(pairs)


def _adapters_of(adapters: object) -> list[nn.Module]:
    def is_adapter(thing: object) -> bool:
        return isinstance(thing, nn.Module) and all(
            isinstance(getattr(thing, name, None), Tensor) for name in ("lora_A", "lora_B", "mask_in", "mask_out")
        )

    items: list[Any] = [adapters] if is_adapter(adapters) else list(adapters) if isinstance(adapters, Iterable) else [adapters]
    found = [item[1] if isinstance(item, tuple) and len(item) == 2 else item for item in items]
    for item in found:
        if not is_adapter(item):
            raise TypeError(
                "adapters: expected an adapter (lora_A, lora_B, mask_in, mask_out), an iterable of them, or of (name, adapter) "
                f"as apt_ext.adapters(model) gives, got {type(item).__name__}"
            )
    return found


class _Hold:
    """The two hooks of one optimizer. It does not refer to the optimizer, so that `_holds` does not keep it alive."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.adapters: dict[Any, None] = {}  # an ordered set of modules
        self._before: list[tuple[nn.Parameter, dict[str, Any], Tensor, Tensor]] = []
        optimizer.register_step_pre_hook(self.copy_pruned)
        optimizer.register_step_post_hook(self.put_back)

    @torch.no_grad()
    def copy_pruned(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note (Parameter, group, where it is pruned, its copy); what a step that raised left here is replaced."""
        self._before = []
        if not self.adapters:
            return
        groups: dict[Tensor, dict[str, Any]] = {param: group for group in optimizer.param_groups for param in group["params"]}
        for adapter in self.adapters:
            for param, mask, dim in ((adapter.lora_A, adapter.mask_in, 1), (adapter.lora_B, adapter.mask_out, 0)):
                if param in groups:
                    pruned = _like(mask == 0, param).unsqueeze(1 - dim)
                    self._before.append((param, groups[param], pruned, param.detach().clone()))

    @torch.no_grad()
    def put_back(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Selected with `where` and `masked_fill_`: the number of pruned entries is never asked, so nothing waits for the device."""
        starts = state_starts(optimizer) or {}
        for param, group, pruned, before in self._before:
            param.copy_(torch.where(pruned, before, param))
            for key, value in optimizer.state.get(param, {}).items():
                if isinstance(value, Tensor) and value.shape == param.shape and value.is_floating_point():
                    start = start_value(starts.get(key, 0.0), group)
                    value.masked_fill_(pruned, start.reshape(()) if isinstance(start, Tensor) else start)
        self._before = []


def _like(mask: Tensor, param: Tensor) -> Tensor:
    """`mask` as it stands, or replicated over the mesh of a sharded Parameter (FSDP), which then selects shard by shard."""
    mesh = getattr(param, "device_mesh", None)
    if mesh is None:
        return mask
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(mask, mesh, [Replicate()] * mesh.ndim, run_check=False)


_holds: WeakKeyDictionary[Optimizer, _Hold] = WeakKeyDictionary()
