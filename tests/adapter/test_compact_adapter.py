"""APTAdapter.compact: the same function through every change of masks, rank, weight and place."""

import copy
import io
import pickle

import pytest
import torch
from small_adapter import expected, make, masks, outcome
from torch import nn
from torch.utils.checkpoint import checkpoint

from apt_ext import APTAdapter, reference

SERIES = [
    lambda n: torch.ones(n),
    lambda n: (torch.arange(n) % 2).float(),
    lambda n: (torch.arange(n) % 3 != 0).float() * 0.5,
    lambda n: torch.zeros(n),
    lambda n: (torch.arange(n) == n // 2).float(),
    lambda n: torch.linspace(0, 1, n),
    lambda n: torch.ones(n),
]


def compacted(device="cpu", **options):
    adapter = make(device, **options)
    adapter.set_masks(*masks(device))
    adapter.compact()
    assert adapter.compacted and "compacted=True" in repr(adapter)
    return adapter


def computes_kept_lanes_only(adapter):
    """Whether the pruned rows and columns of the weight are not read: NaN there would show."""
    W = adapter.weight.detach().clone()
    with torch.no_grad():
        adapter.weight.mul_(torch.where(adapter.mask_in == 0, float("nan"), 1).to(W.dtype))
        y = adapter(torch.ones(2, adapter.in_features, dtype=W.dtype, device=W.device))
        adapter.weight.copy_(W)
    return bool(torch.isfinite(y).all())


@pytest.mark.parametrize("max_rank", [None, 6])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_masked_layer_through_every_mask(device, bias, max_rank):
    adapter, twin = make(device, bias=bias, max_rank=max_rank), None
    twin = copy.deepcopy(adapter)
    adapter.compact()
    for mask in SERIES:
        for which in (("mask_in",), ("mask_out",), ("mask_in", "mask_out")):
            change = {name: mask(10 if name == "mask_in" else 7).to(device) for name in which}
            for one in (adapter, twin):
                one.set_masks(**change)
            x = torch.randn(3, 10, dtype=torch.float64, device=device).requires_grad_()
            results = [outcome(one, x) for one in (adapter, twin)]
            for got, want in zip(*results, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
            assert torch.equal(results[0][1] == 0, results[1][1] == 0)
    adapter.compact(False)
    assert not adapter.compacted and torch.equal(adapter(x), twin(x))


def test_reads_nothing_that_is_pruned(device):
    adapter = compacted(device)
    assert computes_kept_lanes_only(adapter)
    adapter.compact(False)
    assert not computes_kept_lanes_only(adapter)


def test_conv1d(device):
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(7, 10).to(device).double()
    adapter = APTAdapter.from_linear(conv, 3)
    with torch.no_grad():
        adapter.lora_B.normal_()
    adapter.compact()
    adapter.set_masks(*masks(device))
    x = torch.randn(4, 10, dtype=torch.float64, device=device)
    torch.testing.assert_close(adapter(x), expected(adapter, x))


def test_without_a_base_layer(device):
    adapter = APTAdapter(10, 7, 3, device=device, dtype=torch.float64)
    with torch.no_grad():
        adapter.lora_B.normal_()
    adapter.set_masks(*masks(device))
    adapter.compact()
    x = torch.randn(4, 10, dtype=torch.float64, device=device)
    torch.testing.assert_close(adapter(x), expected(adapter, x))


def test_a_change_of_fractions_alone_copies_nothing(device):
    adapter = compacted(device)
    before = adapter.packing.current.packed._version
    m_in, m_out = masks(device)
    adapter.set_masks(m_in * 0.5, m_out * 0.25)
    assert adapter.packing.current.packed._version == before
    x = torch.randn(4, 10, dtype=torch.float64, device=device)
    torch.testing.assert_close(adapter(x), expected(adapter, x))
    m_in[0] = 0
    adapter.set_masks(m_in)
    assert adapter.packing.current.packed._version > before


def test_setting_present_masks_writes_nothing(device):
    """And yet what somebody else has written meanwhile is noticed: the other mask, the weight, a mask that is all ones again."""
    adapter = compacted(device)
    adapter.set_masks(mask_in=torch.ones(10, device=device))
    kept, before = adapter.packing.current, (adapter.mask_in._version, adapter.mask_out._version, adapter.packing.current.packed._version)
    adapter.set_masks(*adapter.get_masks())
    assert (adapter.mask_in._version, adapter.mask_out._version, kept.packed._version) == before and adapter.known_ones()["mask_in"]
    with torch.no_grad():
        adapter.mask_in.copy_(torch.ones(10))
    assert not adapter.known_ones()["mask_in"]
    adapter.set_masks(*adapter.get_masks())
    assert adapter.known_ones()["mask_in"]
    with torch.no_grad():
        adapter.mask_out.copy_((torch.arange(7) % 2).float())
    adapter.set_masks(mask_in=torch.ones(10, device=device))
    fresh = copy.deepcopy(adapter)
    fresh.compact(False)
    fresh.compact()
    x = torch.randn(3, 10, dtype=torch.float64, device=device)
    assert torch.equal(adapter(x), fresh(x)) and torch.equal(kept.kept, fresh.packing.current.kept)
    with torch.no_grad():
        adapter.weight.mul_(2)
    adapter.set_masks(*adapter.get_masks())
    rows = adapter.mask_out.nonzero().flatten()
    held = kept.packed[: len(kept.channels_out) * len(kept.channels_in)].view(len(kept.channels_out), len(kept.channels_in))
    assert torch.equal(held[: len(rows), :10], adapter.weight[rows])
    for one in (adapter, make(device)):
        for value in (0.5, 0.25):
            one.set_masks(mask_in=torch.full((10,), value, device=device))
            assert bool((one.mask_in == value).all())


def test_a_weight_that_somebody_writes_is_copied_again(device):
    adapter, x = compacted(device), torch.randn(4, 10, dtype=torch.float64, device=device)
    with torch.no_grad():
        adapter.weight.mul_(3)
    torch.testing.assert_close(adapter(x), expected(adapter, x))


@pytest.mark.parametrize("moved", [None, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "change",
    [
        lambda layer, W: layer.weight.detach().copy_(W),
        lambda layer, W: setattr(layer.weight, "data", W),
        lambda layer, W: setattr(layer, "weight", nn.Parameter(W, requires_grad=False)),
        lambda layer, W: layer.load_state_dict({"weight": W, "bias": torch.zeros(7, dtype=W.dtype)}),
        lambda layer, W: layer.load_state_dict({"weight": W, "bias": torch.zeros(7, dtype=W.dtype)}, assign=True),
    ],
)
def test_another_weight_is_copied(change, moved):
    adapter = compacted().to(moved)
    dtype = adapter.weight.dtype
    for _ in range(4):  # memory that was given back is used again, at the same address
        change(adapter.base_layer, torch.randn(7, 10, dtype=dtype))
        adapter.weight.requires_grad_(False)
        x = torch.randn(4, 10, dtype=dtype)
        torch.testing.assert_close(adapter(x), expected(adapter, x))


@pytest.mark.parametrize("moved", [torch.float32, torch.float64])
def test_a_move_copies_only_what_was_written_before_it(moved):
    adapter = compacted().to(moved)
    before = adapter.packing.current.packed._version
    x = torch.randn(4, 10, dtype=moved)
    torch.testing.assert_close(adapter(x), expected(adapter, x))
    assert adapter.packing.current.packed._version == before
    with torch.no_grad():
        adapter.weight.mul_(3)
    torch.testing.assert_close(adapter.float()(x.float()), expected(adapter, x.float()))


def test_a_weight_that_asks_for_a_gradient_is_refused(device):
    adapter, x = compacted(device), torch.randn(4, 10, dtype=torch.float64, device=device)
    adapter.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="weight is a constant of a compacted layer"):
        adapter(x)
    with torch.no_grad():
        torch.testing.assert_close(adapter(x), expected(adapter, x))


@pytest.mark.parametrize("is_compacted", [True, False])
def test_functional_call_with_other_tensors(device, is_compacted):
    adapter, x = compacted(device), torch.randn(4, 10, dtype=torch.float64, device=device)
    ones = torch.ones(10, device=device)
    adapter.set_masks(ones, torch.ones(7, device=device))
    adapter.compact(is_compacted)
    for writes in range(6):  # whatever version counter the stand-in has
        m_in, W = ones.clone(), adapter.weight.detach().flip(0)
        for _ in range(writes):
            m_in[3], W[2] = 0, 1
        others = {"mask_in": m_in, "base_layer.weight": W}
        for names in (("mask_in",), ("base_layer.weight",), tuple(others)):
            given = {name: others[name] for name in names}
            mask, weight = given.get("mask_in", ones), given.get("base_layer.weight", adapter.weight)
            want = reference.apt_linear(x, weight, adapter.bias, adapter.Wa, adapter.Wb, mask, adapter.mask_out, adapter.scaling)
            torch.testing.assert_close(torch.func.functional_call(adapter, given, (x,)), want)
        torch.testing.assert_close(adapter(x), expected(adapter, x))


def test_vmap_over_stacked_adapters(device):
    stacked = [compacted(device) for _ in range(3)]
    stacked[1].set_masks(torch.ones(10, device=device), torch.zeros(7, device=device))
    x = torch.randn(4, 10, dtype=torch.float64, device=device)
    parameters, buffers = torch.func.stack_module_state(stacked)

    def call(parameters, buffers):
        return torch.func.functional_call(stacked[0], (parameters, buffers), (x,))

    want = torch.stack([expected(adapter, x) for adapter in stacked])
    torch.testing.assert_close(torch.vmap(call)(parameters, buffers), want)
    own = dict(stacked[0].named_buffers())
    weights = torch.stack([adapter.weight.detach() for adapter in stacked])
    got = torch.vmap(lambda W: torch.func.functional_call(stacked[0], {**own, "base_layer.weight": W}, (x,)))(weights)
    torch.testing.assert_close(got[0], want[0])


def test_overrides_compute_full_size(device):
    adapter, x = compacted(device), torch.randn(4, 10, dtype=torch.float64, device=device)
    m_in = torch.rand(10, device=device)
    torch.testing.assert_close(adapter(x, mask_in=m_in), expected(adapter, x, m_in))
    torch.testing.assert_close(adapter(x), expected(adapter, x))


def test_dropout(device):
    adapter = compacted(device, dropout=0.4)
    twin = copy.deepcopy(adapter)
    twin.compact(False)
    x = torch.randn(64, 10, dtype=torch.float64, device=device)
    results = []
    for one in (adapter, twin):
        torch.manual_seed(3)
        results.append(one(x))
    torch.testing.assert_close(*results)
    assert not torch.allclose(results[0], adapter.eval()(x))


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_compacted_and_on_their_own(device, way):
    adapter, x = compacted(device), torch.randn(4, 10, dtype=torch.float64, device=device)
    if way == "deepcopy":
        other = copy.deepcopy(adapter)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(adapter))  # noqa: S301
        assert len(pickle.dumps(adapter)) < len(pickle.dumps(make(device))) + 200  # nothing of it is stored
    else:
        file = io.BytesIO()
        torch.save(adapter, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)  # noqa: S614
    assert other.compacted and computes_kept_lanes_only(other)
    want = expected(adapter, x)
    other.set_masks(torch.ones(10, device=device), torch.zeros(7, device=device))
    torch.testing.assert_close(adapter(x), want)
    assert (other(x) == 0).all()


def test_a_state_dict_holds_nothing_of_it(device):
    adapter, x = compacted(device), torch.randn(4, 10, dtype=torch.float64, device=device)
    state = {name: value.clone() for name, value in adapter.state_dict().items()}
    plain = make(device)
    assert list(state) == list(plain.state_dict()) and {n for n, _ in adapter.named_buffers()} == {"mask_in", "mask_out"}
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(x), adapter(x))
    assert not plain.compacted
    other = compacted(device)  # another weight, the same masks
    other.set_masks(torch.ones(10, device=device))
    other.load_state_dict(state)
    assert other.compacted and computes_kept_lanes_only(other)
    torch.testing.assert_close(other(x), adapter(x))
    for bad in ({"mask_in": torch.full((10,), 2.0)}, {"lora_A": torch.zeros(3, 11)}):
        with pytest.raises(ValueError):
            other.load_state_dict({**state, **bad})
        torch.testing.assert_close(other(x), adapter(x))


