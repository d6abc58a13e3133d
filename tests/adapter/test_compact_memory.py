"""A compacted layer takes the memory of what is kept, through masks, copies, moves, loads and cuts."""

import copy
import logging
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
from families import FAMILIES, adapted, close, mask_all, outputs, some
from small_adapter import expected, make, masks, outcome
from torch import nn

from apt_ext import APTAdapter, adapters
from apt_ext.adapter import packed_room, packed_weight
from apt_ext.adapter.packed_weight import PackedWeight, kept_on_host, width
from apt_ext.adapter.second_copy import say_second_copy
from apt_ext.common import log

DENSE = pytest.mark.parametrize("dense", ["keep", "cpu"])
N, K = 40, 72


def first(count, size):
    return (torch.arange(size) < count).float()


# (kept inputs, kept outputs): down, up, none, all, other ones of as many
SERIES = [(72, 40), (30, 40), (30, 7), (8, 8), (0, 0), (71, 39), (72, 40), (1, 40), (64, 24), (72, 1)]
NEAR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def assert_near(got, want, dtype):
    """By their norms: a sum of rounded terms may be all rounding where it is small."""
    far = (got.double() - want.double()).norm()
    assert got.shape == want.shape and far <= NEAR[dtype] * want.double().norm(), float(far)


def wide(dtype=torch.float64, **options):
    torch.manual_seed(0)
    adapter = APTAdapter.from_linear(nn.Linear(K, N, dtype=dtype), 3, **options)
    with torch.no_grad():
        adapter.lora_B.normal_()
    return adapter


def bytes_of(adapter):
    return adapter.packing.current.packed.untyped_storage().nbytes()


def bytes_kept(adapter):
    """What the kept rows and columns take in whole widths; a vector has 8 values at least."""
    n_in, n_out = (width(int(m.count_nonzero()), len(m)) for m in (adapter.mask_in, adapter.mask_out))
    return max(8, n_in * n_out) * adapter.weight.element_size()


def is_tight(adapter):
    packed = adapter.packing.current.packed
    return bytes_of(adapter) == bytes_kept(adapter) == packed.numel() * packed.element_size()


@DENSE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_at_every_change_of_masks(dense, dtype):
    adapter, twin = wide(dtype), wide(dtype)
    adapter.compact(dense=dense)
    sizes = set()
    for kept_in, kept_out in SERIES:
        for one in (adapter, twin):
            one.set_masks(first(kept_in, K), first(kept_out, N) * 0.5)
        assert is_tight(adapter)
        sizes.add(bytes_of(adapter))
        x = torch.randn(5, K, dtype=dtype, requires_grad=True)
        for got, want in zip(outcome(adapter, x), outcome(twin, x), strict=True):
            assert_near(got, want, dtype)
    assert len(sizes) > 6
    adapter.compact(False)
    assert adapter.packing.current is None and torch.equal(adapter(x), twin(x))


def test_compacted_pruned_it_takes_no_more_from_the_start():
    adapter = wide()
    adapter.set_masks(first(9, K), first(9, N))
    adapter.compact()
    assert bytes_of(adapter) == 16 * 16 * 8


@pytest.mark.parametrize("size", [1, 3, 8, 9])
def test_the_smallest_layers(size):
    adapter = APTAdapter.from_linear(nn.Linear(size, 1), 1)
    x = torch.randn(2, size)
    adapter.compact()
    for count in (size, 0, size // 2, size):
        adapter.set_masks(first(count, size))
        assert is_tight(adapter)
        torch.testing.assert_close(adapter(x), expected(adapter, x))


def test_conv1d_and_no_base_layer():
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(N, K).double()
    bare = APTAdapter(K, N, 3, dtype=torch.float64)
    for adapter in (APTAdapter.from_linear(conv, 3), bare):
        with torch.no_grad():
            adapter.lora_B.normal_()
        adapter.compact()
        for kept_in, kept_out in SERIES:
            adapter.set_masks(first(kept_in, K), first(kept_out, N))
            assert adapter is bare or is_tight(adapter)
            x = torch.randn(4, K, dtype=torch.float64)
            torch.testing.assert_close(adapter(x), expected(adapter, x))


@DENSE
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "half", "double", "state", "merge", "again"])
def test_through_what_happens_to_an_adapter(way, dense):
    adapter = wide(torch.float32)
    adapter.compact(dense=dense)
    adapter.set_masks(first(30, K), first(20, N))
    if way == "deepcopy":
        adapter = copy.deepcopy(adapter)
    elif way == "pickle":
        adapter = pickle.loads(pickle.dumps(adapter))  # noqa: S301
    elif way in ("half", "double"):
        getattr(adapter, way)()
    elif way == "state":
        state = wide(torch.float32).state_dict()
        adapter.load_state_dict({**state, "mask_in": first(60, K), "mask_out": first(40, N)})  # more than now
        assert is_tight(adapter)
        adapter.load_state_dict({**state, "mask_in": first(30, K), "mask_out": first(20, N)})
    elif way == "merge":
        adapter.merge_weights("cpu")
        adapter.unmerge_weights()
    else:
        adapter.compact(dense=dense)
    assert is_tight(adapter)
    whole = copy.deepcopy(adapter)
    whole.compact(False)
    for kept_in, kept_out in ((30, 20), (72, 40), (5, 20)):
        for one in (adapter, whole):
            one.set_masks(first(kept_in, K), first(kept_out, N))
        assert is_tight(adapter)
        x = torch.randn(3, K).to(adapter.lora_A.dtype)
        torch.testing.assert_close(adapter(x), whole(x), rtol=1e-2, atol=5e-2)


