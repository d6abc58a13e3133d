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

from ..distributed.dtensor import replicated
from .initial_state import optimizers_of, start_value, state_starts


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
    A deepcopy of the optimizer does not hold. Under DDP and FSDP2 as without; a step while FSDP2 has a factor gathered raises RuntimeError
    before anything moves, and so does one of FSDP1 or ZeRO, which step pieces.

    optimizer  a torch optimizer, accelerate's wrapper, or a list of them
    adapters   an adapter (`lora_A` [R, K], `lora_B` [N, R], `mask_in` [K], `mask_out` [N]), an iterable of them, or of (name, adapter)

    Raises TypeError for anything else, ValueError for no adapter at all; nothing is then registered.
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
            hold.add(adapter, one)
            pairs.append((hold, adapter))
    return HoldHandle(pairs)


def _adapters_of(adapters: object) -> list[nn.Module]:
    def is_adapter(thing: object) -> bool:
        return isinstance(thing, nn.Module) and all(
            isinstance(getattr(thing, name, None), Tensor) for name in ("lora_A", "lora_B", "mask_in", "mask_out")
        )

    if isinstance(adapters, Tensor):
        adapters = [adapters]  # it is no iterable of adapters, whatever its shape
    items: list[Any] = [adapters] if is_adapter(adapters) else list(adapters) if isinstance(adapters, Iterable) else [adapters]
    found = [item[1] if isinstance(item, tuple) and len(item) == 2 else item for item in items]
    if not found:
        raise ValueError("adapters: expected at least one, got none (an iterator that was used up is empty)")
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
        self.adapters: dict[Any, set[str]] = {}  # which of an adapter's factors the optimizer holds
        self._before: list[tuple[nn.Parameter, dict[str, Any], Tensor, Tensor]] = []
        optimizer.register_step_pre_hook(self.copy_pruned)
        optimizer.register_step_post_hook(self.put_back)

    def add(self, adapter: nn.Module, optimizer: Optimizer) -> None:
        held = {param for group in optimizer.param_groups for param in group["params"]}
        self.adapters.setdefault(adapter, set()).update(name for name in ("lora_A", "lora_B") if getattr(adapter, name) in held)

    @torch.no_grad()
    def copy_pruned(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note (Parameter, group, where it is pruned, its copy); what a step that raised left here is replaced."""
        self._before = []
        if not self.adapters:
            return
        groups: dict[Tensor, dict[str, Any]] = {param: group for group in optimizer.param_groups for param in group["params"]}
        before = []
        for adapter, held in self.adapters.items():
            for name, mask, dim in (("lora_A", adapter.mask_in, 1), ("lora_B", adapter.mask_out, 0)):
                param = getattr(adapter, name)
                if param in groups:
                    if param.dim() != 2 or param.shape[dim] != len(mask):
                        raise RuntimeError(
                            f"hold_pruned: {name} has shape {tuple(param.shape)}, expected {len(mask)} entries along dimension {dim}: "
                            "a wrapper steps pieces of it, which masks do not fit"
                        )
                    held.add(name)
                    pruned = replicated(mask == 0, param).unsqueeze(1 - dim)
                    before.append((param, groups[param], pruned, param.detach().clone()))
                elif name in held:
                    raise RuntimeError(
                        f"hold_pruned: {type(optimizer).__name__} does not hold the present {name}; if FSDP2 has it gathered, call "
                        "reshard() before step(), and if it was replaced, make a new optimizer and hold that"
                    )
        self._before = before

    @torch.no_grad()
    def put_back(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Selected with `where` and `masked_fill_`: the number of pruned entries is never asked, so nothing waits for the device."""
        starts = state_starts(optimizer) or {}
        for param, group, pruned, before in self._before:
            param.copy_(torch.where(pruned, before, param))
            for key, value in optimizer.state.get(param, {}).items():
                if isinstance(value, Tensor) and value.shape == param.shape and value.is_floating_point():
                    start = start_value(starts.get(key, 0.0), optimizer, group)
                    value.masked_fill_(pruned, start.reshape(()) if isinstance(start, Tensor) else start)
        self._before = []


_holds: WeakKeyDictionary[Optimizer, _Hold] = WeakKeyDictionary()
