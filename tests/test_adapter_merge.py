"""APTAdapter.merge_weights and unmerge_weights (seed 3)."""

import copy
import pickle

import pytest
import torch
from conftest import assert_accurate
from small_adapter import expected, make, masks

from apt_ext import APTAdapter


@pytest.mark.parametrize("keep", ["device", "cpu"])
def test_merge_is_the_adapter_and_unmerge_is_bitwise(device, dtype, keep):
    adapter = make(device, dtype)
    adapter.set_masks(*masks(device))
    x = torch.randn(64, 10, device=device).to(dtype)
    before = adapter.weight.detach().clone(), adapter.bias.detach().clone()
    y = adapter(x)
    for _ in range(50):
        adapter.merge_weights(keep)
        adapter.merge_weights(keep)
        assert adapter.merged
        adapter.unmerge_weights()
        adapter.unmerge_weights()
        assert torch.equal(adapter.weight, before[0]) and torch.equal(adapter.bias, before[1])
    adapter.merge_weights(keep)
    assert_accurate(adapter.base_layer(x), y.double(), 4 * y.double().abs() + 4, dtype)
    with torch.no_grad():
        assert torch.equal(adapter(x), adapter.base_layer(x))


def test_merged_refuses_what_would_be_lost():
    adapter = make()
    adapter.merge_weights()
    x = torch.randn(2, 10, dtype=torch.float64)
    for call in (
        lambda: adapter.set_masks(torch.ones(10)),
        lambda: adapter.increase_rank(4),
        lambda: adapter(x, mask_in=torch.ones(10)),
        lambda: adapter.reset_parameters(),
    ):
        with pytest.raises(RuntimeError, match="merged"):
            call()
    with pytest.warns(UserWarning, match="get no gradient"):
        adapter(x)
    adapter(x)  # once
    other = APTAdapter.from_linear(adapter.base_layer, 1)
    with pytest.raises(RuntimeError, match="already carries the merge of another adapter"):
        other.merge_weights()
    with pytest.raises(RuntimeError, match="no base layer"):
        APTAdapter(4, 4, 1).merge_weights()
    with pytest.raises(ValueError, match="keep must be 'device' or 'cpu', got 'disk'"):
        make().merge_weights("disk")


def test_a_merge_that_would_not_be_finite_changes_nothing():
    adapter = make(dtype=torch.float16)
    with torch.no_grad():
        adapter.lora_A.fill_(200), adapter.lora_B.fill_(200)
    before = adapter.weight.detach().clone(), adapter.bias.detach().clone()
    with pytest.raises(RuntimeError, match="would not be finite"):
        adapter.merge_weights()
    assert not adapter.merged and torch.equal(adapter.weight, before[0]) and torch.equal(adapter.bias, before[1])


@pytest.mark.parametrize("copy_", ["deepcopy", "pickle", "state_dict", "move"])
@pytest.mark.parametrize("keep", ["device", "cpu"])
def test_a_merged_adapter_travels_with_its_original(copy_, keep):
    adapter = make(dtype=torch.float32)
    adapter.set_masks(*masks())
    before = adapter.weight.detach().clone()
    adapter.merge_weights(keep)
    if copy_ == "deepcopy":
        other = copy.deepcopy(adapter)
    elif copy_ == "pickle":
        other = pickle.loads(pickle.dumps(adapter))  # noqa: S301
    elif copy_ == "move":
        other = adapter.double().float()
    else:
        state = adapter.state_dict()
        assert torch.equal(state["base_layer.weight"], before) and all(isinstance(v, torch.Tensor) for v in state.values())
        other = make(dtype=torch.float32, rank=1)
        other.load_state_dict(state)
    assert other.merged
    other.eval()
    x = torch.randn(3, 10)
    torch.testing.assert_close(other(x), adapter.eval()(x))
    other.unmerge_weights()
    assert torch.equal(other.weight, before)
    torch.testing.assert_close(other(x), expected(other, x))
