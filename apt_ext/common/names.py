"""Find modules and Parameters by their names in a model."""

from __future__ import annotations

from torch import nn


def covered(name: str, modules: list[str]) -> bool:
    """Whether the module or Parameter is one of `modules` or lies within one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def parameters_of(model: nn.Module, name: str) -> list[nn.Parameter]:
    """Return the Parameters of the module of this name, or the Parameter of this name. AttributeError if there is none."""
    owner, _, last = name.rpartition(".")
    own = model.get_submodule(owner)._parameters.get(last)
    return [own] if own is not None else list(model.get_submodule(name).parameters())
