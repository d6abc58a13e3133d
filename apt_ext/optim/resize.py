"""Parameters that change size while they train, and the optimizers that hold them.

    resize_parameters    values, gradients and optimizer state change size together, or nothing changes
    resizable_state      the optimizer state that this changes; every refusal that does not depend on the new size
    wrapper_of           what data-parallel wrapper holds one of some Parameters
    one_search           lets many changes search for wrappers once
    refuse_gathered      and refuse_pieces: a Parameter that a wrapper has put in the place of the adapter's own
    draw_rows            Gaussian rows, the same on every rank of a process group
    write_rows           puts them into reserved storage, also where FSDP2 has sharded it
    rank_of              the rank that factors in reserved storage have, whatever somebody says

Why `Tensor.set_`: it keeps the Parameter's identity, hooks and requires_grad, gives the next graph the new shape, and moves the version
counter, so that a backward through a graph that saved the old value is an error in words. Assigning `.data` moves nothing: gradients of
the old shape appear, and a fused step then reads past their end.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from ..common.checks import all_on_host
from ..common.log import advise
from ..distributed import agreement
from ..distributed.dtensor import is_sharded, replicated
from .initial_state import SHARED, optimizers_of, start_value, state_starts
from .step_guard import guard, in_closure, is_guarded, stale

# Within `one_search`: the living wrappers, once they were searched for.
_known: ContextVar[list[list[nn.Module]] | None] = ContextVar("apt_ext.resize.known", default=None)


@dataclass(frozen=True, eq=False)
class Resize:
    """One dimension of one Parameter takes a new size.

    value  the complete new value, any floating dtype and device; copied, converted to the Parameter's
    dim    the dimension whose size changes
    keep   integer tensor [kept], the old indices along `dim` that survive, in their new order; None: all of them. What lies behind the
           survivors is new, and its gradient and optimizer state start from the beginning.
    fresh  nobody else holds `value`, so the Parameter may take its memory instead of a copy

    A Parameter that changes along several dimensions has one Resize for each, all with the same `value`.
    """

    param: nn.Parameter
    value: Tensor
    dim: int
    keep: Tensor | None = None
    fresh: bool = False


def resize_parameters(changes: Sequence[Resize], optimizer: object | None = None) -> None:
    """Give each Parameter its new value, and its `.grad` and optimizer state the new size with it.

    Identity, hooks and requires_grad stay. The gradient of new entries is zero, their optimizer state is what the optimizer itself starts
    with; of old entries both are kept bitwise, and so is what a Parameter shares (`step`). All of it is checked and allocated before the
    first change. Each resized Parameter is guarded (see `guard`).

    A graph built before and run backward after is refused by torch if it saved the Parameter. If it did not, its gradient has the old
    shape: the guard refuses the next step, or torch the sum with `.grad`; but a dimension of size 1 broadcasts into a grown `.grad` unseen.
    So the backward of whatever uses a resizable Parameter saves it.

    Raises TypeError (types), ValueError (shapes, dim, keep), RuntimeError (see resizable_state); everything is then as it was.
    """
    by_param: dict[nn.Parameter, list[Resize]] = {}
    for change in changes:
        if not isinstance(change, Resize):
            raise TypeError(f"changes: expected Resize, got {type(change).__name__}")
        by_param.setdefault(change.param, []).append(change)
    entries = resizable_state(list(by_param), optimizer)
    # Ordinary tensors, whatever mode the caller is in: an inference tensor could never be trained.
    with torch.inference_mode(False), torch.no_grad():
        values: list[tuple[nn.Parameter, Tensor, Tensor | None]] = []
        for param, steps in by_param.items():
            _check_steps(param, steps)
            value = _taken(param, steps[-1])
            values.append((param, value, None if param.grad is None else _carried(param.grad, steps, 0.0)))
        states = [(state, key, _carried(state[key], by_param[param], start)) for param, state, key, start in entries]

        # From here on nothing is allocated and nothing can be refused.
        for param, value, grad in values:
            guard(param)
            param.set_(value)  # type: ignore[call-overload]
            param.grad = grad
        for state, key, tensor in states:
            state[key] = tensor


def _taken(param: nn.Parameter, step: Resize) -> Tensor:
    value = step.value
    takes = step.fresh and value.dtype == param.dtype and value.device == param.device and not value.is_inference()
    return value if takes else param.new_empty(value.shape).copy_(value)


def _check_steps(param: nn.Parameter, steps: list[Resize]) -> None:
    """ValueError or TypeError unless the changes of one Parameter describe one new value."""
    expected = list(param.shape)
    for step in steps:
        dim, value, keep = step.dim, step.value, step.keep
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout is not torch.strided:
            raise TypeError(f"value: expected a dense floating tensor, got {getattr(value, 'dtype', type(value).__name__)}")
        if value.dim() != param.dim() or not 0 <= dim < param.dim():
            raise ValueError(f"dim: expected a dimension of value {tuple(value.shape)} and Parameter {tuple(param.shape)}, got {dim}")
        if value is not steps[0].value or [s.dim for s in steps].count(dim) > 1:
            raise ValueError("changes: expected one value for each Parameter and one Resize for each of its dimensions, got more")
        size, kept = param.shape[dim], param.shape[dim]
        if keep is not None:
            if not isinstance(keep, Tensor) or keep.dim() != 1 or keep.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"keep: expected an integer tensor of one dimension, got {keep!r}")
            kept = keep.numel()
            if kept and not 0 <= int(keep.min()) <= int(keep.max()) < size:
                raise ValueError(f"keep: expected indices of {size} old entries, got {int(keep.min())} to {int(keep.max())}")
        expected[dim] = value.shape[dim]
        if value.shape[dim] < kept:
            raise ValueError(f"value: expected at least the {kept} kept entries along dimension {dim}, got {value.shape[dim]}")
    if tuple(steps[0].value.shape) != tuple(expected):
        raise ValueError(f"value: expected shape {tuple(expected)}, got {tuple(steps[0].value.shape)}")


def _carried(old: Tensor, steps: list[Resize], start: Any) -> Tensor:
    """`old` with its kept entries first and `start` behind them, along the dimension of each step."""
    for step in steps:
        kept = old if step.keep is None else old.index_select(step.dim, step.keep.to(old.device))
        shape = list(old.shape)
        shape[step.dim] = step.value.shape[step.dim]
        old = old.new_full(shape, float(start))
        old.narrow(step.dim, 0, kept.shape[step.dim]).copy_(kept)
    return old


def resizable_state(params: Sequence[nn.Parameter], optimizer: object | None = None) -> list[tuple[nn.Parameter, dict[str, Any], str, Any]]:
    """(Parameter, its state, key, start value) of each state tensor that changes size with one of `params`; changes nothing.

    Raises what resize_parameters raises whatever the new size, so a caller that draws random values asks first and leaves its generator
    alone: TypeError (not a dense Parameter, not an optimizer) and RuntimeError (within an optimizer's closure; an inference tensor; `.grad`
    or state of another shape; held by DDP, FSDP or DeepSpeed, or a DTensor; an optimizer that is unknown and has state, or that keeps state
    of an unknown name).
    """
    if in_closure.get():
        raise RuntimeError(
            "param: expected to change size between steps, got a change within an optimizer's closure, that is, within a step"
        )
    for param in params:
        if not isinstance(param, nn.Parameter) or param.layout is not torch.strided:
            raise TypeError(f"param: expected a dense nn.Parameter, got {type(param).__name__}")
        if param.is_inference():
            raise RuntimeError("param: expected a trainable Parameter, got one made in inference mode, which cannot change")
        if param.grad is not None and (param.grad.shape != param.shape or param.grad.layout is not torch.strided):
            got = f"{param.grad.layout} of shape {tuple(param.grad.shape)}"
            raise RuntimeError(f"param: expected a dense .grad of the Parameter's shape {tuple(param.shape)}, got {got}; call zero_grad()")
    if (wrapper := wrapper_of(params)) is not None:
        raise RuntimeError(
            f"param: expected a Parameter that no wrapper holds, got one held by {wrapper}, which would go on with the old storage. "
            "Reserve the rows from the start with max_rank, or delete the wrapper, resize, and wrap again"
        )
    entries = []
    wanted = set(params)
    for one in optimizers_of(optimizer):
        starts, name = state_starts(one), type(one).__name__
        for group in one.param_groups:
            for param in wanted.intersection(group["params"]):
                # An unknown optimizer may keep what belongs to one Parameter under another (LBFGS does): any state refuses.
                if starts is None and one.state:
                    raise RuntimeError(f"optimizer: the state of {name} cannot be resized safely; resize without it and make a new one")
                state = one.state.get(param, {})
                for key, value in state.items():
                    if key in SHARED or value is None:
                        continue
                    if starts is None or key not in starts:
                        raise RuntimeError(f"optimizer: {name} keeps the state {key!r} of no known start value; make a new optimizer")
                    if not isinstance(value, Tensor) or value.shape != param.shape:
                        raise RuntimeError(stale(one, key, value, param))
                    entries.append((param, state, key, start_value(starts[key], one, group)))
    return entries


def refuse_gathered(param: Tensor, call: str) -> None:
    """RuntimeError where `param` stands in for FSDP2's sharded one (from all-gather to reshard), as writes there are lost."""
    # Every Parameter that an adapter made is marked, so only what somebody else put there is searched for.
    if not is_guarded(param) and not is_sharded(param) and (wrapper := wrapper_of([param])) is not None:
        raise RuntimeError(
            f"{call}: {wrapper} has the Parameter gathered at present, and what is written into it would be lost; "
            "do it after backward(), or call reshard() on the module given to fully_shard first"
        )


