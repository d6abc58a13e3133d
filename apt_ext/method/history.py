"""What the events of a run have changed: plain values to keep, and one line to read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..common.checks import checked_int, checked_keys, checked_mapping, checked_number
from ..pruning.architectures.lookup import Blocks

Event = dict[str, Any]
_KEYS = ("step", "density", "kept", "ranks", "adapter_parameters", "threshold")


def event(step: int, density: float, kept: Mapping[str, int], ranks: Mapping[str, int], parameters: int, threshold: float) -> Event:
    """One event, of values that JSON can say.

    step                optimizer steps that were counted
    density             after it
    kept                {block: how many of it stay}
    ranks               {adapter: its rank}
    adapter_parameters  entries of all factors in use
    threshold           the salience for its cost of the last chunk that stays; None where only floors do
    """
    return dict(
        zip(_KEYS, (step, density, dict(kept), dict(ranks), parameters, threshold if math.isfinite(threshold) else None), strict=True)
    )


def settings_of(controller: Any) -> dict[str, Any]:
    """What a Controller that goes on from another's state must have alike, and `total_steps`, of plain values."""
    steps, config = controller.steps, controller.config
    return {
        **vars(steps),
        "events": list(steps.events),
        "density": config.density,
        "round_to": config.round_to,
        "uniform": config.uniform,
        "budget": controller.budget,
        "joint": controller.joint,
        "floor": controller.floor,
        "growth": repr(controller.ranks.growth),
        "total_steps": controller.total_steps,
    }


def line(found: Event, target: float, blocks: Blocks) -> str:
    """The event in words; `blocks` are those that are pruned."""
    text = f"step {found['step']}: density {found['density']:.4f} (target {target:g})"
    for kind in dict.fromkeys(block.kind for block in blocks.values()):
        kept = [found["kept"][name] for name, block in blocks.items() if block.kind == kind]
        text += f", {kind} {_range(kept)} of {max(blocks.full[name] for name in blocks if blocks[name].kind == kind)}"
    text += f", ranks {_range(list(found['ranks'].values()))}, {found['adapter_parameters']:,} adapter parameters"
    return text + ("" if found["threshold"] is None else f", last score {found['threshold']:.3g}")


def checked_history(name: str, value: Any, step: int) -> list[Event]:
    """A copy of a history that ends at most at `step`; TypeError or ValueError for anything else."""
    if not isinstance(value, list):
        raise TypeError(f"{name}: expected a list, got {type(value).__name__}")
    found: list[Event] = []
    for i, given in enumerate(value):
        at = f"{name}[{i}]"
        one = dict(checked_keys(at, given, _KEYS))
        for key, least in (("step", 1), ("adapter_parameters", 0)):
            checked_int(f"{at}[{key!r}]", one[key], least)
        if one["step"] > step or (found and one["step"] <= found[-1]["step"]):
            raise ValueError(f"{at}['step']: expected events in their order, up to step {step}, got {one['step']}")
        checked_number(f"{at}['density']", one["density"], 0.0)
        if one["threshold"] is not None:
            checked_number(f"{at}['threshold']", one["threshold"])
        for key in ("kept", "ranks"):
            one[key] = dict(checked_mapping(f"{at}[{key!r}]", one[key]))
            for inner, number in one[key].items():
                checked_int(f"{at}[{key!r}][{inner!r}]", number, 0)
        found.append(one)
    return found


def _range(numbers: list[int]) -> str:
    if not numbers:
        return "none"
    least, most = min(numbers), max(numbers)
    return f"{least}" if least == most else f"{least}-{most}"
