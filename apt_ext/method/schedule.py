"""How density, tuning budget and masks move from step to step: pure functions of the step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.checks import checked_int, checked_number
from ..config import Schedule


@dataclass(frozen=True)
class Steps:
    """A `Schedule` in optimizer steps: density falls from `warm_end` to `end`, masks move in `window` steps before each of `events`."""

    start: int
    warm_end: int
    end: int
    events: tuple[int, ...]
    window: int
    per_step: bool

    @classmethod
    def of(cls, schedule: Schedule, total: int | None) -> Steps:
        """Shares are of `total` optimizer steps. Events that would fall on one step are one.

        ValueError where a share is given without a total, an end comes before its start or after the total, or a window is longer than the
        steps between two events.
        """

        start, warm_end, end = _bounds(schedule, total)
        if not warm_end < end or total is not None and end > total:
            limit = "" if total is None else f" <= total_steps = {total}"
            raise ValueError(
                f"schedule: expected start + warm_up < end{limit} in steps, got start + warm_up = {warm_end} and end = {end}"
                + ("" if total is None else _least_total(schedule, total))
            )
        marks = sorted({start + (end - start) * i // schedule.events for i in range(1, schedule.events + 1)} - {start})
        pruning = [mark for mark in marks if mark > warm_end]
        gap = min(after - before for before, after in zip([warm_end, *pruning], pruning, strict=False))
        window = gap if schedule.window is None else max(_in_steps("window", schedule.window, total), 1)
        if not schedule.per_step and window > gap:
            raise ValueError(f"schedule.window: expected at most the {gap} steps between two events, got {window}")
        return cls(start, warm_end, end, tuple(marks), window, schedule.per_step)

    def next_event(self, step: int) -> int | None:
        """The first event at or after `step`."""
        return next((event for event in self.events if event >= step), None)

    def begins_window(self, step: int) -> bool:
        """Whether masks begin to move towards an event at `step`; where they move at every step, at each."""
        event = self.next_event(step) or step
        return self.per_step or step == max(event - self.window, self.warm_end) + 1

    def density(self, step: int, target: float, initial: float = 1.0) -> float | None:
        """What masks move towards at `step`, None where they rest: the density of the event that comes, or of this very step."""
        event = self.next_event(step)
        if event is None or event <= self.warm_end or step <= self.warm_end:
            return None
        if not self.per_step and step <= event - self.window:
            return None
        return cubic_density(step if self.per_step else event, self.warm_end, self.end, target, initial)


def _in_steps(name: str, value: float, total: int | None) -> int:
    if isinstance(value, int):
        return value
    if total is None:
        raise ValueError(f"total_steps: expected the number of optimizer steps, because schedule.{name} = {value} is a share; got None")
    return int(value * total + 1e-6)


def _bounds(schedule: Schedule, total: int | None) -> tuple[int, int, int]:
    """start, start + warm_up and end, in steps."""
    start, end = _in_steps("start", schedule.start, total), _in_steps("end", schedule.end, total)
    return start, start + _in_steps("warm_up", schedule.warm_up, total), end


def _least_total(schedule: Schedule, total: int) -> str:
    """The number of steps that would do, in words; nothing where none is near."""
    for more in range(total + 1, 2 * total + 10_000):
        _, warm_end, end = _bounds(schedule, more)
        if warm_end < end <= more:
            return f"; the least total_steps for this schedule is {more}"
    return ""


def cubic_density(step: int, start: int, end: int, target: float, initial: float = 1.0) -> float:
    """The density to keep at `step`: `initial` until `start`, then falling by a cube, exactly `target` from `end` on.

    target + (initial - target) (1 - t)^3 with t = (step - start) / (end - start), never above `initial`.
    Section 4.2 of the paper prints this formula for its gamma_t; it is that of the density (the share kept), as the authors' code has it.
    """
    if not 0.0 <= checked_number("target", target) <= 1.0:
        raise ValueError(f"target must be a density in [0, 1], got {target}")
    if not target <= checked_number("initial", initial) <= 1.0:
        raise ValueError(f"initial must be a density from target = {target} to 1, got {initial}")
    return min(initial, target + (initial - target) * (1.0 - _progress(step, start, end)) ** 3)


def linear_budget(step: int, start: int, end: int, initial: int, factor: float) -> int:
    """Trainable adapter parameters allowed at `step`: linear from `initial` at `start` to factor * initial from `end` on (section 4.3)."""
    checked_int("initial", initial, 0)
    checked_number("factor", factor, 1.0)
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
    checked_int("window", window, 1)
    level, slack = mask * window, 1e-3  # slack: what rounding may add to a whole number of steps
    level = torch.where(keep, torch.floor(level + slack) + 1, torch.ceil(level - slack) - 1)
    return level.clamp(0, window) / window


def _progress(step: int, start: int, end: int) -> float:
    """0 up to `start`, 1 from `end` on, linear between."""
    for name, value in (("step", step), ("start", start), ("end", end)):
        checked_number(name, value)
    if not 0 <= start < end:
        raise ValueError(f"expected 0 <= start < end, got start {start} and end {end}")
    return min(max((step - start) / (end - start), 0.0), 1.0)
