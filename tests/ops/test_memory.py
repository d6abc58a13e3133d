"""Ops touch their operands' elements and nothing else: no neighbour, no element twice, no fresh memory, no byte too many for long."""

import copy
import gc
import io
import os

import pytest
import torch
from guard_bands import banded, bits, outside
from problems import Problem, assert_accurate
from torch import nn

from apt_ext import APTAdapter, APTConfig, APTModel, adapters, get_apt_model, ops, reference, shrink

# -- guard bands ---------------------------------------------------------------------------------------------------------


SHAPES = [((5,), 7, 9, 3), ((2, 3), 16, 24, 8), ((33,), 72, 130, 17), ((1,), 1, 1, 1)]
LAYOUT = pytest.mark.parametrize("layout", ["inner slice", "stretch"])


@LAYOUT
@pytest.mark.parametrize("shape,N,K,R", SHAPES)
def test_apt_linear_stays_within_its_operands(device, dtype, shape, N, K, R, layout):
    p = Problem(shape, N, K, R, dtype, device, "soft")
    names = ("x", "grad", "weight", "bias", "lora_A", "lora_B", "mask_in", "mask_out")
    held = {name: banded(getattr(p, name), layout) for name in names}
    before = {name: bits(buffer) for name, (_, buffer) in held.items()}
    view = {name: value for name, (value, _) in held.items()}
    x, A, B, b = (view[name].detach().requires_grad_() for name in ("x", "lora_A", "lora_B", "bias"))
    y = ops.apt_linear(x, view["weight"], b, A, B, view["mask_in"], view["mask_out"], p.scaling)
    grads = torch.autograd.grad(y, (x, A, B, b), view["grad"])
    p.check({"y": y.detach(), **dict(zip(("dx", "dA", "dB", "db"), grads, strict=True))})  # a NaN read from a band would show
    for name, (_, buffer) in held.items():
        assert torch.equal(bits(buffer), before[name]), name


@LAYOUT
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape,N,K,R", SHAPES)
def test_merge_stays_within_the_weight(device, dtype, shape, N, K, R, layout, transposed):
    p = Problem(shape, N, K, R, dtype, device, "soft")
    W, buffer = banded(p.weight.t() if transposed else p.weight, layout)
    around, W = outside(W, buffer), W.t() if transposed else W
    held = {name: banded(getattr(p, name), layout) for name in ("lora_A", "lora_B", "mask_in", "mask_out")}
    before = {name: bits(buffer) for name, (_, buffer) in held.items()}
    ops.merge_(W, held["lora_A"][0], held["lora_B"][0], p.scaling, held["mask_in"][0], held["mask_out"][0])
    operands = [t.double().cpu() for t in (p.weight, p.lora_A, p.lora_B)]
    both = [p.mask_in.double().cpu(), p.mask_out.double().cpu()]
    expected = reference.merge_(operands[0].clone(), *operands[1:], p.scaling, *both)
    assert_accurate(W, expected, reference.merge_(operands[0].abs(), operands[1].abs(), operands[2].abs(), p.scaling, *both), dtype)
    assert torch.equal(outside(W.t() if transposed else W, buffer), around)
    for name, (_, buffer) in held.items():
        assert torch.equal(bits(buffer), before[name]), name


@LAYOUT
def test_mask_grads_stays_within_the_gradients(device, dtype, layout):
    shapes = [((7, 9), 1), ((7, 9), 0), ((130,), 0), ((3, 5, 4), 1), ((1, 1), 0), ((40, 600), 1)]
    grads, held_masks, expected, dims = [], [], [], []
    for shape, dim in shapes:
        grad, mask = torch.randn(shape).to(dtype), (torch.rand(shape[dim]) > 0.4).float() * torch.rand(shape[dim])
        expected.append(reference.scale_lanes(grad, mask, dim))
        grads.append(banded(grad.to(device), layout))
        held_masks.append(banded(mask.to(device), layout))
        dims.append(dim)
    around, before = [outside(*held) for held in grads], [bits(buffer) for _, buffer in held_masks]
    ops.mask_grads_([view for view, _ in grads], [view for view, _ in held_masks], dims)
    for (view, buffer), want, edge in zip(grads, expected, around, strict=True):
        torch.testing.assert_close(view.cpu(), want)
        assert torch.equal(outside(view, buffer), edge)
    for (_, buffer), was in zip(held_masks, before, strict=True):
        assert torch.equal(bits(buffer), was)


