"""Weights of experts that are no linears: transformers 5 keeps those of all experts in one Parameter a layer."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

from ..pruning.architectures.lookup import is_linear


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return {name: Parameter} of what holds one matrix for each expert, [experts, out, in] or its like."""
    found = {}
    for prefix, module in model.named_modules():
        if is_linear(module) or not (_EXPERT.search(type(module).__name__) or _EXPERT.search(prefix.rpartition(".")[2])):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and parameter.shape[0] > 1:
                found[f"{prefix}.{name}" if prefix else name] = parameter
    return found


def not_adapted(model: nn.Module, experts: dict[str, nn.Parameter]) -> str:
    """Return what to say of `experts`: their names, once for all layers, and their share of the weights."""
    layers = {id(p): p.numel() for name, p in model.named_parameters() if p.dim() > 1 and re.search(r"(?:^|\.)\d+\.", name)}
    held = sum(parameter.numel() for parameter in experts.values())
    share = 100 * held / max(sum(layers.values()), held)
    names = dict.fromkeys(re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name) for name in experts)
    return (
        f"{', '.join(names)}: 3-D Parameters of experts, no linears, so they get no adapter and stay frozen: "
        f"{share:.0f} % of the weights of the layers"
    )


def not_linear(model: nn.Module, linears: Collection[str], experts: Collection[str]) -> dict[str, str]:
    """Return {name: what to say of it as a target} of `experts`, of the modules that hold them, and of all that is no linear."""
    known = set(linears)
    found = {
        name: f", of class {type(module).__name__} and no linear" for name, module in model.named_modules() if name and name not in known
    }
    return found | dict.fromkeys((*(name.rpartition(".")[0] for name in experts), *experts), ", 3-D Parameters of experts and no linears")


_EXPERT = re.compile("expert", re.IGNORECASE)
