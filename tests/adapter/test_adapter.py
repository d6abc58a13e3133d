"""APTAdapter: Eq. 2, masks, gradients; and every defect of the seed as a test that fails on the seed's behaviour."""

import pytest
import torch
from problems import assert_accurate
from small_adapter import expected, make, masks
from torch import nn

import apt_ext
from apt_ext import APTAdapter, ops, reference
from apt_ext.method import kurtosis

# -- Eq. 2 (seed 1, 2, 7, 8) -------------------------------------------------------------------------------------------


def test_starts_as_the_wrapped_linear_bitwise(device):
    adapter = make(device, torch.float32, trained=False)
    x = torch.randn(4, 10, device=device)
    assert torch.equal(adapter(x), adapter.base_layer(x))
    assert adapter(x).abs().max() > 0


@pytest.mark.parametrize("set_", [False, True])
def test_forward_is_equation_2_under_masks(device, set_):
    adapter, x = make(device), torch.randn(2, 5, 10, dtype=torch.float64, device=device)
    m_in, m_out = masks(device)
    y = adapter.set_masks(m_in, m_out) or adapter(x) if set_ else adapter(x, m_in, m_out)
    dense = torch.diag(m_out.double()) @ (adapter.weight + adapter.scaling * adapter.Wb @ adapter.Wa) @ torch.diag(m_in.double())
    torch.testing.assert_close(y, x @ dense.T + m_out * adapter.bias, rtol=1e-12, atol=1e-12)
    assert (y[..., [0, 5]] == 0).all()
    assert torch.equal(adapter.mask_in, m_in if set_ else torch.ones_like(m_in))


