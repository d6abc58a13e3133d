"""The density that a Controller is to reach on a model, and whether it has: so that no model is exported half pruned by mistake.

It lives on the APTModel, whoever holds the Controller. A state_dict holds it as one tensor more, a checkpoint directory in its
apt_config.json; both leave it out where no Controller has pruned the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.state_dict import checked_before
from ..common.checks import checked_bool, checked_choice, checked_keys, checked_number

BUDGETS = ("parameters", "flops", "memory", "latency")  # what a density may be a share of
KEY = "target"  # in a state_dict, and in apt_config.json


@dataclass(frozen=True)
class Target:
    """What a Controller is to leave of a model.

    density  the share that is to be kept, in [0, 1]
    budget   what it is a share of, one of "parameters", "flops", "memory", "latency"
    reached  True once the last event has been

    TypeError and ValueError name the field.
    """

    density: float
    budget: str = "parameters"
    reached: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= checked_number("target.density", self.density) <= 1.0:
            raise ValueError(f"target.density must lie in [0, 1], got {self.density}")
        checked_choice("target.budget", self.budget, BUDGETS)
        checked_bool("target.reached", self.reached)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `of_dict` reads them."""
        return asdict(self)

    @classmethod
    def of_dict(cls, values: Any) -> Target:
        """TypeError or ValueError for what `to_dict` did not write."""
        return cls(**checked_keys(KEY, values, ("density", "budget", "reached")))

    def to_tensor(self) -> Tensor:
        """[3] int64 on the host: the bits of density as a float64, the budget's place in BUDGETS, reached.

        Whole numbers, because `.half()` and averages of a state_dict change what is floating.
        """
        density = torch.tensor(self.density, dtype=torch.float64, device="cpu").view(torch.int64)
        return torch.tensor([int(density), BUDGETS.index(self.budget), self.reached], dtype=torch.int64, device="cpu")

    @classmethod
    def of_tensor(cls, value: Any, name: str = KEY) -> Target:
        """TypeError or ValueError, naming `name`, for what `to_tensor` did not make."""
        if not isinstance(value, Tensor) or value.dtype != torch.int64:
            raise TypeError(f"{name} must be a Tensor of torch.int64, got {getattr(value, 'dtype', type(value).__name__)}")
        if list(value.shape) != [3]:
            raise ValueError(f"{name} must have shape [3], got {list(value.shape)}")
        density, budget, reached = value.tolist()
        if budget not in range(len(BUDGETS)) or reached not in (0, 1):
            raise ValueError(f"{name} must hold a density, the number of a budget, and 0 or 1, got {value.tolist()}")
        bits = torch.tensor(density, dtype=torch.int64, device="cpu")
        return cls(bits.view(torch.float64).item(), BUDGETS[budget], bool(reached))


def target_after(present: Target | None, state: Mapping[str, Any], prefix: str = "") -> Target | None:
    """The target of a model once it has loaded `state`, whose keys begin with `prefix`; TypeError or ValueError for one that is damaged.

    A state without a target that has masks was made before a Controller came: a present target is then not reached.
    """
    if prefix + KEY in state:
        return Target.of_tensor(state[prefix + KEY], prefix + KEY)
    masks = any(key.startswith(prefix) and key.endswith((".mask_in", ".mask_out")) for key in state)
    return Target(present.density, present.budget) if masks and present is not None else present


def save_target(model: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """A hook of torch's `state_dict`."""
    if isinstance(model.target, Target):
        state[prefix + KEY] = model.target.to_tensor()


@checked_before
def load_target(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook before torch's `load_state_dict`; `state` is torch's own copy."""
    model.target = target_after(model.target, state, prefix)  # type: ignore[assignment,arg-type]
    state.pop(prefix + KEY, None)
