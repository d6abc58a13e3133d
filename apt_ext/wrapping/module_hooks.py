"""Hooks of one module that its copies do not have, and that notice whether it is compiled."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling

# The registries of nn.Module that hold a hook, or what torch knows of it, under one number.
_REGISTRIES = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


class ModuleHook:
    """Call `call` with what torch gives a forward hook or forward pre-hook of `module`.

    In a compiled model the call is made between graphs. A copy of the module (deepcopy, pickle, torch.save)
    takes its hooks along. A copied hook calls nothing. `drop_copied_hooks` removes it. Where nobody called
    that, it removes itself at its first call.
    """

    def __init__(self, module: nn.Module | None = None, call: Callable[..., None] | None = None) -> None:
        self._module = None if module is None else weakref.ref(module)
        self._call = call
        self._between_graphs = torch.compiler.disable(self._take_compiled)  # type: ignore[no-untyped-call]

    def __call__(self, module: nn.Module, *inputs: Any) -> None:
        if self._call is not None:
            # The wrapper takes as long as the call.
            (self._between_graphs if is_compiling() else self._take)(module, *inputs)
        elif not is_compiling():
            drop_copied_hooks(module)

    def _take(self, module: nn.Module, *inputs: Any) -> None:
        if self._call is not None and self._module is not None and module is self._module():
            self._call(module, *inputs)

    def _take_compiled(self, module: nn.Module, *inputs: Any) -> None:
        _met_the_compiler.add(module)
        self._take(module, *inputs)

    def belongs_to(self, module: nn.Module) -> bool:
        """True for the hook of this very module; False for a copied one."""
        return self._module is not None and self._module() is module

    def __reduce__(self) -> tuple[type[ModuleHook], tuple[()]]:
        return ModuleHook, ()


_met_the_compiler: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def is_compiled(model: nn.Module) -> bool:
    """Return True if `model` or a module within it is compiled, as far as is known.

    torch.compile(model) leaves no trace in the model itself. It is known from the first compiled call of a
    module with a ModuleHook on.
    """
    return any(map(_is_compiled, model.modules()))


def _is_compiled(module: nn.Module) -> bool:
    wrapped = "_orig_mod" in module._modules
    return wrapped or module._compiled_call_impl is not None or module in _met_the_compiler


def drop_copied_hooks(model: nn.Module) -> None:
    """Remove the ModuleHooks that came with a copy from all modules of `model`. Every other hook stays."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            ours = {key: hook for key, hook in hooks.items() if isinstance(hook, ModuleHook)}
            for key in [key for key, hook in ours.items() if not hook.belongs_to(module)]:
                for registry in _REGISTRIES:
                    getattr(module, registry).pop(key, None)
