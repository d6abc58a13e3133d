"""Take modules out of the wrappers of `torch.compile`, which would become part of every name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module inside a `torch.compile` wrapper, or the module itself; wrappers within it stay."""
    inner = module._modules["_orig_mod"] if _is_wrapper(module) else module
    assert inner is not None
    return inner


@dataclass(frozen=True)
class Unwrapped:
    """A model without wrappers.

    module   what was inside the model's own wrapper, or the model itself
    restore  puts the wrappers within it back
    note     what to say of it to the user; "" where there were none
    """

    module: nn.Module
    restore: Callable[[], None]
    note: str


def unwrap(model: nn.Module) -> Unwrapped:
    """Take every `torch.compile` wrapper away, in place but for the model's own.

    A module that was compiled in place, by `module.compile()`, has no wrapper and stays as it is.
    """
    root = uncompiled(model)
    places = [
        (parent, name, child)
        for parent in root.modules()
        if not _is_wrapper(parent)
        for name, child in parent._modules.items()
        if child is not None and _is_wrapper(child)
    ]
    for parent, name, child in places:
        parent._modules[name] = uncompiled(child)

    def restore() -> None:
        for parent, name, child in places:
            parent._modules[name] = child

    what = "the model was" if root is not model else f"{len(places)} of its modules were"
    note = (
        f"model: {what} wrapped by torch.compile, and the modules inside are taken; compile the APTModel instead: torch.compile(apt_model)"
    )
    return Unwrapped(root, restore, note if root is not model or places else "")


def _is_wrapper(module: nn.Module) -> bool:
    """By name: importing torch._dynamo takes seconds."""
    return type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules
