"""Modules that train whole in float32 within a 16-bit model: values are cast where they enter and leave.

A door is a pair of hooks on a module all of whose values train: its inputs are cast to the dtype of its Parameters, its
outputs back to the model's. Another module that holds such a Parameter (one that trains alone, or is tied) is lent a copy
of it in the model's dtype while it computes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..common.checks import all_on_host
from ..common.names import covered, parameters_of
from .architectures.lookup import stored

_HALF = (torch.float16, torch.bfloat16)
_CARRIER = "base_layer."  # what carriers of masks put into the names of what they carry


class Hook:
    """One of ours on a module: `names` are its values that had `dtype`, as named without carriers."""

    def __init__(self, dtype: torch.dtype, names: frozenset[str]) -> None:
        self.dtype, self.names = dtype, names


class Enter(Hook):
    """A forward pre-hook of a door: floating inputs get the dtype that the Parameters have now."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments to compute with."""
        dtype = next(p.dtype for p in module.parameters() if p.is_floating_point() and p.numel())
        return _cast(args, dtype), _cast(kwargs, dtype)


class Leave(Hook):
    """A forward hook of a door: floating outputs get the model's dtype."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The output to hand on."""
        return _cast(output, self.dtype)


class Lend(Hook):
    """A forward pre-hook: until TakeBack, attributes of these names are the Parameters in the model's dtype."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Attributes of the instance come before Parameters, which nn.Module looks up last."""
        for name in self.names:
            parameter = module._parameters[name]
            assert parameter is not None
            vars(module)[name] = parameter.to(self.dtype)


class TakeBack(Hook):
    """A forward hook that ends what Lend began, also after an error."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Only the copies go."""
        for name in self.names:
            vars(module).pop(name, None)


def train_in_float32(model: nn.Module, saved: Iterable[str]) -> None:
    """Make the 16-bit values of modules and lone Parameters `saved` float32, so that no other module notices.

    `narrowing` undoes it.
    """
    names = list(saved)
    outer = [name for name in names if not covered(name, [other for other in names if other != name])]
    modules = dict(model.named_modules())
    was: dict[int, torch.dtype] = {}  # of the Parameters that were 16-bit
    for name in outer:
        for parameter in parameters_of(model, name):
            if parameter.dtype in _HALF:
                was[id(parameter)] = parameter.dtype
                parameter.data = parameter.data.float()
    inside: set[int] = set()
    for name in outer:
        if name in modules:
            inside |= {id(module) for module in modules[name].modules()}
            _open_door(stored(modules[name]), was)
    for module in model.modules():
        own = {name: was[id(p)] for name, p in module._parameters.items() if p is not None and id(p) in was}
        if own and id(module) not in inside:
            alone = len(own) == len(list(module.parameters())) and not list(module.children())
            _open_door(module, was) if alone else _lend(module, own)


def narrowing(model: nn.Module, check: bool = True) -> Callable[[], None]:
    """Prepare to give the values their own dtype back and to take the hooks away; calling the result does it.

    Nothing is changed here, and the call allocates nothing: it takes the values that are there by then. RuntimeError names a
    value that would not be finite, with `check`.
    """
    found = list(_hooks(model))
    narrowed: dict[int, tuple[str, Tensor, Tensor]] = {}  # by id: {name, value, what it will be}
    for prefix, module, _, hook in found:
        if not isinstance(hook, Leave | Lend):
            continue
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            if name.replace(_CARRIER, "") in hook.names and id(value) not in narrowed:
                narrowed[id(value)] = f"{prefix}{name}", value, value.data.to(hook.dtype, copy=True)
    checked = [entry for entry in narrowed.values() if check and not entry[1].is_meta]
    finite = all_on_host([torch.isfinite(to).all().view(1) for _, _, to in checked])
    for (name, _, to), answer in zip(checked, finite, strict=True):
        if not bool(answer):
            raise RuntimeError(f"{name}: expected values that {to.dtype} can hold, got some beyond it")

    def narrow() -> None:
        for _, value, to in narrowed.values():
            to.copy_(value.data)
            value.data = to
        for _, module, handle, _ in found:
            for registry in (module._forward_pre_hooks, module._forward_hooks):
                registry.pop(handle, None)  # one number is of one hook
            for known in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_always_called):
                known.pop(handle, None)

    return narrow


def follow(model: nn.Module, move: Callable[[Tensor], Tensor]) -> None:
    """From now on the old dtype is what `move`, which was applied to all values of `model`, makes of it."""
    for _, _, _, hook in _hooks(model):
        hook.dtype = move(torch.empty(0, dtype=hook.dtype)).dtype


def through_door(module: nn.Module, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """`compute(x)`, which stands for a call of `module`, with the casts of its door if it has one."""
    leave = next((hook for hook in module._forward_hooks.values() if isinstance(hook, Leave)), None)
    if leave is None:
        return compute(x)
    (entered,), _ = Enter(leave.dtype, leave.names)(module, (x,), {})
    return leave(module, (x,), compute(entered))  # type: ignore[no-any-return]


@contextmanager
def hooks_aside(module: nn.Module) -> Iterator[None]:
    """Within this context the module has none of our hooks; they work on, for what is put around it calls it."""
    registries = (module._forward_pre_hooks, module._forward_hooks)
    before = [registry.copy() for registry in registries]
    try:
        for registry in registries:
            for key in [key for key, hook in registry.items() if isinstance(hook, Hook)]:
                del registry[key]
        yield
    finally:
        for registry, all_of_them in zip(registries, before, strict=True):
            registry.clear()
            registry.update(all_of_them)


def _open_door(module: nn.Module, was: Mapping[int, torch.dtype]) -> None:
    dtypes = {name: was[id(p)] for name, p in module.named_parameters(remove_duplicate=False) if id(p) in was}
    if not dtypes:
        return
    dtype = next(iter(dtypes.values()))
    buffers = [name for name, buffer in module.named_buffers() if buffer.dtype in _HALF]
    for name in buffers:
        buffer = module.get_buffer(name)
        buffer.data = buffer.data.float()
    names = frozenset(name.replace(_CARRIER, "") for name in (*dtypes, *buffers))
    module.register_forward_pre_hook(Enter(dtype, names), with_kwargs=True)
    module.register_forward_hook(Leave(dtype, names))


def _lend(module: nn.Module, own: Mapping[str, torch.dtype]) -> None:
    names, dtype = frozenset(own), next(iter(own.values()))
    module.register_forward_pre_hook(Lend(dtype, names))
    module.register_forward_hook(TakeBack(dtype, names), always_call=True)


def _hooks(model: nn.Module) -> Iterator[tuple[str, nn.Module, int, Hook]]:
    """(beginning of the names of its values, module, number in its registry, hook) of each of ours."""
    for name, module in model.named_modules():
        for registry in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in registry.items():
                if isinstance(hook, Hook):
                    yield f"{name}." if name else "", module, key, hook


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """`value` with its float32 and 16-bit tensors in `dtype`; in tuples, lists and mappings too."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.dtype in (*_HALF, torch.float32) else value
    if type(value) is dict:
        return {key: _cast(entry, dtype) for key, entry in value.items()}
    if isinstance(value, Mapping):
        other: Any = copy.copy(value)
        for key, entry in value.items():
            other[key] = _cast(entry, dtype)
        return other
    if isinstance(value, tuple | list):
        entries = [_cast(entry, dtype) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    return value
