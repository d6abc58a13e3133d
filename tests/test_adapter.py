"""APTAdapter: Eq. 2, masks, ranks, state; and every defect of the seed as a test that fails on the seed's behaviour."""

import copy
import io
import pickle

import pytest
import torch
from conftest import assert_accurate
from torch import nn
from torch.utils.checkpoint import checkpoint

import apt_ext
from apt_ext import APTAdapter, reference


def make(device="cpu", dtype=torch.float64, rank=3, trained=True, bias=True, **options):
    linear = nn.Linear(10, 7, bias=bias, device=device, dtype=dtype)
    adapter = APTAdapter.from_linear(linear, rank, **options)
    if trained:
        with torch.no_grad():
            adapter.lora_B[:, :rank].normal_()
    return adapter


def masks(device="cpu"):
    m_in = torch.tensor([1, 0, 1, 0.5, 1, 1, 0, 1, 0.01, 1], device=device)
    m_out = torch.tensor([0, 1, 1, 0.37, 1, 0, 1], device=device)
    return m_in, m_out


def expected(adapter, x, m_in=None, m_out=None):
    m_in = adapter.mask_in if m_in is None else m_in
    m_out = adapter.mask_out if m_out is None else m_out
    return reference.apt_linear(x, adapter._matrix(), adapter.bias, adapter.Wa, adapter.Wb, m_in, m_out, adapter.scaling)


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


def test_init_is_gaussian_of_the_stated_deviation():
    adapter = APTAdapter(3000, 64, rank=32)
    assert (adapter.lora_B == 0).all()
    assert adapter.lora_A.std().item() == pytest.approx(1 / (3 * 3000) ** 0.5, rel=0.02)
    assert APTAdapter(3000, 64, rank=32, init_std=0.5).lora_A.std().item() == pytest.approx(0.5, rel=0.02)


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


@pytest.mark.parametrize("reentrant", [False, True])
def test_masks_changed_before_a_recomputation_are_an_error(reentrant):
    adapter = make()
    x = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    adapter.set_masks(torch.full((10,), 0.5))
    plain = torch.autograd.grad(adapter(x).sum(), adapter.lora_A)[0]
    checkpoint(adapter, x, use_reentrant=reentrant).sum().backward()
    torch.testing.assert_close(adapter.lora_A.grad, plain)
    y = checkpoint(adapter, x, use_reentrant=reentrant)
    adapter.set_masks(torch.zeros(10))
    with pytest.raises((RuntimeError, torch.utils.checkpoint.CheckpointError), match="masks changed|different metadata"):
        y.sum().backward()
    first = checkpoint(adapter, x, use_reentrant=reentrant)
    first.sum().backward()


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
    dropped = nn.functional.dropout(x, 0.5)
    none = adapter.lora_A[:0], adapter.lora_B[:, :0]
    want = reference.apt_linear(x, adapter.weight, adapter.bias, *none, *masks()) + reference.apt_linear(
        dropped, None, None, adapter.lora_A, adapter.lora_B, *masks(), adapter.scaling
    )
    torch.testing.assert_close(got, want)
    assert not torch.equal(got, still)


# -- merge (seed 3) ----------------------------------------------------------------------------------------------------


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


# -- growth (seed 4, 5, 9, 10, 11, 16) ---------------------------------------------------------------------------------