def refuse_pieces(param: Tensor, shape: tuple[int, ...]) -> None:
    """RuntimeError unless `param` has the shape that its adapter reserved: FSDP1 and ZeRO put pieces in its place."""
    if tuple(param.shape) != shape:
        raise RuntimeError(
            f"increase_rank: expected reserved storage of shape {shape}, got {tuple(param.shape)}: a wrapper holds it in pieces"
        )


def wrapper_of(params: Sequence[Tensor]) -> str | None:
    """The class name of a living data-parallel wrapper that holds one of `params`, or None.

    A wrapper leaves no mark on a Parameter that Python can see, so the living objects are searched: some 0.1 s, for a rare event, and only
    where a process group exists.
    """
    if not params or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    if any(map(is_sharded, params)):
        return "FSDP or tensor parallelism (a DTensor)"
    wrappers: tuple[type, ...] = (DistributedDataParallel, FullyShardedDataParallel, FSDPModule)
    if (engine := getattr(sys.modules.get("deepspeed"), "DeepSpeedEngine", None)) is not None:
        wrappers += (engine,)
    wanted = set(map(id, params))

    def living() -> list[nn.Module]:
        # type(), not isinstance: asking a proxy for its class may run its code
        return [thing for thing in gc.get_objects() if issubclass(type(thing), wrappers)]

    def holder(found: list[nn.Module]) -> str | None:
        return next((type(one).__name__ for one in found if not wanted.isdisjoint(map(id, one.parameters()))), None)

    known = _known.get()
    if known is None:
        known = []
    if not known:
        known.append(living())
    if holder(known[0]) is None:
        return None
    known.clear()
    gc.collect()  # a deleted wrapper may still await it: only one that survives counts
    return holder(living())


