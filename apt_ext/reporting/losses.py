"""Losses over the steps, however they were noted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from ..common.checks import checked_int

Curve = list[tuple[int, float | None]]  # None: the loss was not finite

_NAMES = {"loss": "training", "eval_loss": "evaluation"}
_MOST = 4_000
_EXPECTED = "expected (step, loss) pairs, or Trainer's state.log_history"


def curves_of(losses: Any) -> dict[str, Curve]:
    """{"training" and "evaluation": the losses in the order of their steps}; {} for None.

    losses  pairs of a step and a loss, or dicts with "step" and "loss" or "eval_loss"; other dicts of a log are
            passed over

    TypeError and ValueError name the entry that is neither. A loss that is not finite is None.
    """
    if losses is None:
        return {}
    if isinstance(losses, str | bytes | Mapping) or not isinstance(losses, Sequence):
        raise TypeError(f"losses: {_EXPECTED}, got {type(losses).__name__}")
    curves: dict[str, Curve] = {}
    for i, entry in enumerate(losses):
        at = f"losses[{i}]"
        for name, step, loss in _read(at, entry):
            number = _number(at, loss)
            curves.setdefault(name, []).append((checked_int(f"step of {at}", step, 0), number if math.isfinite(number) else None))
    if losses and not curves:
        raise ValueError(f'losses: {_EXPECTED}, got {len(losses)} entries without "loss" or "eval_loss"')
    return {name: sorted(curve, key=lambda point: point[0]) for name, curve in curves.items()}


def thinned(curve: Curve) -> Curve:
    """At most 4,000 points of a curve, in even steps, with the last one: what a page can hold."""
    every = max(1, -(-len(curve) // _MOST))
    return [point for i, point in enumerate(curve) if i % every == 0 or i == len(curve) - 1]


def _read(at: str, entry: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(entry, Mapping):
        found = [(title, entry.get("step"), entry[key]) for key, title in _NAMES.items() if key in entry]
        if found and "step" not in entry:
            raise ValueError(f'{at}: expected a dict with "step" beside its loss, got {dict(entry)!r:.100}')
        return found
    if isinstance(entry, str | bytes) or not isinstance(entry, Sequence):
        raise TypeError(f"{at}: {_EXPECTED}, got {type(entry).__name__}")
    if len(entry) != 2:
        raise ValueError(f"{at}: expected a step and a loss, got {len(entry)} values")
    return [("training", entry[0], entry[1])]


def _number(at: str, loss: Any) -> float:
    if isinstance(loss, bool) or not isinstance(loss, Real):
        raise TypeError(f"loss of {at} must be a number, got {type(loss).__name__}")
    return float(loss)