@pytest.mark.parametrize("max_rank", [None, 6])
def test_growth_keeps_output_identity_and_optimizer(device, max_rank):
    adapter = make(device, max_rank=max_rank)
    adapter.lora_A.requires_grad_(False)
    optimizer = torch.optim.AdamW([adapter.lora_A, adapter.lora_B], lr=0.01)
    x = torch.randn(8, 10, dtype=torch.float64, device=device)
    adapter.lora_A.requires_grad_(True)
    adapter(x).square().sum().backward()
    optimizer.step()
    A, B = adapter.lora_A, adapter.lora_B
    old_A, old_B, y = adapter.Wa.detach().clone(), adapter.Wb.detach().clone(), adapter(x).detach()
    adapter.increase_rank(5, optimizer=optimizer)
    assert adapter.lora_A is A and adapter.lora_B is B and adapter.rank == 5 and adapter.scaling == 2.0
    assert torch.equal(adapter.Wa[:3], old_A) and torch.equal(adapter.Wb[:, :3], old_B)
    assert (adapter.Wb[:, 3:] == 0).all() and (adapter.Wa[3:] != 0).all()
    if max_rank:
        assert torch.equal(adapter(x), y) and A.shape == (6, 10)
    torch.testing.assert_close(adapter(x), y, rtol=1e-12, atol=1e-12)
    optimizer.zero_grad()
    adapter(x).square().sum().backward()
    optimizer.step()
    assert (adapter.Wb[:, 3:] != 0).any() and optimizer.state[B]["exp_avg"].shape == B.shape
    if max_rank:
        assert (adapter.lora_A[5:] == 0).all() and (adapter.lora_B[:, 5:] == 0).all()


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adagrad", "RMSprop", "Muon"])
def test_reserved_rows_stay_zero_under_any_optimizer(name):
    adapter = make(max_rank=6)
    optimizer = getattr(torch.optim, name)([adapter.lora_A, adapter.lora_B], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        adapter(torch.randn(8, 10, dtype=torch.float64)).square().sum().backward()
        assert (adapter.lora_A.grad[3:] == 0).all() and (adapter.lora_B.grad[:, 3:] == 0).all()
        optimizer.step()
    assert (adapter.lora_A[3:] == 0).all() and (adapter.lora_B[:, 3:] == 0).all()


def test_growth_refusals_leave_everything():
    adapter = make(max_rank=5)
    for rank, error, match in (
        (2, ValueError, "new_rank must lie between rank = 3 and 5"),
        (6, ValueError, "got 6"),
        (True, TypeError, "int"),
    ):
        with pytest.raises(error, match=match):
            adapter.increase_rank(rank)
    with pytest.raises(ValueError, match="between rank = 3 and 7, got 8"):
        make().increase_rank(8)
    with pytest.raises(ValueError, match="init_type must be 'lora' or 'zero'"):
        adapter.increase_rank(4, init_type="random")
    with pytest.raises(TypeError):
        adapter.increase_rank(4, optimizer="adam")
    assert adapter.rank == 3
    adapter.increase_rank(3)
    with pytest.warns(UserWarning, match="cannot learn"):
        adapter.increase_rank(4, init_type="zero")


def test_growth_with_a_generator_is_reproducible():
    rows = []
    for _ in range(2):
        adapter = make()
        adapter.increase_rank(5, generator=torch.Generator().manual_seed(7))
        rows.append(adapter.Wa[3:].detach().clone())
    assert torch.equal(*rows)


def test_a_forgotten_optimizer_raises_and_changes_nothing():
    adapter = make()
    optimizer = torch.optim.AdamW([adapter.lora_A, adapter.lora_B], fused=True)
    x = torch.randn(2, 10, dtype=torch.float64)
    adapter(x).sum().backward()
    optimizer.step()
    adapter.increase_rank(5)
    adapter(x).sum().backward()
    before = adapter.lora_A.detach().clone()
    with pytest.raises(RuntimeError, match="lora_A|exp_avg|shape"):
        optimizer.step()
    assert torch.equal(adapter.lora_A, before)


# -- state (seed 9, 17) ------------------------------------------------------------------------------------------------


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
    good = make(rank=4).state_dict()
    for change, match in (
        ({}, "rank must be at most the module's max_rank = 3, got 4"),
        ({"mask_in": torch.full((10,), 2.0)}, r"rank must be|mask_in must hold"),
        ({"rank": torch.tensor(2), "mask_in": torch.full((10,), float("nan"))}, "mask_in must hold values"),
        ({"rank": torch.tensor(2), "mask_in": torch.ones(3)}, "mask_in must have shape"),
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
