"""A hook before every optimizer step: what an optimizer keeps for a Parameter of an adapter must fit it, or the step is refused.

    guard      refuses a step while state or gradient have another shape than the Parameter
    reserve    keeps rows that max_rank reserves free of old momentum
    stale      the words of the refusal

Fused steps read and write as many entries as the Parameter has, whatever the state has: without this they leave their memory. Shapes are
host data, so the hook launches nothing and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..distributed.dtensor import replicated
from .initial_state import start_value, state_starts

_FORMER = "_apt_former_shapes"  # on a guarded Parameter: tuple of the shapes that it has had
_IN_USE = "_apt_in_use"  # on a Parameter with reserved storage: (dimension, entries in use along it)

in_closure: ContextVar[bool] = ContextVar("apt_ext.guard.in_closure", default=False)  # an optimizer is running its closure
_hooked = False
_lowered = 0  # how often reserved storage has come to hold less
# Of each optimizer the state whose reserved entries are known to be as at the start, and `_lowered` at that time.
_settled: WeakKeyDictionary[Optimizer, tuple[Any, int]] = WeakKeyDictionary()


def guard(*params: nn.Parameter) -> None:
    """From now on no optimizer steps while its state or the gradient of one of `params` has another shape than the Parameter.

    Such a step raises RuntimeError before anything changed. Deepcopy drops the mark, so call it again on the copy. Of an unknown optimizer
    only state with a shape that the Parameter has had is refused. What an open autocast has cast of any Parameter is cast anew.
    """
    global _hooked
    torch.clear_autocast_cache()  # of the old size or rank, and kept until its context ends
    for param in params:
        former = getattr(param, _FORMER, ())
        setattr(param, _FORMER, tuple(dict.fromkeys((*former, tuple(param.shape)))))
    if not _hooked:
        register_optimizer_step_pre_hook(_before_step)
        _hooked = True


def is_guarded(param: Tensor) -> bool:
    """Whether `param` is one that an adapter made, and not what a wrapper has put in its place."""
    return hasattr(param, _FORMER)


def reserve(param: nn.Parameter, dim: int, in_use: int) -> None:
    """The entries of a guarded `param` at and above `in_use` along `dim` are zero and stay zero under any optimizer.

    Their gradient is zero, so only momentum from a time when they were in use could move them: where fewer are in use than before, and
    where an optimizer has a new state (load_state_dict), the next step first sets their state to what the optimizer starts with.
    """
    global _lowered
    before = getattr(param, _IN_USE, (dim, in_use))[1]
    setattr(param, _IN_USE, (dim, in_use))
    if in_use < before:
        _lowered += 1
        if param.grad is not None:
            param.grad.masked_fill_(_reserved(param, param.grad), 0.0)


def _reserved(param: nn.Parameter, like: Tensor) -> Tensor:
    """[R, 1] or [1, R] bool: where `param` is reserved and not in use."""
    dim, in_use = getattr(param, _IN_USE)
    reserved = torch.arange(param.shape[dim], device=like.device) >= in_use
    return replicated(reserved, like).unsqueeze(1 - dim)


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    guarded = [(param, group) for group in optimizer.param_groups for param in group["params"] if hasattr(param, _FORMER)]
    if not guarded:
        return None
    _refuse_stale(optimizer, guarded)
    if any(hasattr(param, _IN_USE) for param, _ in guarded):
        _settle(optimizer, guarded)
    if len(args) > 1 and callable(args[1]):
        return (args[0], _watched(args[1], optimizer, guarded), *args[2:]), kwargs
    if callable(kwargs.get("closure")):
        return args, {**kwargs, "closure": _watched(kwargs["closure"], optimizer, guarded)}
    return None


def _watched(closure: Callable[[], Any], optimizer: Optimizer, guarded: list[tuple[nn.Parameter, dict[str, Any]]]) -> Callable[[], Any]:
    """`closure`, after which the gradients must still fit: it runs inside the step, so the hook has looked too early."""

    def watched() -> Any:
        token = in_closure.set(True)
        try:
            loss = closure()
        finally:
            in_closure.reset(token)
        _refuse_stale(optimizer, guarded)
        return loss

    return watched


def _refuse_stale(optimizer: Optimizer, guarded: list[tuple[nn.Parameter, dict[str, Any]]]) -> None:
    starts = state_starts(optimizer)
    for param, _ in guarded:
        grad = param.grad
        if grad is not None and grad.shape != param.shape:
            raise RuntimeError(stale(optimizer, "grad", grad, param))
        for key, value in optimizer.state.get(param, {}).items():
            if not isinstance(value, Tensor) or value.shape == param.shape:
                continue
            if key in starts if starts is not None else _has_former_shape(value.shape, param.shape, getattr(param, _FORMER)):
                raise RuntimeError(stale(optimizer, key, value, param))


@torch.no_grad()
def _settle(optimizer: Optimizer, guarded: list[tuple[nn.Parameter, dict[str, Any]]]) -> None:
    """Give reserved entries the state that the optimizer starts with; of an unknown one, 0 in floating tensors of the Parameter's shape."""
    state, lowered = _settled.get(optimizer, (None, 0))
    if state is optimizer.state and lowered == _lowered:
        return
    starts = state_starts(optimizer) or {}
    for param, group in guarded:
        if not hasattr(param, _IN_USE):
            continue
        for key, value in optimizer.state.get(param, {}).items():
            if isinstance(value, Tensor) and value.shape == param.shape and value.is_floating_point():
                start = start_value(starts.get(key, 0.0), optimizer, group)
                value.masked_fill_(_reserved(param, value), start.reshape(()) if isinstance(start, Tensor) else start)
    _settled[optimizer] = optimizer.state, _lowered


def _has_former_shape(shape: Sequence[int], now: Sequence[int], former: Iterable[Sequence[int]]) -> bool:
    """Whether a state tensor fits a former shape of its Parameter but not the one `now`; a size of 1 fits (Adafactor's means)."""

    def fits(target: Sequence[int]) -> bool:
        return len(shape) == len(target) and all(n in (1, m) for n, m in zip(shape, target, strict=True))

    return not fits(now) and any(map(fits, former))


def stale(optimizer: Optimizer, key: str, value: Any, param: nn.Parameter) -> str:
    """The message for state or a gradient that does not have its Parameter's shape."""
    what, remedy = (
        ("the gradient", "it comes from a graph built before the Parameter changed size: call zero_grad() and run the backward again")
        if key == "grad"
        else (f"state {key!r}", "pass the optimizer to the call that changes the size (increase_rank, cut), or make a new one")
    )
    shape = tuple(getattr(value, "shape", ()))
    return f"{type(optimizer).__name__}: {what} has shape {shape}, expected the Parameter's {tuple(param.shape)}; {remedy}"
