"""What torch's optimizers keep for each Parameter, and what they start with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

# One optimizer, accelerate's wrapper (it has `.optimizer`), or a list or tuple of them, nested or not.
OptimizerLike = Optimizer | Sequence[Any]

# The per-parameter state tensors of each class and the value they start with: a number, or the option that holds it. An
# optimizer is missing where no start value is certain: ASGD averages from zero only while its shared `mu` is 1, Adafactor keeps row and
# column means, LBFGS flattens all Parameters into one vector.
_STARTS: dict[str, dict[str, float | str]] = {
    "Adadelta": {"square_avg": 0.0, "acc_delta": 0.0},
    "Adagrad": {"sum": "initial_accumulator_value"},
    "Adam": {"exp_avg": 0.0, "exp_avg_sq": 0.0, "max_exp_avg_sq": 0.0},
    "AdamW": {"exp_avg": 0.0, "exp_avg_sq": 0.0, "max_exp_avg_sq": 0.0},
    "Adamax": {"exp_avg": 0.0, "exp_inf": 0.0},
    "Muon": {"momentum_buffer": 0.0},
    "NAdam": {"exp_avg": 0.0, "exp_avg_sq": 0.0},
    "RAdam": {"exp_avg": 0.0, "exp_avg_sq": 0.0},
    "RMSprop": {"square_avg": 0.0, "momentum_buffer": 0.0, "grad_avg": 0.0},
    "Rprop": {"prev": 0.0, "step_size": "lr"},
    "SGD": {"momentum_buffer": 0.0},
}
SHARED = frozenset({"step", "mu_product"})  # one value for the whole Parameter: kept


def state_starts(optimizer: Optimizer) -> dict[str, float | str] | None:
    """The start value of each state tensor of `optimizer`, found through its base classes; None for an unknown class."""
    for cls in type(optimizer).__mro__:
        if cls.__name__ in _STARTS and cls is getattr(torch.optim, cls.__name__, None):
            return _STARTS[cls.__name__]
    return None


def start_value(start: float | str, optimizer: Optimizer, group: dict[str, Any]) -> Any:
    """`start` itself, or the option of that name: the group's learning rate, or what the optimizer was made with."""
    if not isinstance(start, str):
        return start
    return group[start] if start == "lr" else optimizer.defaults[start]


def optimizers_of(optimizer: object | None) -> list[Optimizer]:
    """The torch optimizers in `optimizer`, each once: None gives [], lists, tuples and accelerate's wrapper are opened.

    A wrapper with state of its own (lookahead keeps slow weights) counts beside the optimizer that it wraps.
    Raises TypeError for anything else.
    """
    if optimizer is None:
        return []
    found: list[Optimizer] = []
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(optimizer, list | tuple):
        for item in optimizer:
            found += optimizers_of(item)
    # Asked before what is an Optimizer itself, which accelerate's wrapper is.
    elif isinstance(inner, Optimizer) and not isinstance(optimizer, LRScheduler):
        found += optimizers_of(inner)
        if isinstance(optimizer, Optimizer) and optimizer.state is not inner.state:
            found.append(optimizer)
    elif isinstance(optimizer, Optimizer):
        found.append(optimizer)
    else:
        raise TypeError(f"optimizer: expected torch's Optimizer, accelerate's wrapper or a list of them, got {type(optimizer).__name__}")
    return list({id(one): one for one in found}.values())