def test_masks_that_others_wrote():
    adapter, x = wide(), torch.randn(3, K, dtype=torch.float64)
    adapter.compact()
    adapter.mask_in.data[:50] = 0
    torch.testing.assert_close(adapter(x), expected(adapter, x))
    assert is_tight(adapter)


def test_what_is_gathered_on_the_host_is_what_a_device_would_gather():
    W = torch.randn(N, K)
    for m_in, m_out in ((first(30, K), first(7, N)), (torch.rand(K).round(), torch.ones(N))):
        kept = PackedWeight(m_in, m_out, W)
        indices = kept.index_in, kept.index_out
        found = kept_on_host(W.t().contiguous().t(), *indices, int(kept.kept), len(kept.packed))
        assert torch.equal(found, kept.packed)


# -- not enough memory -----------------------------------------------------------------------------------


def failing(monkeypatch, at=1):
    """From here on the n-th vector for what is kept, and all after it, cannot be had."""
    real, calls = packed_room.room, []

    def room(*arguments):
        calls.append(1)
        if len(calls) >= at:
            raise torch.OutOfMemoryError("planted")
        return real(*arguments)

    monkeypatch.setattr(packed_weight, "room", room)
    return calls


@DENSE
def test_more_that_cannot_be_had_changes_nothing(dense, monkeypatch):
    adapter = wide()
    adapter.set_masks(first(30, K), first(7, N))
    adapter.compact(dense=dense)
    x = torch.randn(3, K, dtype=torch.float64, requires_grad=True)
    want, state = outcome(adapter, x), copy.deepcopy(adapter.state_dict())
    packed = adapter.packing.current.packed
    more = {**state, "mask_in": first(72, K), "lora_A": state["lora_A"] * 2}
    with monkeypatch.context() as patch:
        calls = failing(patch)
        for change in (
            lambda: adapter.set_masks(first(72, K), first(40, N)),
            lambda: adapter.set_masks(mask_out=first(40, N)),
            lambda: adapter.load_state_dict(more),
            lambda: adapter.load_state_dict({**more, "merged": torch.tensor(True)}),
            adapter.reset_parameters,
        ):
            del calls[:]
            with pytest.raises(torch.OutOfMemoryError, match="planted"):
                change()
            assert calls and adapter.packing.current.packed is packed and not adapter.merged
            assert adapter.packing.store.is_offloaded == (dense == "cpu")
            for got, value in zip(outcome(adapter, x), want, strict=True):
                assert torch.equal(got, value)
            after = adapter.state_dict()
            assert all(torch.equal(value, after[key]) for key, value in state.items())
    adapter.set_masks(first(72, K), first(40, N))
    torch.testing.assert_close(adapter(x), expected(wide(), x))


@DENSE
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_a_load_has_its_memory_before_it_writes(dense, assign, merged, monkeypatch):
    """And copies what is kept of the weight that it has loaded."""
    adapter, source = wide(), wide()
    adapter.set_masks(first(30, K), first(7, N))
    adapter.compact(dense=dense)
    with torch.no_grad():
        source.weight.add_(1)
    x = torch.randn(3, K, dtype=torch.float64)
    want = source(x)
    if merged:
        source.merge_weights()
    state = {key: value.clone() for key, value in source.state_dict().items()}
    with monkeypatch.context() as patch:
        calls = failing(patch, at=2)
        adapter.eval().load_state_dict(state, assign=assign)
    assert len(calls) == 1 and adapter.merged == merged
    adapter.unmerge_weights()
    assert is_tight(adapter)
    torch.testing.assert_close(adapter(x), want)


