"""APTAdapter in a state_dict and in copies (seed 9, 17)."""

import copy
import io
import pickle

import pytest
import torch
from small_adapter import make, masks

from apt_ext import APTAdapter


@pytest.mark.parametrize("source", [None, 5])
@pytest.mark.parametrize("target", [None, 5])
def test_state_dict_restores_rank_and_masks_into_any_rank(source, target):
    adapter = make(rank=4, max_rank=source)
    adapter.set_masks(*masks())
    buffer = io.BytesIO()
    torch.save(adapter.state_dict(), buffer)
    buffer.seek(0)
    other = make(rank=1, max_rank=target)
    A = other.lora_A
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.rank == 4 and other.lora_A is A and all(map(torch.equal, other.get_masks(), adapter.get_masks()))
    x = torch.randn(3, 10, dtype=torch.float64)
    torch.testing.assert_close(other(x), adapter(x))
    assert other.lora_A.shape[0] == (target or 4)


def test_bad_states_are_refused_whole():
    adapter = make(rank=2, max_rank=3)
    before = {k: v.clone() for k, v in adapter.state_dict().items()}
    good, low = make(rank=4).state_dict(), make(rank=2).state_dict()
    for change, match in (
        ({}, "rank must be at most the module's max_rank = 3, got 4"),
        ({"mask_in": torch.full((10,), 2.0)}, r"rank must be|mask_in must hold"),
        ({**low, "mask_in": torch.full((10,), float("nan"))}, "mask_in must hold values"),
        ({**low, "mask_in": torch.ones(3)}, "mask_in must have shape"),
        ({"rank": torch.tensor(9)}, "rank must lie between 0 and lora_A's 4 rows, got 9"),
        ({"lora_A": torch.ones(2, 9)}, "must have shapes"),
    ):
        with pytest.raises(ValueError, match=match):
            adapter.load_state_dict({**good, **change})
        after = adapter.state_dict()
        assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_seed_state_dict_loads_unmerged_with_a_warning():
    state = {
        "Wa": torch.randn(4, 10),
        "Wb": torch.randn(7, 4),
        "mask_in": torch.ones(10),
        "mask_out": torch.tensor([0.0, 1, 1, 1, 1, 1, 1]),
        "merged": torch.tensor(False),
    }
    adapter = APTAdapter(10, 7, rank=2)
    adapter.load_state_dict(state)
    assert adapter.rank == 4 and torch.equal(adapter.Wa, state["Wa"]) and torch.equal(adapter.Wb, state["Wb"])
    with pytest.warns(UserWarning, match="never merged a weight"):
        APTAdapter(10, 7, rank=2).load_state_dict({**state, "merged": torch.tensor(True)})


def test_copies_are_equal_and_independent():
    adapter = make()
    adapter.set_masks(*masks())
    x = torch.randn(3, 10, dtype=torch.float64)
    for other in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):  # noqa: S301
        torch.testing.assert_close(other(x), adapter(x))
        other.set_masks(torch.zeros(10))
        other.increase_rank(6)
        assert adapter.rank == 3 and adapter.mask_in[0] == 1


def test_inference_mode_leaves_trainable_tensors():
    with torch.inference_mode():
        adapter = APTAdapter(6, 4, 2)
        adapter.set_masks(torch.full((6,), 0.5))
        adapter.increase_rank(3)
    assert not any(t.is_inference() for t in (adapter.lora_A, adapter.lora_B, adapter.mask_in))
    adapter(torch.randn(2, 6)).sum().backward()
    assert adapter.lora_B.grad.shape == (4, 3)
