"""Selection, schedules and the division of the rank budget: pure functions."""

from __future__ import annotations

import pytest
import torch

from apt_ext import APTAdapter
from apt_ext.method import AdapterImportance, cubic_density, grown_ranks, linear_budget, step_mask, top_k


def test_top_k_takes_the_largest() -> None:
    assert top_k(torch.tensor([0.1, 3.0, 2.0, 0.5]), 2).tolist() == [False, True, True, False]
    assert top_k(torch.ones(3), 0).tolist() == [False] * 3


def test_top_k_breaks_ties_by_index_and_ranks_nan_last() -> None:
    assert top_k(torch.ones(1000), 300).nonzero().flatten().tolist() == list(range(300))
    assert top_k(torch.tensor([torch.nan, 0.0, torch.inf]), 2).tolist() == [False, True, True]


@pytest.mark.parametrize("k", [-1, 4])
def test_top_k_refuses_a_count_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match="between 0 and 3"):
        top_k(torch.ones(3), k)


@pytest.mark.parametrize("window", [1, 7, 40, 100, 200, 999])
def test_masks_end_at_exactly_zero_and_one(window: int) -> None:
    keep = torch.tensor([True, False])
    mask = torch.tensor([0.0, 1.0])
    for step in range(1, window + 1):
        moved = step_mask(mask, keep, window)
        assert ((moved - mask).abs() <= 1 / window + 1e-6).all()
        mask = moved
        assert (mask.tolist() == [1.0, 0.0]) == (step == window)
    assert step_mask(mask, keep, window).tolist() == [1.0, 0.0]


def test_masks_between_grid_points_move_by_at_most_alpha() -> None:
    mask = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    for keep in (torch.ones(1000, dtype=torch.bool), torch.zeros(1000, dtype=torch.bool)):
        moved = step_mask(mask, keep, 10)
        assert ((moved - mask).abs() <= 0.1001 + 1e-6).all() and (moved >= 0).all() and (moved <= 1).all()
        assert ((moved > mask) == keep).all()


def test_masks_recover_at_the_rate_they_fall() -> None:
    mask = torch.ones(1)
    for keep in (False, False, False, True, True):
        mask = step_mask(mask, torch.tensor([keep]), 10)
    assert mask.item() == pytest.approx(0.9)


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


def test_importance_is_the_mean_of_signed_sums_per_rank() -> None:
    torch.manual_seed(0)
    adapter = APTAdapter(5, 4, rank=2)
    adapter.lora_A.grad = torch.randn(2, 5)
    importance = AdapterImportance([("a", adapter), ("carrier", APTAdapter(5, 4, rank=0))])
    for _ in range(3):
        importance.observe()
        importance.update()
    expected = (1 - 0.85**3) * (adapter.lora_A * adapter.lora_A.grad).sum(1).abs().mean().item()
    assert importance.importance() == {"a": pytest.approx(expected)}


def test_importance_reads_only_live_ranks_and_restarts_after_growth() -> None:
    adapter = APTAdapter(5, 4, rank=2, max_rank=4)
    importance = AdapterImportance([("a", adapter)])
    adapter.lora_A.grad = torch.ones(4, 5)
    importance.observe()
    importance.update()
    state = importance.state_dict()
    assert state["a"].shape == (2,)
    adapter.increase_rank(3)
    with pytest.raises(ValueError, match="ranks"):
        importance.load_state_dict({})
    importance.restart()
    importance.observe()
    importance.update()
    assert importance.averages["a"].shape == (3,)


def test_the_more_important_half_grows_to_the_budget() -> None:
    names = [f"{i}" for i in range(9)]
    ranks, sizes = dict.fromkeys(names, 8), {name: 100 + 10 * i for i, name in enumerate(names)}
    importance = {name: float(i % 5) for i, name in enumerate(names)}
    now = sum(8 * size for size in sizes.values())
    grown = grown_ranks(ranks, sizes, importance, int(1.75 * now), dict.fromkeys(names, 64))
    assert set(grown) == {"4", "3", "8", "2"}  # floor(9 / 2): importance 4, 3, 3, 2, the earlier of the equal ones (2 before 7)
    after = sum(rank * sizes[name] for name, rank in {**ranks, **grown}.items())
    assert 1.75 * now - sum(sizes[name] for name in grown) < after <= 1.75 * now


def test_growth_respects_limits_and_budget() -> None:
    ranks, sizes, importance = {"a": 8, "b": 8, "c": 0}, {"a": 10, "b": 10, "c": 10}, {"a": 1.0, "b": 2.0}
    assert grown_ranks(ranks, sizes, importance, 160, dict.fromkeys(ranks, 64)) == {}
    assert grown_ranks(ranks, sizes, importance, 10_000, dict.fromkeys(ranks, 12)) == {"b": 12}
    assert grown_ranks(ranks, sizes, importance, 10_000, {"a": 8, "b": 8, "c": 64}) == {}