@pytest.mark.parametrize("keep", ["device", "cpu"])
def test_merge_and_unmerge(device, keep):
    adapter, x = compacted(device), torch.randn(4, 10, dtype=torch.float64, device=device)
    want, before = expected(adapter, x), adapter.weight.clone()
    adapter.merge_weights(keep)
    torch.testing.assert_close(adapter.eval()(x), want)
    torch.testing.assert_close(adapter.base_layer(x), want)
    for on in (True, False):
        with pytest.raises(RuntimeError, match="merged"):
            adapter.compact(on)
    for other in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):  # noqa: S301
        assert other.merged and other.compacted
        other.unmerge_weights()
        torch.testing.assert_close(other(x), want)
    fresh = compacted(device)
    fresh.load_state_dict(adapter.state_dict())
    assert fresh.merged
    fresh.unmerge_weights()
    torch.testing.assert_close(fresh(x), want)
    adapter.unmerge_weights()
    assert torch.equal(adapter.weight, before) and adapter.compacted
    torch.testing.assert_close(adapter(x), want)


@pytest.mark.parametrize("max_rank", [None, 6])
def test_growth(device, max_rank):
    adapter, x = compacted(device, max_rank=max_rank), torch.randn(4, 10, dtype=torch.float64, device=device)
    optimizer = torch.optim.AdamW([adapter.lora_A, adapter.lora_B], lr=0.1)
    for rank in (3, 4, 6):
        adapter.increase_rank(rank, optimizer=optimizer)
        optimizer.zero_grad()
        adapter(x).square().sum().backward()
        pruned_in, pruned_out = adapter.mask_in == 0, adapter.mask_out == 0
        assert (adapter.lora_A.grad[:, pruned_in] == 0).all() and (adapter.lora_B.grad[pruned_out] == 0).all()
        assert (adapter.lora_A.grad[rank:] == 0).all() and (adapter.lora_B.grad[:, rank:] == 0).all()
        optimizer.step()
        torch.testing.assert_close(adapter(x), expected(adapter, x))


