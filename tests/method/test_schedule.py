"""When density falls, masks move and ranks grow: pure functions of the step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_ext import Schedule
from apt_ext.method import Steps, cubic_density, linear_budget


def test_density_falls_as_a_cube_and_ends_exactly() -> None:
    density = [cubic_density(step, 10, 50, 0.3) for step in range(80)]
    assert density[:11] == [1.0] * 11 and density[50:] == [0.3] * 30
    assert density == sorted(density, reverse=True)
    assert density[30] == pytest.approx(0.3 + 0.7 / 8)


def test_density_is_that_of_the_published_events() -> None:
    """The SST-2 script: 2105 steps an epoch, start 200, one epoch of warm-up, end after 3 epochs, target 0.4 (method.md 1.6)."""
    start, end, steps = 200 + 2105, 6315, (2646, 3257, 3869, 4480, 5092, 5703, 6315)
    expected = (0.860, 0.666, 0.536, 0.458, 0.417, 0.402, 0.400)
    assert [cubic_density(step, start, end, 0.4) for step in steps] == pytest.approx(expected, abs=6e-4)


def test_budget_grows_linearly() -> None:
    assert [linear_budget(step, 0, 4, 100, 3.0) for step in range(6)] == [100, 150, 200, 250, 300, 300]


@pytest.mark.parametrize(
    "call", [lambda: cubic_density(0, 5, 5, 0.5), lambda: cubic_density(0, 0, 5, 1.5), lambda: linear_budget(0, 0, 5, 9, 0.5)]
)
def test_impossible_schedules_are_refused(call: object) -> None:
    with pytest.raises(ValueError, match="expected|must"):
        call()  # type: ignore[operator]


SST2 = Schedule(start=200, warm_up=2105, end=6315, events=10, window=200)


def test_the_published_script_in_steps() -> None:
    """method 1.6: events and the densities that masks move towards, 1 while it warms up."""
    steps = Steps.of(SST2, None)
    assert steps.events == (811, 1423, 2034, 2646, 3257, 3869, 4480, 5092, 5703, 6315)
    densities = [steps.density(event, 0.4) for event in steps.events]
    assert densities[:3] == [None] * 3
    assert densities[3:] == pytest.approx([0.860, 0.666, 0.536, 0.458, 0.417, 0.402, 0.400], abs=6e-4) and densities[-1] == 0.4
    for event, density in zip(steps.events[3:], densities[3:], strict=True):
        moving = [step for step in range(event - 300, event + 100) if steps.density(step, 0.4) is not None]
        assert moving == list(range(event - 199, event + 1))
        assert {steps.density(step, 0.4) for step in moving} == {density}


def test_masks_at_every_step_follow_the_density_of_that_step() -> None:
    steps = Steps.of(Schedule(start=10, end=50, events=2, window=5, per_step=True), None)
    assert steps.events == (30, 50)
    assert [steps.density(step, 0.3) for step in (9, 10, 51)] == [None] * 3
    assert [steps.density(step, 0.3) for step in range(11, 51)] == [cubic_density(step, 10, 50, 0.3) for step in range(11, 51)]


@given(
    st.integers(20, 3000),
    st.floats(0, 0.4),
    st.floats(0, 0.2),
    st.floats(0.7, 1),
    st.integers(1, 12),
    st.floats(0.1, 0.9),
    st.booleans(),
)
def test_any_schedule_in_shares(total: int, start: float, warm_up: float, end: float, events: int, target: float, per_step: bool) -> None:
    steps = Steps.of(Schedule(start, warm_up, end, events, per_step=per_step), total)
    assert steps.start <= steps.warm_end < steps.end <= total and steps.window >= 1
    assert steps.events[-1] == steps.end and list(steps.events) == sorted(set(steps.events)) and len(steps.events) <= events
    found = [steps.density(step, target, 0.95) for step in range(total + 1)]
    moving = [density for density in found if density is not None]
    assert moving == sorted(moving, reverse=True) and all(target <= density <= 0.95 for density in moving)
    assert found[steps.end] == target and not any(density is not None for density in found[: steps.warm_end + 1] + found[steps.end + 1 :])


def test_a_whole_run_is_a_share_of_1_and_one_step_is_the_int_1() -> None:
    assert Steps.of(Schedule(start=1, end=1.0, events=1), 40) == Steps(1, 1, 40, (40,), 39, False)


@pytest.mark.parametrize(
    ("schedule", "total", "words"),
    [
        (Schedule(), None, "total_steps: expected the number of optimizer steps, because schedule.start = 0.1 is a share; got None"),
        (Schedule(start=30, end=20), None, r"schedule: expected start \+ warm_up < end in steps, got start \+ warm_up = 30 and end = 20"),
        (Schedule(start=0.4, warm_up=0.2, end=0.5), 100, "got start .* = 60 and end = 50"),
        (Schedule(start=1, end=200), 100, "< end <= total_steps = 100 .* and end = 200; the least total_steps for this schedule is 200"),
        (Schedule(), 1, r"< end <= total_steps = 1 in steps, .* and end = 0; the least total_steps for this schedule is 2$"),
        (Schedule(start=0.4, warm_up=0.2, end=0.5), 100, "and end = 50$"),
        (
            Schedule(start=0, end=100, events=4, window=26),
            None,
            "schedule.window: expected at most the 25 steps between two events, got 26",
        ),
    ],
)
def test_what_does_not_fit_is_said(schedule: Schedule, total: int | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Steps.of(schedule, total)


def test_a_density_that_was_reached_before_is_where_it_starts() -> None:
    assert cubic_density(10, 10, 50, 0.3, 0.5) == 0.5 and cubic_density(30, 10, 50, 0.3, 0.5) == pytest.approx(0.3 + 0.2 / 8)
    with pytest.raises(ValueError, match="initial must be a density from target"):
        cubic_density(10, 10, 50, 0.3, 0.2)