# -- overlap -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size,stride", [((4, 6), (0, 1)), ((4, 6), (6, 0)), ((4, 6), (2, 1)), ((4, 6), (1, 1)), ((4, 6), (5, 1))])
def test_what_is_written_may_not_overlap_itself(device, size, stride):
    buffer = torch.randn(100, device=device)
    before, W = buffer.clone(), buffer.as_strided(size, stride)
    with pytest.raises(RuntimeError, match="weight is written, .* single memory location"):
        ops.merge_(W, torch.randn(2, 6, device=device), torch.randn(4, 2, device=device), 1.0)
    with pytest.raises(RuntimeError, match=r"grads\[1\] is written, .* single memory location"):
        ops.mask_grads_([torch.randn(4, 6, device=device), W], [torch.ones(6, device=device)] * 2, [1, 1])
    assert torch.equal(buffer, before)


@pytest.mark.parametrize(
    "size,stride", [((4, 6), (6, 1)), ((4, 6), (1, 4)), ((4, 6), (9, 1)), ((4, 6), (20, 3)), ((1, 6), (0, 1)), ((4, 1), (1, 0))]
)
def test_any_other_strides_are_right(device, size, stride):
    p = Problem((1,), *size, 2, torch.float32, device, "soft")
    W = torch.zeros(100, device=device).as_strided(size, stride).copy_(p.weight)
    expected = reference.merge_(p.weight.clone(), p.lora_A, p.lora_B, 1.5, p.mask_in, p.mask_out)
    torch.testing.assert_close(ops.merge_(W, p.lora_A, p.lora_B, 1.5, p.mask_in, p.mask_out), expected)
    expected = reference.scale_lanes(W.clone(), p.mask_out, 0)
    ops.mask_grads_([W], [p.mask_out], [0])
    torch.testing.assert_close(W, expected)