def test_moves(device):
    adapter = compacted(device, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        adapter.to(dtype)
        x = torch.randn(4, 10, dtype=dtype, device=device)
        assert adapter.packing.current.packed.dtype == dtype
        torch.testing.assert_close(adapter(x), expected(adapter, x), rtol=2e-2, atol=2e-2)
        m_in, m_out = masks(device)
        adapter.set_masks(m_in.flip(0), m_out)
        torch.testing.assert_close(adapter(x), expected(adapter, x), rtol=2e-2, atol=2e-2)
        adapter.set_masks(m_in, m_out)
    state = {name: value.clone() for name, value in adapter.state_dict().items()}
    adapter.to("meta").to_empty(device=device)
    adapter.load_state_dict(state)
    torch.testing.assert_close(adapter(x), expected(adapter, x))


def test_memory_without_values(device):
    """`to_empty` leaves nothing in the indices either; they follow from the masks that are set again."""
    adapter = compacted(device)
    state, present = adapter.state_dict(), adapter.get_masks()
    x = torch.randn(4, 10, dtype=torch.float64, device=device)
    y, state = adapter(x), {name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)}
    adapter.to_empty(device=device)
    with torch.no_grad():
        for name, value in adapter.named_parameters():
            value.copy_(state[name])
    adapter.set_masks(*present)
    torch.testing.assert_close(adapter(x), y)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpoints(device, reentrant):
    adapter = compacted(device)
    x = torch.randn(4, 10, dtype=torch.float64, device=device, requires_grad=True)
    want = torch.autograd.grad(adapter(x).square().sum(), (x, adapter.lora_A, adapter.lora_B))
    checkpoint(adapter, x, use_reentrant=reentrant).square().sum().backward()
    for got, w in zip((x.grad, adapter.lora_A.grad, adapter.lora_B.grad), want, strict=True):
        torch.testing.assert_close(got, w)
    y = checkpoint(adapter, x, use_reentrant=reentrant)
    adapter.set_masks(torch.ones(10, device=device))
    with pytest.raises(RuntimeError, match="masks changed|modified by an inplace"):
        y.sum().backward()


