"""Which values of a model `from_pretrained` drew at random, because its checkpoint did not hold them."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from ..common.names import covered

# transformers sets it on every Parameter that it loads or ties, and keeps no other report on the model.
_LOADED = "_is_hf_initialized"
# Expressions for names that transformers leaves out of its report: nothing uses their values, or they are not random.
_NO_MATTER = "_keys_to_ignore_on_load_missing"


def drawn_anew(model: nn.Module) -> list[str]:
    """Return the names of the smallest modules that hold Parameters which `from_pretrained` drew anew.

    A tied weight is none. Where such a module holds other weights too, in modules within it or tied to others, the
    Parameter is named instead.
    Empty where nothing was drawn, and where the model carries no report: one made from a config, a deep copy, another transformers.
    """
    parameters = dict(model.named_parameters())
    if not any(getattr(parameter, _LOADED, False) for parameter in parameters.values()):
        return []
    ignored = _ignored(model)
    drawn = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.is_floating_point() and not getattr(parameter, _LOADED, False) and not ignored(name)
    }
    fresh = {id(parameter) for parameter in drawn.values()}
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)

    def is_own(name: str, parameter: nn.Parameter, module: str) -> bool:
        """Whether the Parameter was drawn, or lies in the module itself and nowhere else."""
        within = all(holder.startswith(f"{module}.") for holder in holders[id(parameter)])
        return id(parameter) in fresh or "." not in name and within

    found: dict[str, None] = {}
    for name in drawn:
        module = name.rpartition(".")[0]
        inside = model.get_submodule(module).named_parameters() if module else ()
        whole = bool(module) and all(is_own(own, parameter, module) for own, parameter in inside)
        found[module if whole else name] = None
    return [name for name in found if not covered(name, [other for other in found if other != name])]


def _ignored(model: nn.Module) -> Callable[[str], bool]:
    """Whether transformers leaves a name out of its report."""
    rules = [
        (f"{prefix}." if prefix else "", re.compile("|".join(f"(?:{pattern})" for pattern in patterns)))
        for prefix, module in model.named_modules()
        if (patterns := getattr(module, _NO_MATTER, None))
    ]
    return lambda name: any(name.startswith(prefix) and rule.search(name.removeprefix(prefix)) is not None for prefix, rule in rules)