def test_base_is_frozen_and_shared_and_masks_are_float32_buffers():
    linear = nn.Linear(4, 5)
    adapter = APTAdapter.from_linear(linear, 2)
    assert adapter.base_layer is linear and adapter.weight is linear.weight and adapter.bias is linear.bias
    assert [n for n, p in adapter.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert {"mask_in", "mask_out"} == {n for n, _ in adapter.named_buffers()}
    adapter.set_masks(torch.tensor([0.01, 0.37, 1 / 3, 1]))
    kept = adapter.mask_in.clone()
    for move in (adapter.half, adapter.bfloat16, adapter.double, lambda: adapter.to(torch.float16)):
        move()
        assert adapter.mask_in.dtype == torch.float32 and torch.equal(adapter.mask_in, kept)
    assert adapter.weight.dtype == torch.float16
    assert adapter.to("meta").mask_in.is_meta and adapter.mask_out.is_meta


def test_zeros_are_honoured_and_bad_values_refused():
    assert APTAdapter(6, 4, rank=0).rank == 0 and APTAdapter(6, 4, rank=2, scaling=0.0).scaling == 0.0
    x = torch.randn(3, 6)
    assert (APTAdapter(6, 4, rank=0)(x) == 0).all() and APTAdapter(6, 4, rank=0)(x).shape == (3, 4)
    for options, error, match in (
        ({"rank": 5}, ValueError, "rank must be at most min.* = 4, got 5"),
        ({"rank": -1}, ValueError, "rank must be at least 0, got -1"),
        ({"rank": 2.0}, TypeError, "rank must be an int, got float"),
        ({"rank": 3, "max_rank": 2}, ValueError, "rank must be at most max_rank = 2, got 3"),
        ({"scaling": float("nan")}, ValueError, "scaling must be a finite number"),
        ({"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\)"),
        ({"init_std": -1.0}, ValueError, "init_std"),
        ({"dtype": torch.int8}, TypeError, "dtype must be float64"),
    ):
        with pytest.raises(error, match=match):
            APTAdapter(6, 4, **{"rank": 2, **options})
    assert APTAdapter(6, 4, rank=2, max_rank=99).max_rank == 4


@pytest.mark.parametrize("max_rank", [None, 64])
@pytest.mark.parametrize(("init_std", "expected"), [(None, 1 / (3 * 3000) ** 0.5), (0.5, 0.5)])
def test_init_is_gaussian_of_the_stated_deviation(init_std, expected, max_rank):
    """The first rows and those of growth; what is uniform has an excess kurtosis of -1.2."""
    adapter = APTAdapter(3000, 64, rank=32, init_std=init_std, max_rank=max_rank)
    adapter.increase_rank(64)
    assert (adapter.lora_B == 0).all()
    for rows in (adapter.Wa[:32], adapter.Wa[32:]):
        assert rows.mean().abs().item() < 0.02 * expected and rows.std().item() == pytest.approx(expected, rel=0.02)
        assert kurtosis(rows.flatten()).abs().item() < 0.1


def test_from_linear_refuses_by_name():
    class Linear4bit(nn.Linear):
        def forward(self, x):
            return x

    for bad, error, match in (
        (nn.Embedding(3, 4), TypeError, "nn.Linear or transformers' Conv1D.*Embedding"),
        (Linear4bit(3, 4), TypeError, "Linear4bit"),
    ):
        with pytest.raises(error, match=match):
            APTAdapter.from_linear(bad, 1)
    with pytest.raises(ValueError, match=r"rank must be at most .* = 3 for Linear\(3, 4\), got 4"):
        APTAdapter.from_linear(nn.Linear(3, 4), 4)
    linear = nn.Linear(3, 4)
    with torch.no_grad():
        linear.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="must be finite"):
        APTAdapter.from_linear(linear, 1)
    assert linear.weight.requires_grad
    assert APTAdapter.from_linear(nn.Linear(3, 4, device="meta"), 1).lora_A.is_meta


def test_conv1d(device):
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(7, 10).to(device).double()
    adapter = APTAdapter.from_linear(conv, 3)
    with torch.no_grad():
        adapter.lora_B.normal_()
    x = torch.randn(4, 10, dtype=torch.float64, device=device)
    adapter.set_masks(*masks(device))
    y, before = adapter(x), conv.weight.detach().clone()
    torch.testing.assert_close(y, expected(adapter, x))
    adapter.merge_weights()
    torch.testing.assert_close(conv(x), y)
    adapter.unmerge_weights()
    assert torch.equal(conv.weight, before) and adapter.weight is conv.weight


# -- masks (seed 6, 13, 14, 15) ----------------------------------------------------------------------------------------


def test_fractions_are_kept_as_given_and_a_decay_ends_at_zero():
    adapter = make()
    for step in range(99, -1, -1):
        adapter.set_masks(torch.full((10,), step / 100))
        assert adapter.mask_in[0].item() == pytest.approx(step / 100)
    assert (adapter.mask_in == 0).all()


@pytest.mark.parametrize(
    "bad,error,match",
    [
        (torch.ones(1), ValueError, r"mask_out must have shape \[7\], got \[1\]"),
        (torch.full((7,), float("nan")), ValueError, r"mask_out must hold values in \[0, 1\]"),
        (torch.full((7,), 1.5), ValueError, r"got values from 1.5 to 1.5"),
        (torch.full((7,), -0.1), ValueError, "mask_out"),
        (torch.ones(7, dtype=torch.bool), TypeError, "mask_out must be floating"),
        (torch.ones(7, device="meta"), ValueError, "mask_out must be on the module's device cpu, got meta"),
        ([1.0] * 7, TypeError, "mask_out must be a Tensor, got list"),
    ],
)
def test_a_bad_mask_leaves_both_as_they_were(bad, error, match):
    adapter = make()
    adapter.set_masks(*masks())
    before = adapter.get_masks()
    with pytest.raises(error, match=match):
        adapter.set_masks(torch.zeros(10), bad)
    assert all(map(torch.equal, before, adapter.get_masks()))
    x = torch.randn(2, 10, dtype=torch.float64)
    if isinstance(bad, torch.Tensor) and bad.dtype != torch.float32 or not isinstance(bad, torch.Tensor) or bad.shape != (7,):
        with pytest.raises(error):
            adapter(x, mask_out=bad)


def test_get_masks_are_copies():
    adapter = make()
    adapter.get_masks()[0].zero_()
    assert (adapter.mask_in == 1).all()


def test_masks_written_by_others_act_even_where_they_were_known_to_be_ones():
    adapter = make()
    x = torch.randn(2, 10, dtype=torch.float64)
    adapter(x)
    adapter.mask_out.data[:] = 1  # unseen by the version counter, and harmless
    with torch.no_grad():
        adapter.mask_out[2] = 0  # DDP broadcasts buffers like this
    assert (adapter(x)[:, 2] == 0).all()


def test_sparsity_counts_the_weight():
    adapter = make()
    m_in, m_out = torch.ones(10), torch.ones(7)
    m_in[:5] = 0
    adapter.set_masks(m_in, m_out)
    assert adapter.get_sparsity_stats()["weight_sparsity"] == 0.5
    wide = APTAdapter(8, 4, 2)
    wide.set_masks(torch.tensor([0.0, 1] * 4), torch.tensor([0, 0.2, 0, 1]))
    stats = wide.get_sparsity_stats()
    assert stats["weight_sparsity"] == stats["overall_sparsity"] == 0.75
    assert (stats["active_input_dims"], stats["active_output_dims"], stats["rank"]) == (4, 2, 2)
    assert stats["total_params"] == wide.get_parameter_count() == 2 * 12 and wide.get_current_rank() == 2


def test_reset_parameters_resets_masks():
    adapter = make()
    adapter.set_masks(*masks())
    adapter.reset_parameters()
    assert (adapter.mask_in == 1).all() and (adapter.lora_B == 0).all()


# -- gradients (seed 12) -----------------------------------------------------------------------------------------------


def test_apply_grad_mask_zeroes_pruned_and_scales_nothing(device):
    adapter = make(device)
    adapter.set_masks(*masks(device))
    adapter.lora_A.grad, adapter.lora_B.grad = torch.ones_like(adapter.lora_A), torch.ones_like(adapter.lora_B)
    adapter.lora_A.grad[:, 1] = float("nan")
    adapter.apply_grad_mask()
    assert torch.equal(adapter.lora_A.grad[0], (adapter.mask_in != 0).double())
    assert torch.equal(adapter.lora_B.grad[:, 0], (adapter.mask_out != 0).double())


def test_hold_pruned_keeps_pruned_entries_through_momentum_and_decay():
    adapter = make()
    optimizer = torch.optim.AdamW([adapter.lora_A, adapter.lora_B], lr=0.1, weight_decay=0.5)
    x = torch.randn(8, 10, dtype=torch.float64)
    for _ in range(3):
        adapter(x).square().sum().backward()
        optimizer.step()
    adapter.set_masks(*masks())
    handle = apt_ext.hold_pruned(optimizer, adapter)
    before = adapter.lora_A.detach().clone(), adapter.lora_B.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        adapter(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(adapter.lora_A[:, [1, 6]], before[0][:, [1, 6]]) and torch.equal(adapter.lora_B[[0, 5]], before[1][[0, 5]])
    assert not torch.equal(adapter.lora_A[:, 0], before[0][:, 0])
    assert (optimizer.state[adapter.lora_A]["exp_avg"][:, [1, 6]] == 0).all()
    handle.remove()
    optimizer.step()
    assert not torch.equal(adapter.lora_A[:, 1], before[0][:, 1])


def test_dropout_acts_on_the_low_rank_input_only():
    adapter = make(dropout=0.5)
    adapter.set_masks(*masks())
    x = torch.randn(1000, 10, dtype=torch.float64)
    adapter.eval()
    still = adapter(x)
    torch.testing.assert_close(still, expected(adapter, x))
    adapter.train()
    torch.manual_seed(3)
    got = adapter(x)
    torch.manual_seed(3)
    keep = ops.dropout_mask(x.shape, 0.5, ops.drawn_rng(x))
    factors = adapter.lora_A, adapter.lora_B
    want = reference.apt_linear(x, adapter.weight, adapter.bias, *factors, *masks(), adapter.scaling, 0.5, keep=keep)
    torch.testing.assert_close(got, want)
    assert not torch.equal(got, still)


def test_compiled_training_never_recompiles_across_masks_and_ranks():
    adapter = make(dtype=torch.float32, max_rank=7)
    compiled = torch.compile(adapter, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 10)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(8):
            y = compiled(x)
            torch.testing.assert_close(y, expected(adapter, x))
            y.sum().backward()
            adapter.set_masks(torch.rand(10), (torch.rand(7) > 0.3).float())
            if i < 4:
                adapter.increase_rank(adapter.rank + 1)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")  # the warm-up runs on a side stream
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_training_step_in_one_cuda_graph_sees_new_masks_and_ranks(dtype):
    adapter = APTAdapter.from_linear(nn.Linear(64, 48, device="cuda", dtype=dtype), 4, max_rank=16)
    x, grad = torch.randn(32, 64, device="cuda").to(dtype).requires_grad_(), torch.randn(32, 48, device="cuda").to(dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(adapter(x), (x, adapter.lora_A, adapter.lora_B), grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = adapter(x)
        grads = torch.autograd.grad(y, (x, adapter.lora_A, adapter.lora_B), grad)
    for i in range(4):
        with torch.no_grad():
            adapter.lora_B[:, : adapter.rank].normal_()
        adapter.set_masks((torch.rand(64, device="cuda") > 0.3).float(), torch.rand(48, device="cuda"))
        adapter.increase_rank(6 + 2 * i)
        graph.replay()
        eager = adapter(x)
        for got, want in zip((y, *grads), (eager, *torch.autograd.grad(eager, (x, adapter.lora_A, adapter.lora_B), grad)), strict=True):
            assert_accurate(got, want.double(), want.double().abs() + 1e-6, dtype)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_current_stream_is_used():
    adapter = APTAdapter.from_linear(nn.Linear(512, 512, device="cuda"), 8)
    with torch.no_grad():
        adapter.lora_B.normal_()
    mask = (torch.rand(512, device="cuda") > 0.5).float()
    adapter.set_masks(mask, mask)
    x = torch.randn(256, 512, device="cuda")
    want = adapter(2 * x)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # a kernel on another stream would read x too early
        late = x * 2
        got = adapter(late)
        merged = adapter.weight.detach().clone() * 1
        apt_ext.ops.merge_(merged, adapter.lora_A, adapter.lora_B, 2.0, mask, mask, False)
    torch.cuda.synchronize()
    torch.testing.assert_close(got, want)
    assert_accurate(nn.functional.linear(2 * x, merged) + mask * adapter.bias, want.double(), 50 * want.double().abs(), torch.float32)


def test_a_weight_that_is_computed_takes_part():
    """Parametrised or set as plain attributes (FSDP's views): forward computes with what the base layer answers."""
    base = nn.Linear(6, 5)
    adapter = APTAdapter.from_linear(base, 2)
    x = torch.randn(3, 6)
    nn.utils.parametrize.register_parametrization(base, "weight", Twice())
    assert torch.allclose(adapter(x), base(x))
    nn.utils.parametrize.remove_parametrizations(base, "weight", leave_parametrized=False)
    weight, bias = base.weight.detach() * 3, base.bias.detach() * 3
    del base.weight, base.bias
    base.weight, base.bias = weight, bias
    assert torch.allclose(adapter(x), nn.functional.linear(x, weight, bias))


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_sparsity_on_meta_is_refused_in_words():
    adapter = APTAdapter(4, 6, 2, device="meta")
    with pytest.raises(RuntimeError, match=r"get_sparsity_stats of APTAdapter\(4, 6\): expected masks with values, got them on meta"):
        adapter.get_sparsity_stats()