@contextmanager
def one_search() -> Iterator[None]:
    """Within this context wrappers are searched for once, however many Parameters change: none is made meanwhile."""
    token = _known.set([])
    try:
        yield
    finally:
        _known.reset(token)


def write_rows(param: nn.Parameter, rows: Tensor, start: int) -> None:
    """param[start : start + len(rows)] = rows, in place; of a DTensor every rank gives the same rows and writes what it holds of them."""
    if not is_sharded(param):
        param[start : start + len(rows)].copy_(rows)
        return
    new = torch.zeros(param.shape[0], 1, dtype=torch.bool, device=rows.device)
    new[start : start + len(rows)] = True
    whole = rows.new_zeros(param.shape)
    whole[start : start + len(rows)] = rows
    # A slice of a DTensor along its sharded dimension is a copy, so a write into it would be lost.
    param.copy_(torch.where(replicated(new, param), replicated(whole, param), param))


def rank_of(A: Tensor, B: Tensor, least: int) -> int:
    """The last row of A [C, K] or column of B [N, C] that is not zero, counted from 1; `least` where none at or above it is.

    Waits for the device once. Of tensors without values (meta, a transform) and of sharded ones, `least`.
    """
    return ranks_of([(A, B, least)])[0]


def ranks_of(factors: Sequence[tuple[Tensor, Tensor, int]]) -> list[int]:
    """`rank_of` each, with one wait for each device."""
    found = [least for _, _, least in factors]
    asked = [i for i, (A, B, least) in enumerate(factors) if _has_values(A) and _has_values(B) and least < len(A)]
    with torch.inference_mode(False), torch.no_grad():
        used = [
            (A.detach()[least:] != 0).any(1) | (B.detach()[:, least:] != 0).any(0).to(A.device)
            for A, B, least in (factors[i] for i in asked)
        ]
        for i, host in zip(asked, all_on_host(used), strict=True):
            places = host.nonzero()
            found[i] += int(places[-1]) + 1 if len(places) else 0
    return found


def say_adopted(what: str, before: int, now: int) -> None:
    """Say that an adapter takes another rank."""
    advise(
        "rank",
        "%s: %d from now on instead of %d, since rows of lora_A or columns of lora_B above it are not zero: tensors of a grown "
        "adapter were copied into it without its rank. Others that this happens to are logged on the level INFO",
        what,
        now,
        before,
    )


def _has_values(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.dim() == 2
    return plain and not tensor.is_meta and not is_functorch_wrapped_tensor(tensor)


def draw_rows(
    rows: int, columns: int, std: float, generator: torch.Generator | None, device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    """Gaussian [rows, columns] of standard deviation `std`, drawn in float32 (float64 for float64) and rounded once to `dtype`.

    Drawn where the generator lives. In a process group every rank draws, so that generators stay in step, and takes rank 0's rows: it is
    then a collective, and every rank must call it with one shape, which `agreement` sees to.
    """
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    source = torch.device(device) if generator is None else generator.device
    drawn = torch.empty(rows, columns, device=source, dtype=exact).normal_(0.0, std, generator=generator)
    distributed = torch.distributed
    if agreement.ranks() > 1 and not drawn.is_meta:
        # "cpu:gloo,cuda:nccl": the devices that the group can send from
        able = [part.split(":")[0] for part in distributed.get_backend_config().split(",")]
        drawn = drawn.to(drawn.device if drawn.device.type in able else able[0])
        distributed.broadcast(drawn, src=0)
    return drawn.to(device=device, dtype=dtype)