def test_less_that_cannot_be_had_is_done_with_what_there_is(monkeypatch):
    adapter, x = wide(), torch.randn(3, K, dtype=torch.float64)
    adapter.compact()
    with monkeypatch.context() as patch:
        calls, before = failing(patch), adapter.packing.current.packed
        adapter.set_masks(first(30, K), first(7, N))
        assert calls and adapter.packing.current.packed is before
        torch.testing.assert_close(adapter(x), expected(adapter, x))
        adapter.set_masks(first(40, K), first(40, N))  # more, for which there is room
        torch.testing.assert_close(adapter(x), expected(adapter, x))
    adapter.set_masks(first(30, K))
    assert is_tight(adapter)
    torch.testing.assert_close(adapter(x), expected(adapter, x))


@pytest.mark.parametrize("at", [1, 3])
def test_a_block_that_cannot_have_more_is_as_it_was(at, monkeypatch):
    family = FAMILIES["llama"]
    apt = adapted(family)
    mask_all(apt, some(family, apt.blocks, ("heads", "neurons"), "hard"))
    apt.compact(chain=True)
    want, name = outputs(apt, family.inputs()), "0.neurons"
    before = apt.get_block_mask(name)
    sizes = [bytes_of(a) for _, a in adapters(apt) if type(a) is APTAdapter]
    with monkeypatch.context() as patch:
        failing(patch, at)
        with pytest.raises(torch.OutOfMemoryError, match="planted"):
            apt.set_block_mask(name, torch.ones(apt.blocks[name].count))
    assert torch.equal(apt.get_block_mask(name), before)
    assert [bytes_of(a) for _, a in adapters(apt) if type(a) is APTAdapter] == sizes
    for got, value in zip(outputs(apt, family.inputs()), want, strict=True):
        assert torch.equal(got, value)


def test_a_merged_state_that_cannot_be_merged_again_leaves_the_memory_as_it_was(monkeypatch):
    source, adapter = make(), make()
    source.set_masks(first(3, 10))
    source.merge_weights()
    state = source.state_dict()
    state["lora_A"], state["lora_B"] = state["lora_A"] * 1e200, state["lora_B"] * 1e200
    adapter.set_masks(*masks())
    adapter.compact()
    x, packed = torch.randn(4, 10, dtype=torch.float64), adapter.packing.current.packed
    want = adapter(x)
    with monkeypatch.context() as patch:
        failing(patch)
        with pytest.raises(RuntimeError, match="not be finite"):
            adapter.load_state_dict(state)
        assert torch.equal(adapter(x), want) and len(adapter.packing.current.packed) == len(packed)


# -- models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_a_model_takes_what_it_keeps_through_masks_and_a_cut(name, chain):
    family = FAMILIES[name]
    apt = adapted(family)
    apt.compact(chain=chain)

    def compacted():
        return [adapter for _, adapter in adapters(apt) if type(adapter) is APTAdapter]

    held = []
    for how in ("none", "hard", "one", "soft", "hard", "empty", "none", "hard"):
        mask_all(apt, some(family, apt.blocks, ("heads", "neurons"), how))
        assert all(map(is_tight, compacted()))
        held.append(sum(map(bytes_of, compacted())))
    assert held[1] == held[4] == held[7] < held[0] == held[6] and held[5] <= held[2] < held[0]
    want = outputs(apt, family.inputs())
    apt.cut()
    assert all(map(is_tight, compacted()))
    close(outputs(apt, family.inputs()), want)
    close(outputs(copy.deepcopy(apt), family.inputs()), want)


# -- compilers -------------------------------------------------------------------------------------------


class Three(nn.Module):
    """Two of one size, and so with copies of one size as long as they keep as much, and another."""

    def __init__(self):
        super().__init__()
        self.up, self.gate = (APTAdapter.from_linear(nn.Linear(24, 40), 2) for _ in range(2))
        self.down = APTAdapter.from_linear(nn.Linear(40, 9), 2)
        for adapter in self.children():
            with torch.no_grad():
                adapter.lora_B.normal_(0, 0.1)
            adapter.compact()

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)) * self.gate(x))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dynamic", [None, False])
def test_a_copy_that_changes_its_size_compiles_nothing_anew(backend, dynamic, autocast):
    net, frames = Three(), torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(net, fullgraph=True, backend=frames, dynamic=dynamic)
    generator = torch.Generator().manual_seed(0)
    near = {"rtol": 0.1, "atol": 0.5} if autocast else {"rtol": 1e-4, "atol": 1e-4}
    sizes = set()
    for share in (1.0, 0.5, 0.2, 0.0, 0.9, 1.0, 0.03, 0.6):
        for adapter in net.children():
            sides = (adapter.in_features, adapter.out_features)
            adapter.set_masks(*((torch.rand(size, generator=generator) < share).float() for size in sides))
            assert is_tight(adapter)
            sizes.add(bytes_of(adapter))
        x = torch.randn(5, 24)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = compiled(x)
        want = expected(net.down, torch.tanh(expected(net.up, x)) * expected(net.gate, x))
        torch.testing.assert_close(y.float(), want, **near)
        got = torch.autograd.grad(y.float().sum(), (net.up.lora_A, net.down.lora_B))
        for g, w in zip(got, torch.autograd.grad(want.sum(), (net.up.lora_A, net.down.lora_B)), strict=True):
            torch.testing.assert_close(g, w, **near)
    assert len(sizes) > 6 and frames.frame_count == 1


def through_meta(net):
    return net.to("meta").to_empty(device="cpu")


def test_a_moved_or_copied_one_compiles_once():
    for change in (copy.deepcopy, lambda net: net.double().float(), through_meta):
        net = change(Three())
        for adapter in net.children():
            with torch.no_grad():
                adapter.weight.normal_()
                adapter.bias.normal_()
            adapter.reset_parameters()
        frames = torch._dynamo.testing.CompileCounter()
        compiled = torch.compile(net, fullgraph=True, backend=frames)
        for count in (24, 10, 20, 3):
            net.up.set_masks(first(count, 24))
            x = torch.randn(5, 24)
            torch.testing.assert_close(compiled(x), net(x))
        assert frames.frame_count == 1


def test_the_mark_is_that_of_torch():
    marked, vector = torch.empty(9), packed_room.room(9, torch.float32, torch.device("cpu"))
    torch._dynamo.maybe_mark_dynamic(marked, 0)
    assert vars(marked).items() <= vars(vector).items() and vars(marked)


def test_nothing_imports_the_compiler():
    code = (
        "import sys, torch, apt_ext\n"
        "adapter = apt_ext.APTAdapter.from_linear(torch.nn.Linear(24, 40), 2)\n"
        "adapter.compact()\n"
        "adapter.set_masks((torch.arange(24) < 9).float())\n"
        "adapter(torch.ones(2, 24))\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=300)


# -- what is said ----------------------------------------------------------------------------------------


@pytest.fixture
def said(caplog):
    log.forget("second copy")
    caplog.set_level(logging.INFO, "apt_ext")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "apt_ext"]


def test_a_model_says_once_what_a_second_set_of_weights_takes(said, caplog):
    apt = adapted(FAMILIES["llama"])
    apt.compact()
    (line,) = said()
    size = sum(a.weight.numel() * a.weight.element_size() for _, a in adapters(apt) if a.compacted)
    assert f"{size / 2**20:.3g} MiB" in line and "cut()" in line and "after masks are set" in line
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    apt.compact(chain=True)  # again, and quieter: the user knows
    assert len(said()) == 2 and caplog.records[1].levelname == "INFO"
    caplog.clear()
    apt.compact(False)
    mask_all(apt, some(FAMILIES["llama"], apt.blocks, ("heads", "neurons"), "hard"))
    apt.compact()
    copy.deepcopy(apt)
    mask_all(apt, some(FAMILIES["llama"], apt.blocks, ("heads", "neurons"), "none"))
    assert not said()


@pytest.mark.parametrize("kept,is_said", [(128, True), (120, True), (112, False), (8, False)])
def test_an_adapter_says_it_where_nearly_all_is_kept(said, kept, is_said):
    adapter = APTAdapter.from_linear(nn.Linear(128, 16), 1)
    adapter.set_masks(first(kept, 128))
    adapter.compact()
    assert len(said()) == is_said


def test_what_fails_or_has_no_weight_says_nothing(said):
    APTAdapter(8, 8, 1).compact()
    apt = adapted(FAMILIES["bert"])
    list(adapters(apt))[3][1].merge_weights()
    with pytest.raises(RuntimeError, match="merged"):
        apt.compact()
    assert not said()


def test_large_ones_are_said_in_gib_and_weights_elsewhere_are_not(said):
    def like(weight, packed):
        packing = SimpleNamespace(current=SimpleNamespace(packed=packed), source=lambda adapter: weight)
        return SimpleNamespace(packing=packing)

    large = torch.empty(5 << 28, dtype=torch.bfloat16, device="meta")
    say_second_copy([like(large, large)] * 2 + [like(torch.empty(9), large)])
    assert len(said()) == 1 and "5.00 GiB beside the 5.00 GiB" in said()[0]
    say_second_copy([like(torch.empty(9), large)])
    assert len(said()) == 1
