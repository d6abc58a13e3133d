"""Selection, masks and the division of the rank budget: pure functions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apt_ext import APTAdapter
from apt_ext.method import AdapterImportance, grown_ranks, step_mask, top_k


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


def test_what_a_limit_holds_back_goes_to_the_others_of_that_half() -> None:
    names = [f"{i}" for i in range(8)]
    ranks, sizes = dict.fromkeys(names, 8), {name: 100 + 10 * i for i, name in enumerate(names)}
    importance = {name: float(i) for i, name in enumerate(names)}
    limits = {name: 12 if name in "67" else 64 for name in names}
    now = sum(8 * size for size in sizes.values())
    grown = grown_ranks(ranks, sizes, importance, 2 * now, limits)
    assert set(grown) == set("4567") and grown["6"] == grown["7"] == 12
    after = sum(rank * sizes[name] for name, rank in {**ranks, **grown}.items())
    assert 2 * now - sum(sizes[name] for name in grown) < after <= 2 * now


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(2, 300), st.integers(0, 3), st.integers(1, 90)), min_size=1, max_size=12),
    st.floats(1, 6),
)
def test_growth_meets_any_budget_within_one_rank_an_adapter(adapters: list[tuple[int, int, int, int]], factor: float) -> None:
    names = [str(i) for i in range(len(adapters))]
    columns = [dict(zip(names, column, strict=True)) for column in zip(*adapters, strict=True)]
    ranks, sizes, importance, limits = columns
    limits = {name: max(limit, ranks[name]) for name, limit in limits.items()}
    budget = int(factor * sum(rank * sizes[name] for name, rank in ranks.items()))
    grown = grown_ranks(ranks, sizes, {name: float(value) for name, value in importance.items()}, budget, limits)
    after = {**ranks, **grown}
    assert all(ranks[name] < rank <= limits[name] for name, rank in grown.items())
    used = sum(rank * sizes[name] for name, rank in after.items())
    eligible = [name for name in names if ranks[name] < limits[name]]
    chosen = sorted(eligible, key=lambda name: -importance[name])[: len(eligible) // 2]
    assert used <= budget and set(grown) <= set(chosen)
    if any(after[name] < limits[name] for name in chosen):
        assert used > budget - sum(sizes[name] for name in chosen)


def test_the_papers_rule_grows_at_the_budgets_own_rate() -> None:
    """method 1.7: a budget of 1.75 times takes rank 8 to 14 by the paper's formula, to 20 by the code's."""
    names = [f"{i}" for i in range(36)]
    ranks, sizes, importance = dict.fromkeys(names, 8), dict.fromkeys(names, 1536), {name: float(i) for i, name in enumerate(names)}
    budget = int(1.75 * 36 * 8 * 1536)
    limits = dict.fromkeys(names, 64)
    assert set(grown_ranks(ranks, sizes, importance, budget, limits).values()) == {20}
    assert set(grown_ranks(ranks, sizes, importance, budget, limits, rate=1.75).values()) == {14}


def test_importance_by_the_papers_formula() -> None:
    torch.manual_seed(0)
    adapter = APTAdapter(5, 4, rank=2, max_rank=3)
    with torch.no_grad():
        adapter.lora_B[:, :2].normal_()
    adapter.lora_B.grad = torch.randn(4, 3)
    importance = AdapterImportance([("a", adapter)], decay=0.0, signed=False)
    importance.observe()
    importance.update()
    expected = (adapter.Wb * adapter.lora_B.grad[:, :2]).abs().sum().item()
    assert importance.importance() == {"a": pytest.approx(expected)}


def test_importance_of_a_step_that_was_not_made_does_not_count() -> None:
    adapter = APTAdapter(5, 4, rank=2)
    importance = AdapterImportance([("a", adapter)])
    for scale in (1e9, 1.0):
        adapter.lora_A.grad = torch.full((2, 5), scale)
        importance.observe()
    importance.update()
    importance.update()
    assert importance.importance() == {"a": pytest.approx(0.15 * adapter.lora_A.detach().sum(1).abs().mean().item())}


def test_growth_respects_limits_and_budget() -> None:
    ranks, sizes, importance = {"a": 8, "b": 8, "c": 0}, {"a": 10, "b": 10, "c": 10}, {"a": 1.0, "b": 2.0}
    assert grown_ranks(ranks, sizes, importance, 160, dict.fromkeys(ranks, 64)) == {}
    assert grown_ranks(ranks, sizes, importance, 10_000, dict.fromkeys(ranks, 12)) == {"b": 12}
    assert grown_ranks(ranks, sizes, importance, 10_000, {"a": 8, "b": 8, "c": 64}) == {}
