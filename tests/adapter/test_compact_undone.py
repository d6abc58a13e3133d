"""A compact() that fails half way leaves everything as it was: of one adapter, and of a model of which half is done."""

import pytest
import torch
from families import FAMILIES, adapted, keep_first, outputs
from small_adapter import make, masks, outcome

from apt_ext import APTAdapter, adapters
from apt_ext.adapter import compact, packed_weight, weight_store

DENSE = ("keep", "cpu")


def failing_at(monkeypatch, n, owner, name):
    """The n-th call of a function raises; returns the number of calls."""
    real, calls = getattr(owner, name), []

    def call(*arguments, **options):
        calls.append(1)
        if len(calls) == n:
            raise torch.OutOfMemoryError("planted")
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, call)
    return calls


FAULTS = {
    "the copy of W": (packed_weight.PackedWeight, "pack"),
    "the host copy": (weight_store.WeightStore, "offload"),
    "last": (compact.Packing, "remember_weight"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dense", [*DENSE, None])
@pytest.mark.parametrize("before", [*DENSE, None])
def test_of_one_adapter(device, before, dense, fault, monkeypatch):
    adapter = make(device)
    adapter.set_masks(*masks(device))
    if before is not None:
        adapter.compact(dense=before)
    x = torch.randn(3, 10, dtype=torch.float64, device=device, requires_grad=True)
    want, weight = outcome(adapter, x), adapter.state_dict()["base_layer.weight"].clone()
    with monkeypatch.context() as patch:
        calls = failing_at(patch, 1, *FAULTS[fault])
        try:
            adapter.compact(dense is not None, **({} if dense is None else {"dense": dense}))
        except torch.OutOfMemoryError:
            assert calls
        else:  # this one does not come there
            assert not calls
            return
    assert adapter.compacted == (before is not None) and adapter.packing.store.place == (before or "keep")
    for got, value in zip(outcome(adapter, x), want, strict=True):
        assert torch.equal(got, value)
    assert torch.equal(adapter.state_dict()["base_layer.weight"], weight)
    adapter.set_masks(mask_in=torch.zeros(10, device=device))
    assert torch.isfinite(adapter(x)).all()
    adapter.compact()  # and the next call works


MODELS = ("llama", "bert", "t5")


@pytest.mark.parametrize("dense", DENSE)
@pytest.mark.parametrize("before", [*DENSE, None])
@pytest.mark.parametrize("name", MODELS)
def test_of_a_model_half_way(name, before, dense, monkeypatch):
    family = FAMILIES[name]
    apt, batch = keep_first(adapted(family), heads=2, neurons=9), family.inputs()
    state = {key: value.clone() for key, value in apt.state_dict().items()}
    if before is not None:
        apt.compact(dense=before, chain=True)
        state = {key: value.clone() for key, value in apt.state_dict().items()}
    want = outputs(apt, batch)[0]
    found = [adapter for _, adapter in adapters(apt)]
    were = [(adapter.compacted, adapter.packing.store.place, adapter.packing.store.is_offloaded) for adapter in found]
    with monkeypatch.context() as patch:
        calls = failing_at(patch, 5, APTAdapter, "compact")
        with pytest.raises(torch.OutOfMemoryError, match="planted"):
            apt.compact(dense=dense)
        assert len(calls) > 5  # what was done was undone
    assert [(adapter.compacted, adapter.packing.store.place, adapter.packing.store.is_offloaded) for adapter in found] == were
    assert apt._chained == (before is not None)
    assert any(adapter.packing.chain_in is not None and adapter.packing.chain_in.is_open() for adapter in found) == (before is not None)
    torch.testing.assert_close(outputs(apt, batch)[0], want)
    after = apt.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in state.items())
    apt.compact(dense=dense)
    torch.testing.assert_close(outputs(apt, batch)[0], want)


def test_fractions_are_kept():
    """However small: only an exact zero is pruned, in what is counted and in what is computed."""
    adapter, x = make(), torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    m_in = torch.tensor([0.5, 0.25, 0.1, 1e-3, 1e-30, 0.0, 0.5, 1.0, 0.0, 0.499])
    m_out = torch.tensor([0.5, 1e-20, 0.0, 0.3, 0.5, 1.0, 0.01])
    adapter.set_masks(m_in, m_out)
    stats = adapter.get_sparsity_stats()
    assert (stats["active_input_dims"], stats["active_output_dims"]) == (8, 6)
    assert stats["input_sparsity"] == pytest.approx(0.2) and stats["output_sparsity"] == pytest.approx(1 / 7)
    assert stats["weight_sparsity"] == stats["overall_sparsity"] == pytest.approx(1 - 0.8 * 6 / 7)
    want = outcome(adapter, x)
    adapter.compact()
    kept = adapter.packing.current
    assert torch.equal(kept.position_in >= 0, m_in != 0) and torch.equal(kept.position_out >= 0, m_out != 0)
    for got, value in zip(outcome(adapter, x), want, strict=True):
        torch.testing.assert_close(got, value)
    assert bool((outcome(adapter, x)[0][:, m_out > 1e-10] != 0).all())


@pytest.mark.parametrize("max_rank", [None, 6])
def test_ranks_of_init_type_zero_are_zero(device, max_rank):
    adapter = make(device, max_rank=max_rank)
    x = torch.randn(3, 10, dtype=torch.float64, device=device)
    before, generator = adapter(x), torch.Generator(device).manual_seed(1)
    with pytest.warns(UserWarning, match="both factors zero"):
        adapter.increase_rank(5, "zero", generator=generator)
    assert adapter.rank == adapter.get_current_rank() == 5
    assert (adapter.Wa[3:] == 0).all() and (adapter.Wb[:, 3:] == 0).all()
    torch.testing.assert_close(adapter(x), before)
    adapter.increase_rank(6, generator=generator)
    assert (adapter.Wa[5:] != 0).all() and (adapter.Wa[3:5] == 0).all()
