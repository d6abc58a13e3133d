"""How density, tuning budget and masks move from step to step: pure functions of the step."""

from __future__ import annotations

import torch
from torch import Tensor


def cubic_density(step: int, start: int, end: int, target: float) -> float:
    """The share of blocks to keep at `step`: 1 until `start`, then target + (1 - target) (1 - t)^3, exactly `target` from `end` on.

    t = (step - start) / (end - start). Section 4.2 of the paper prints this formula for its gamma_t; it is that of the density (the share
    kept), as the authors' code has it.
    """
    if not 0.0 <= target <= 1.0:
        raise ValueError(f"target must be a density in [0, 1], got {target}")
    return target + (1.0 - target) * (1.0 - _progress(step, start, end)) ** 3


def linear_budget(step: int, start: int, end: int, initial: int, factor: float) -> int:
    """Trainable adapter parameters allowed at `step`: linear from `initial` at `start` to factor * initial from `end` on (section 4.3)."""
    if factor < 1.0:
        raise ValueError(f"factor must be at least 1, got {factor}")
    return int(initial * (1.0 + (factor - 1.0) * _progress(step, start, end)))


def distill_weight(step: int, start: int, end: int) -> float:
    """mu of Eq. 7: the share of the distillation loss, 0 up to `start`, linear, 1 from `end` on (pruning's start and end in the paper)."""
    return _progress(step, start, end)


def step_mask(mask: Tensor, keep: Tensor, window: int) -> Tensor:
    """One mask step: kept entries rise by alpha = 1 / window, pruned ones fall by it, within [0, 1] (Algorithm 1 of the paper).

    mask [count] in [0, 1], keep [count] bool -> the new mask [count]. The steps are counted on the grid of multiples of alpha, so a mask
    reaches exactly 0 or 1 after at most `window` steps (repeated float32 subtraction would not); from between two grid points it moves to
    the next one.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1 step, got {window}")
    level, slack = mask * window, 1e-3  # slack: what rounding may add to a whole number of steps
    level = torch.where(keep, torch.floor(level + slack) + 1, torch.ceil(level - slack) - 1)
    return level.clamp(0, window) / window


def _progress(step: int, start: int, end: int) -> float:
    """0 up to `start`, 1 from `end` on, linear between."""
    if not 0 <= start < end:
        raise ValueError(f"expected 0 <= start < end, got start {start} and end {end}")
    return min(max((step - start) / (end - start), 0.0), 1.0)