def test_what_is_written_may_not_share_memory_with_what_is_read(device):
    buffer = torch.randn(400, device=device)
    before = buffer.clone()
    W, A, B = buffer[:24].view(4, 6), torch.randn(2, 6, device=device), torch.randn(4, 2, device=device)
    wide = buffer.view(20, 20)[:4, :6]  # rows with other elements between them
    grad, ones = torch.randn(4, 6, device=device), torch.ones(6, device=device)
    for call, match in (
        (lambda: ops.merge_(W, W[:2], B, 1.0), "lora_A must not share memory with weight"),
        (lambda: ops.merge_(W, A, buffer[20:28].view(4, 2), 1.0), "lora_B must not share memory with weight"),
        (lambda: ops.merge_(wide, buffer[60:72].view(2, 6), B, 1.0, check=False), "lora_A must not share memory with weight"),
        (lambda: ops.merge_(W, A, B, 1.0, W[0]), "mask_in must not share memory with weight"),
        (lambda: ops.merge_(W, A, B, 1.0, None, W[:, 0]), "mask_out must not share memory with weight"),
        (lambda: ops.mask_grads_([W, grad], [ones, W[1]], [1, 1]), "masks must not share memory with grads"),
        (lambda: ops.mask_grads_([W], [W[0]], [1]), "masks must not share memory with grads"),
        (lambda: ops.mask_grads_([W, grad, W], [ones] * 3, [1, 1, 1]), "grads must be distinct tensors, got two that share memory"),
        (lambda: ops.mask_grads_([W, buffer[20:30]], [ones, ones.new_ones(10)], [1, 0]), "two that share memory"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    assert torch.equal(buffer, before)
    ops.mask_grads_([buffer[:24].view(4, 6), buffer[24:48].view(4, 6)], [ones, ones], [1, 1])  # neighbours
    ops.merge_(W, buffer[24:36].view(2, 6), buffer[36:44].view(4, 2), 1.0, buffer[44:50].abs())


# -- fresh memory --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_fresh_memory_is_never_read(device, dtype):
    """torch fills what it allocates with NaN here, at::empty in C++ too. On the CPU every test runs like this (see conftest)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.isnan(torch.empty(100, device=device)).all()
        for shape, N, K, R in [*SHAPES, ((0,), 4, 5, 2), ((3,), 4, 0, 0), ((3,), 6, 5, 0)]:
            for kind in ("none", "soft", "zero"):
                p = Problem(shape, N, K, R, dtype, device, kind)
                p.check(p.run(ops.apt_linear))
                merged = ops.merge_(p.weight.clone(), p.lora_A, p.lora_B, 0.1, p.mask_in, p.mask_out)
                assert torch.isfinite(merged).all()
    finally:
        torch.use_deterministic_algorithms(False)  # as the fixture of conftest leaves it


# -- cycles --------------------------------------------------------------------------------------------------------------


def resident():
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def wide(device):
    """An adapter whose weight, 160 kB, would be missed soon."""
    return APTAdapter.from_linear(nn.Linear(200, 100, device=device, dtype=torch.float64), 3)


def cycle(adapter, x):
    """Train, grow, prune, merge, save, load into a copy; the adapter ends as it began."""
    optimizer = torch.optim.AdamW([adapter.lora_A, adapter.lora_B])
    adapter(x).square().sum().backward()
    optimizer.step()
    adapter.increase_rank(5, optimizer=optimizer)
    adapter.set_masks(torch.rand(200, device=x.device), torch.rand(100, device=x.device))
    adapter(x).square().sum().backward()
    optimizer.step()
    adapter.merge_weights()
    file = io.BytesIO()
    torch.save(adapter.state_dict(), file)
    other = copy.deepcopy(adapter)
    adapter.unmerge_weights()
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    adapter.load_state_dict(wide(x.device).state_dict())
    adapter.zero_grad()


@pytest.mark.parametrize("count", [pytest.param(100, id="100"), pytest.param(2000, marks=pytest.mark.slow, id="2000")])
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
def test_cycles_leave_nothing_behind(device, count):
    adapter, x = wide(device), torch.randn(4, 200, dtype=torch.float64, device=device)
    for _ in range(30):
        cycle(adapter, x)
    gc.collect()
    before, objects = resident(), len(gc.get_objects())
    on_device = torch.cuda.memory_allocated() if device == "cuda" else 0
    for _ in range(count):
        cycle(adapter, x)
    gc.collect()
    assert len(gc.get_objects()) - objects < 50
    assert resident() - before < 8 << 20  # the allocator's own settling; one weight a cycle would be twice that
    assert (torch.cuda.memory_allocated() if device == "cuda" else 0) == on_device


@pytest.mark.parametrize("count", [pytest.param(15, id="15"), pytest.param(2000, marks=pytest.mark.slow, id="2000")])
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
def test_cycles_of_a_model_leave_nothing_behind(tmp_path, count):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=2000, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128, max_position_embeddings=32
    )
    targets = ["query", "value", "intermediate.dense", "output.dense"]
    base = transformers.BertForSequenceClassification(config)  # 600 kB, mostly embeddings

    def one():
        model = get_apt_model(copy.deepcopy(base), APTConfig(r=2, lora_alpha=4, target_modules=targets))
        for _, adapter in adapters(model):
            if adapter.rank:
                adapter.increase_rank(3)
        model.set_block_mask("0.neurons", (torch.arange(128) % 3 != 0).float())
        for _, adapter in adapters(model):
            adapter.merge_weights()
            adapter.unmerge_weights()
        model.save_pretrained(tmp_path / "saved")
        APTModel.from_pretrained(copy.deepcopy(base), tmp_path / "saved")
        shrink(model)
        model.cut()

    for _ in range(10):
        one()
    gc.collect()
    before, objects = resident(), len(gc.get_objects())
    for _ in range(count):
        one()
    gc.collect()
    assert len(gc.get_objects()) - objects < 200
    assert resident() - before < 8 << 20


# -- more than 2^31 elements ---------------------------------------------------------------------------------------------


def far(tensor, stride=1 << 31):
    """`tensor` [rows, cols] with rows 2^31 elements apart: offsets that 32 bits cannot hold, in memory that is mostly never touched."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        buffer = tensor.new_empty((len(tensor) - 1) * stride + tensor.shape[1])
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
    return buffer.as_strided(tensor.shape, (stride, 1)).copy_(tensor)


@pytest.mark.parametrize("operand", ["x", "grad", "weight", "lora_A", "lora_B"])
def test_offsets_beyond_31_bits(device, operand):
    p = Problem((2,), 2, 3, 2, torch.bfloat16, device, "soft")
    setattr(p, operand, far(getattr(p, operand)))
    leaves = {name: t if t.stride(0) > 9 else t.clone() for name in ("x", "lora_A", "lora_B") for t in [getattr(p, name)]}
    x, A, B = (t.detach().requires_grad_() for t in leaves.values())
    y = ops.apt_linear(x, p.weight, p.bias, A, B, p.mask_in, p.mask_out, p.scaling)
    grads = torch.autograd.grad(y, (x, A, B), p.grad)
    p.check({"y": y.detach(), "dx": grads[0], "dA": grads[1], "dB": grads[2], "db": p.run(ops.apt_linear)["db"]})


def test_written_offsets_beyond_31_bits(device):
    p = Problem((2,), 2, 3, 2, torch.bfloat16, device, "soft")
    expected = reference.merge_(p.weight.double(), p.lora_A.double(), p.lora_B.double(), 1.5, p.mask_in, p.mask_out)
    torch.testing.assert_close(
        ops.merge_(far(p.weight), p.lora_A, p.lora_B, 1.5, p.mask_in, p.mask_out).double(), expected, rtol=1e-2, atol=1e-2
    )
    torch.testing.assert_close(
        ops.merge_(far(p.weight.t().contiguous()).t(), p.lora_A, p.lora_B, 1.5, p.mask_in, p.mask_out).double(),
        expected,
        rtol=1e-2,
        atol=1e-2,
    )
    grad = far(p.grad)
    expected = reference.scale_lanes(p.grad, p.mask_out, 1)
    ops.mask_grads_([grad], [p.mask_out], [1])
    torch.testing.assert_close(grad, expected)
