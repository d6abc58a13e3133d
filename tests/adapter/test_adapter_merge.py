"""APTAdapter.merge_weights and unmerge_weights (seed 3)."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from problems import assert_accurate
from small_adapter import expected, make, masks
from torch import nn

from apt_ext import APTAdapter


@pytest.mark.parametrize("keep", ["device", "cpu"])
def test_merge_is_the_adapter_and_unmerge_is_bitwise(device, dtype, keep):
    adapter = make(device, dtype)
    adapter.set_masks(*masks(device))
    x = torch.randn(64, 10, device=device).to(dtype)
    before = adapter.weight.detach().clone(), adapter.bias.detach().clone()
    y = adapter(x)
    for _ in range(1000):
        adapter.merge_weights(keep)
        assert not torch.equal(adapter.weight, before[0])
        adapter.unmerge_weights()
        assert torch.equal(adapter.weight, before[0]) and torch.equal(adapter.bias, before[1])
    adapter.merge_weights(keep)
    once = adapter.weight.clone(), adapter.bias.clone()
    adapter.merge_weights(keep)
    assert adapter.merged and torch.equal(adapter.weight, once[0]) and torch.equal(adapter.bias, once[1])
    originals = [weakref.ref(value) for value in adapter.merge.originals.values()]
    for _ in range(2):
        adapter.unmerge_weights()
        assert not any(original() is not None for original in originals), "the memory of the originals is given back"
        assert not adapter.merged and torch.equal(adapter.weight, before[0])
    adapter.merge_weights(keep)
    assert_accurate(adapter.base_layer(x), y.double(), y.double().abs() + 1, dtype)
    with torch.no_grad():
        assert torch.equal(adapter(x), adapter.base_layer(x))


def test_merged_refuses_what_would_be_lost():
    adapter = make()
    other = APTAdapter.from_linear(adapter.base_layer, 1)
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
    with pytest.raises(RuntimeError, match="already carries the merge of another adapter"):
        other.merge_weights()
    with pytest.raises(RuntimeError, match="no base layer"):
        APTAdapter(4, 4, 1).merge_weights()
    with pytest.raises(ValueError, match="keep must be 'device' or 'cpu', got 'disk'"):
        make().merge_weights("disk")


SPOILT = {
    "factors whose product leaves float16": lambda a: (a.lora_A.fill_(200), a.lora_B.fill_(200)),
    "a sum that leaves float16, of two that fit": lambda a: (a.base_layer.weight.fill_(60000), a.lora_A.fill_(50), a.lora_B.fill_(50)),
    "Inf in A": lambda a: a.lora_A[1, 2].fill_(float("inf")),
    "NaN in B": lambda a: a.lora_B[3, 0].fill_(float("nan")),
    "NaN in a kept entry of the bias": lambda a: a.base_layer.bias[3].fill_(float("nan")),
}


@pytest.mark.parametrize("keep", ["device", "cpu"])
@pytest.mark.parametrize("fault", SPOILT)
def test_a_merge_that_would_not_be_finite_changes_nothing(device, keep, fault):
    adapter = make(device, torch.float16)
    adapter.set_masks(*masks(device))
    with torch.no_grad():
        SPOILT[fault](adapter)
    before = {name: value.clone() for name, value in adapter.state_dict().items()}
    for _ in range(2):
        with pytest.raises(RuntimeError, match="would not be finite.* unchanged"):
            adapter.merge_weights(keep)
        after = adapter.state_dict()
        assert not adapter.merged
        assert all(torch.equal(value.view(-1).view(torch.uint8), after[name].view(-1).view(torch.uint8)) for name, value in before.items())


def test_what_is_pruned_may_hold_anything(device, dtype):
    adapter = make(device, dtype)
    adapter.set_masks(*masks(device))
    x = torch.randn(5, 10, device=device).to(dtype)
    want = adapter(x).detach()
    pruned_in, pruned_out = adapter.mask_in == 0, adapter.mask_out == 0
    with torch.no_grad():
        adapter.lora_A[:, pruned_in] = float("nan")
        adapter.lora_B[pruned_out] = float("inf")
        adapter.base_layer.weight[:, pruned_in] = float("nan")
        adapter.base_layer.bias[pruned_out] = float("inf")
    before = adapter.weight.detach().clone(), adapter.bias.detach().clone()
    adapter.eval().merge_weights()
    assert torch.isfinite(adapter.weight).all() and torch.isfinite(adapter.bias).all()
    assert (adapter.weight[:, pruned_in] == 0).all() and (adapter.weight[pruned_out] == 0).all() and (adapter.bias[pruned_out] == 0).all()
    assert_accurate(adapter(x), want.double(), want.double().abs() + 1, dtype)
    adapter.unmerge_weights()
    for got, was in zip((adapter.weight, adapter.bias), before, strict=True):
        assert torch.equal(got.detach().view(torch.uint8), was.view(torch.uint8))  # NaN and all


# -- one weight, two owners --------------------------------------------------------------------------------------------


def tied(kind, dtype=torch.float32):
    """Two adapters over one memory: one Parameter, two views of one storage, a part of it, or only the bias."""
    first, second = nn.Linear(10, 7, dtype=dtype), nn.Linear(10, 7, dtype=dtype)
    if kind == "one Parameter":
        second.weight = first.weight
    elif kind == "two views":
        second.weight = nn.Parameter(first.weight.data)
    elif kind == "overlapping rows":
        storage = torch.randn(10, 10, dtype=dtype)
        first.weight, second.weight = nn.Parameter(storage[:7]), nn.Parameter(storage[3:])
    else:
        second.bias = first.bias
    both = nn.ModuleList(APTAdapter.from_linear(linear, 3) for linear in (first, second))
    for adapter in both:
        with torch.no_grad():
            adapter.lora_B.normal_()
        adapter.set_masks(*masks())
    return both


KINDS = ["one Parameter", "two views", "overlapping rows", "bias"]


@pytest.mark.parametrize("through", ["itself", "deepcopy", "pickle", "double"])
@pytest.mark.parametrize("kind", KINDS)
def test_of_two_adapters_over_one_memory_only_one_merges(kind, through):
    both = tied(kind)
    original = both[0].weight.detach().clone(), both[1].weight.detach().clone()
    both[0].merge_weights()
    if through == "deepcopy":
        both = copy.deepcopy(both)
    elif through == "pickle":
        both = pickle.loads(pickle.dumps(both))  # noqa: S301
    elif through == "double":
        both.double()
    if kind == "one Parameter" or through == "itself":  # two views are two tensors once they are moved
        with pytest.raises(RuntimeError, match="already carries the merge of another adapter"):
            both[1].merge_weights()
    both[0].unmerge_weights()
    assert torch.equal(both[0].weight.float(), original[0])
    both[1].merge_weights()
    both[1].unmerge_weights()
    if through == "itself":
        assert torch.equal(both[0].weight, original[0]) and torch.equal(both[1].weight, original[1])


def test_neighbours_in_one_storage_both_merge():
    """Optimizers and wrappers flatten Parameters into one buffer: that is no tie."""
    storage = torch.randn(2, 7, 10)
    linears = [nn.Linear(10, 7) for _ in range(2)]
    for linear, part in zip(linears, storage, strict=True):
        linear.weight = nn.Parameter(part)
    before = storage.clone()
    both = [APTAdapter.from_linear(linear, 3) for linear in linears]
    for adapter in both:
        torch.nn.init.normal_(adapter.lora_B)
        adapter.merge_weights()
    for adapter in both:
        adapter.unmerge_weights()
    assert torch.equal(storage, before)


def test_a_tied_state_holds_the_weight_unmerged_under_both_names():
    both = tied("one Parameter")
    original = both[0].weight.detach().clone()
    both[0].merge_weights()
    state = both.state_dict()
    assert torch.equal(state["0.base_layer.weight"], original) and torch.equal(state["1.base_layer.weight"], original)
    fresh = nn.ModuleList(APTAdapter.from_linear(nn.Linear(10, 7), 1) for _ in range(2))  # not tied
    fresh.load_state_dict(state)
    assert fresh[0].merged and not fresh[1].merged
    assert torch.equal(fresh[1].weight, original)


def test_an_adapter_that_is_gone_holds_no_weight():
    adapter = make()
    linear = adapter.base_layer
    adapter.merge_weights()
    del adapter
    gc.collect()
    APTAdapter.from_linear(linear, 1).merge_weights()  # its merge is for good


# -- copies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy_", ["deepcopy", "pickle", "state_dict", "assign", "move"])
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
        other.load_state_dict(state, assign=copy_ == "assign")
        assert torch.equal(state["base_layer.weight"], before)
    assert other.merged
    other.eval()
    x = torch.randn(3, 10)
    torch.testing.assert_close(other(x), adapter.eval()(x))
    for one in (adapter, other):  # the first while the second is merged
        one.unmerge_weights()
        assert torch.equal(one.weight, before)
    torch.testing.assert_close(other(x), expected(other, x))


@pytest.mark.parametrize("keep", ["device", "cpu"])
@pytest.mark.parametrize("to", [torch.float16, torch.bfloat16, torch.float64])
def test_a_merged_adapter_changes_its_dtype_with_its_original(to, keep):
    adapter = make(dtype=torch.float32).eval()
    adapter.set_masks(*masks())
    before, x = adapter.weight.detach().clone(), torch.randn(6, 10)
    want = adapter(x)
    adapter.merge_weights(keep)
    adapter.to(to)
    y = adapter(x.to(to))
    assert y.dtype == to and adapter.mask_in.dtype == torch.float32
    torch.testing.assert_close(y.float(), want, rtol=0.02, atol=0.05)
    assert torch.equal(adapter.state_dict()["base_layer.weight"], before.to(to))  # the dtype, too
    adapter.unmerge_weights()
    assert torch.equal(adapter.weight, before.to(to))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("keep", ["device", "cpu"])
def test_a_merged_adapter_changes_its_device_with_its_original(keep):
    adapter = make(dtype=torch.float32).eval()
    adapter.set_masks(*masks())
    before, x = adapter.weight.detach().clone(), torch.randn(6, 10)
    want = adapter(x)
    adapter.merge_weights(keep)
    for device in ("cuda", "cpu", "cuda"):
        adapter.to(device)
        assert {value.device.type for value in adapter.merge.originals.values()} == {device if keep == "device" else "cpu"}
        torch.testing.assert_close(adapter(x.to(device)).cpu(), want, rtol=1e-4, atol=1e-4)
    adapter.unmerge_weights()
    assert adapter.weight.is_cuda and torch.equal(adapter.weight.cpu(), before)


@pytest.mark.parametrize("keep", ["device", "cpu"])
def test_a_merged_adapter_goes_to_meta(keep):
    adapter = make()
    adapter.merge_weights(keep)
    adapter.to("meta")
    assert adapter.weight.is_meta and adapter.merged


def test_a_layer_made_in_inference_mode_merges_all_or_nothing():
    with torch.inference_mode():
        linear = nn.Linear(10, 7)
    adapter = APTAdapter.from_linear(linear, 3)
    torch.nn.init.normal_(adapter.lora_B)
    before, bias = linear.weight.clone(), linear.bias.clone()
    adapter.set_masks(*masks())
    adapter.merge_weights()
    assert adapter.merged and not torch.equal(linear.weight, before) and (linear.bias[[0, 5]] == 0).all()
    adapter.unmerge_weights()
    assert torch.equal(linear.weight, before) and torch.equal(linear.bias, bias)


WRONG = {
    "type": (lambda: "x", TypeError, "x must be a Tensor, got str"),
    "width": (lambda: torch.ones(2, 6), ValueError, r"x must have shape \[\.\.\., K=5\], got \[2, 6\]"),
    "scalar": (lambda: torch.ones(()), ValueError, r"x must have shape \[\.\.\., K=5\], got \[\]"),
    "dtype": (lambda: torch.ones(2, 5, dtype=torch.float64), TypeError, "x must have weight's dtype torch.float32, got torch.float64"),
    "device": (lambda: torch.ones(2, 5, device="meta"), ValueError, "x must be on weight's device cpu, got meta"),
}


@pytest.mark.parametrize(("x", "error", "words"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("how", ["merged", "disabled"])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_wrong_input_is_named_where_the_base_layer_computes(x, error, words, how, transposed):
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    adapter = APTAdapter.from_linear(Conv1D(7, 5) if transposed else nn.Linear(5, 7), 2).eval()
    if how == "merged":
        adapter.merge_weights()
    else:
        adapter.set_disabled(True)
    with pytest.raises(error, match=words):
        adapter(x())
    assert adapter(torch.ones(2, 5)).shape == (2, 7)


def test_an_error_of_the_base_layer_itself_is_not_reworded():
    class Broken(nn.Linear):
        def forward(self, x):
            raise RuntimeError("its own")

    adapter = APTAdapter.from_linear(nn.Linear(5, 7), 2).eval()
    adapter.merge_weights()
    adapter.base_layer.__class__ = Broken
    with pytest.raises(RuntimeError, match="its own"):
        adapter(torch.ones(2, 5))