def test_a_change_between_forward_and_backward_is_no_wrong_gradient(device):
    adapter, x = compacted(device), torch.randn(4, 10, dtype=torch.float64, device=device)
    y = adapter(x)
    adapter.set_masks(torch.ones(10, device=device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    want = torch.autograd.grad(adapter(x).sum(), adapter.lora_A)[0]
    y = adapter(x)
    adapter.compact(False)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), adapter.lora_A)[0], want)


def test_disabled_is_the_base_layer(device):
    adapter, x = compacted(device), torch.randn(4, 10, dtype=torch.float64, device=device)
    adapter.set_disabled(True)
    assert torch.equal(adapter(x), adapter.base_layer(x))


def test_activation_memory_falls():
    """What a graph keeps of x is what is kept of x."""
    linear = nn.Linear(512, 512)
    kept = {}
    for share in (1, 2, 8):
        adapter = APTAdapter.from_linear(linear, 2)
        mask = (torch.arange(512) % share == 0).float()
        adapter.set_masks(mask, mask)
        adapter.compact()
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, seen=seen: seen.append(t) or t, lambda t: t):
            adapter(torch.randn(64, 512))
        kept[share] = sum(t.numel() for t in seen if t.dim() == 2 and t.shape[0] == 64)
    assert kept[1] == 64 * (512 + 2) and kept[2] == 64 * (256 + 2) and kept[8] == 64 * (64 + 2)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = APTAdapter.from_linear(nn.Linear(24, 40), 2, max_rank=6)
        self.second = APTAdapter.from_linear(nn.Linear(40, 9, bias=False), 1, max_rank=9)
        for adapter in (self.first, self.second):
            adapter.compact()

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))).square().sum()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_step_is_one_graph_through_all_changes(device, backend):
    net = Net().to(device)
    twin = copy.deepcopy(net)
    for adapter in (twin.first, twin.second):
        adapter.compact(False)
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    generator = torch.Generator().manual_seed(0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step, share in enumerate((1.0, 0.5, 0.2, 0.0, 0.9, 1.0)):
            hidden = (torch.rand(40, generator=generator) < share).float().to(device)
            x = torch.randn(5, 24, device=device)
            for n in (net, twin):
                n.first.set_masks((torch.arange(24) != step).float().to(device), hidden)
                n.second.set_masks(hidden * 0.5)
                n.zero_grad()
            losses = [f(x) for f in (compiled, twin)]
            torch.testing.assert_close(*losses)
            for loss in losses:
                loss.backward()
            for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
                if p.requires_grad:
                    torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_refusals(device):
    adapter = make(device)
    with pytest.raises(TypeError, match="on must be a bool, got int"):
        adapter.compact(1)
    with pytest.raises(ValueError, match=r"got 'release', which is gone; cut\(\) gives"):
        adapter.compact(dense="release")
    with pytest.raises(ValueError, match="dense must be 'keep' or 'cpu', got 'gone'"):
        adapter.compact(dense="gone")
    meta = APTAdapter.from_linear(nn.Linear(3, 4, device="meta"), 1)
    with pytest.raises(RuntimeError, match="on meta"):
        meta.compact()
    assert not meta.compacted


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("base", [False, True])
def test_an_x_that_does_not_fit_is_named(compact, base, dropout):
    adapter = make(dtype=torch.float32, dropout=dropout) if base else APTAdapter(10, 7, 3, dropout=dropout)
    adapter.set_masks(*masks())
    adapter.compact(compact)
    for wrong in (3, None, "x", [1.0]):
        with pytest.raises(TypeError, match=f"^x must be a Tensor, got {None if wrong is None else type(wrong).__name__}"):
            adapter(wrong)
    with pytest.raises(TypeError, match="^x must have dtype float32 to fit .*lora_A and lora_B, got float64"):
        adapter(torch.ones(2, 10, dtype=torch.float64))
    if base:
        with pytest.raises(TypeError, match="^x must have dtype float32 to fit weight, lora_A and lora_B, got bfloat16"):
            adapter(torch.ones(2, 10, dtype=torch.bfloat16))


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")  # the profiler itself, torch 2.11
def test_autocast_casts_what_is_in_use():
    adapter = make(dtype=torch.float32)
    adapter.set_masks(torch.ones(10), (torch.arange(7) < 6).float())  # whole widths of 8 by 10
    adapter.compact()
    adapter.packing.current.note_capture()  # so that there is more than what is in use
    x = torch.randn(3, 10)
    for m_in, m_out in ((torch.ones(10), torch.ones(7)), ((torch.arange(10) < 3).float(), torch.ones(7))):
        adapter.set_masks(m_in, m_out)
        used = len(adapter.packing.current.channels_in) * len(adapter.packing.current.channels_out)
        assert used < adapter.packing.current.packed.numel()
        with torch.profiler.profile(record_shapes=True) as profile, torch.autocast("cpu", torch.bfloat16):
            y = adapter(x)
        cast = [event.input_shapes[0] for event in profile.events() if event.name == "aten::_to_copy"]
        assert [used] in cast and [adapter.packing.current.packed.numel()] not in cast, cast
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), expected(adapter, x).float(), rtol=3e-2, atol=3e-2)
