"""The op of a compacted layer against the float64 reference of the masked one: every device, dtype, shape, layout and mask."""

import pytest
import torch
from compact_op import compact_linear, operands
from guard_bands import banded, bits, outside
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import LAYOUTS, MASKS, PADDED_RANK, SHAPES, SOME, ZEROS, gradients_alone, hides_nothing, writes_no_bias
from problems import Problem, assert_accurate

from apt_ext import reference
from apt_ext.adapter.packed_weight import PackedWeight, width


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("shape,N,K,R", SHAPES)
def test_matches_the_masked_full_size_reference(device, dtype, shape, N, K, R, masks):
    problem = Problem(shape, N, K, R, dtype, device, masks)
    got = problem.run(compact_linear)
    problem.check(got)
    if masks != "none":
        pruned_out, pruned_in = problem.mask_out == 0, problem.mask_in == 0
        assert (got["y"][..., pruned_out] == 0).all() and (got["dx"][..., pruned_in] == 0).all()
        assert (got["dA"][:, pruned_in] == 0).all() and (got["dB"][pruned_out] == 0).all() and (got["db"][pruned_out] == 0).all()


@pytest.mark.parametrize("density", [0.03, 0.1, 0.5, 0.97])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("R", [5, 16, 17])
def test_wide_layers_at_every_density(device, dtype, density, R):
    """Several steps of every kernel, and kept lanes nearer and further apart than what one step has room for."""
    problem = Problem((33,), 1096, 2056, R, dtype, device, "soft")
    g = torch.Generator().manual_seed(3)
    for name, size in (("mask_in", 2056), ("mask_out", 1096)):
        mask = (torch.rand(size, generator=g) < density).float()
        mask[size // 2 : size // 2 + 300] = 0.0  # and a gap
        mask[::5] *= 0.5
        setattr(problem, name, mask.to(device))
    problem.check(problem.run(compact_linear))


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("masks", ["hard", "soft", "zero", "one"])
def test_one_side_alone(device, dtype, masks, side):
    problem = Problem((3, 5), 40, 56, 4, dtype, device, masks)
    setattr(problem, f"mask_{side}", None)
    problem.check(problem.run(compact_linear))


@pytest.mark.parametrize("masks", ["hard", "soft"])
def test_more_tokens_than_a_block(device, dtype, masks):
    problem = Problem((2 * 256 * torch.get_num_threads() + 3,), 24, 40, 3, dtype, device, masks)
    problem.check(problem.run(compact_linear))


@pytest.mark.parametrize("masks", ["hard", "soft", "zero", "one"])
def test_poisoned_lanes_never_reach_a_kept_one(device, dtype, masks):
    clean = Problem((2, 9), 24, 33, 5, dtype, device, masks)
    poisoned = clean.poisoned()
    poisoned.weight = clean.weight.clone()
    poisoned.weight[:, clean.mask_in == 0] = float("nan")
    poisoned.weight[clean.mask_out == 0] = float("inf")
    poisoned.check(poisoned.run(compact_linear), clean)


def test_a_nan_in_a_kept_lane_is_not_hidden(device):
    problem = Problem((4,), 8, 8, 2, torch.float32, device, "hard")
    problem.x[1, int((problem.mask_in != 0).nonzero()[0])] = float("nan")
    got = problem.run(compact_linear)
    rows = torch.isnan(got["y"][:, problem.mask_out != 0]).any(1)
    assert rows.tolist() == [False, True, False, False] and (got["y"][:, problem.mask_out == 0] == 0).all()


@pytest.mark.parametrize("scaling", ZEROS)
@pytest.mark.parametrize("weight", [True, False])
def test_a_scaling_of_0_hides_nothing(device, dtype, scaling, weight):
    hides_nothing(compact_linear, device, dtype, scaling, weight)


@pytest.mark.parametrize("weight,bias", [(False, False), (False, True), (True, False)])
def test_weight_and_bias_are_optional(device, dtype, weight, bias):
    problem = Problem((7,), 10, 12, 3, dtype, device, "soft", weight=weight, bias=bias)
    problem.check(problem.run(compact_linear))


@pytest.mark.parametrize("masks", ["none", "soft"])
def test_a_bias_without_a_weight_is_not_written(device, dtype, masks):
    writes_no_bias(compact_linear, Problem((1,), 33, 12, 3, dtype, device, masks, weight=False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens, N, K, R", [(9, 16, 24, 4), (70, 33, 41, 5), (70, 33, 41, 20), (70, 40, 72, 20)])
def test_float32_factors_over_a_16_bit_base(device, dtype, tokens, N, K, R):
    problem = Problem((tokens,), N, K, R, dtype, device, "soft", factor_dtype=torch.float32)
    got = problem.run(compact_linear)
    assert got["y"].dtype == dtype and got["dA"].dtype == got["dB"].dtype == torch.float32
    problem.check(got)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [((16,), 24, 32, 8), PADDED_RANK], ids=["small", "padded rank"])
def test_any_strides(device, dtype, layout, sizes):
    problem = Problem(*sizes, dtype, device, "soft")
    for name in ("x", "grad", "weight", "lora_A", "lora_B"):
        setattr(problem, name, LAYOUTS[layout](getattr(problem, name)))

    def strided(x, weight, bias, A, B, *rest):
        return compact_linear(LAYOUTS[layout](x), weight, bias, LAYOUTS[layout](A), LAYOUTS[layout](B), *rest)

    problem.check(problem.run(strided))


def test_half_range_of_the_low_rank_path(device):
    """x A^T leaves float16's range although s times it, or the result, fits."""
    x, mask = torch.ones(3, 8192, dtype=torch.float16, device=device), torch.ones(8192, device=device)
    mask[1::2] = 0
    A = torch.full((1, 8192), 64.0, dtype=torch.float16, device=device)  # x A^T = 262144
    B = torch.full((8, 1), 0.5, dtype=torch.float16, device=device)
    A_, B_ = A.clone().requires_grad_(), B.clone().requires_grad_()
    y = compact_linear(x, None, None, A_, B_, mask, None, 0.1)
    expected = 0.1 * 262144 * B.double().T.expand(3, 8)
    assert_accurate(y, expected, expected, torch.float16)
    y.backward(torch.full_like(y, 1e-3))
    assert torch.isfinite(A_.grad).all() and torch.isfinite(B_.grad).all()


@pytest.mark.parametrize("asked", SOME)
@pytest.mark.parametrize("sizes", [((20,), 24, 32, 5), PADDED_RANK], ids=["small", "padded rank"])
def test_some_gradients_alone(device, dtype, sizes, asked):
    gradients_alone(compact_linear, Problem(*sizes, dtype, device, "soft", bias=False), asked)


@pytest.mark.parametrize("sizes", [((64,), 48, 56, 8), PADDED_RANK], ids=["small", "padded rank"])
def test_bitwise_the_same_twice(device, dtype, sizes):
    problem = Problem(*sizes, dtype, device, "soft")
    first, second = problem.run(compact_linear), problem.run(compact_linear)
    for name in first:
        assert torch.equal(first[name], second[name]), name


VALUE = st.sampled_from([0.0, 0.0, 1.0, 1.0, 0.25])


@settings(max_examples=60)
@given(data=st.data(), sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)), runs=st.booleans(), bits=st.booleans())
def test_any_masks_one_after_the_other(data, sizes, runs, bits):
    """The same operands through a series of masks, up and down, in runs (blocks) and lane by lane."""
    (N, K), dtype = sizes, torch.bfloat16 if bits else torch.float32
    problem = Problem((5,), N, K, 2, dtype)
    kept = PackedWeight(torch.ones(K), torch.ones(N), problem.weight)

    def draw(size):
        values = data.draw(st.lists(VALUE, min_size=size, max_size=size))
        return torch.tensor([values[j // 16] for j in range(size)] if runs else values)

    for _ in range(3):
        problem.mask_in, problem.mask_out = draw(K), draw(N)
        kept.change(problem.mask_in, problem.mask_out, problem.weight)()
        problem.check(problem.run(lambda x, W, b, A, B, m_in, m_out, s: kept.apply(x, kept.packed, b, A, B, (m_in, m_out), s)))


@pytest.mark.parametrize("masks", ["none", "hard", "soft"])
def test_compact_in_compact_out(device, dtype, masks):
    """x and y as their kept lanes, then zeros: what a chain hands over."""
    problem = Problem((2, 30), 40, 56, 4, dtype, device, masks)

    def chained(x, W, bias, A, B, m_in, m_out, scaling):
        kept, (m_in, m_out) = operands(W, m_in, m_out, 40, 56, device)
        n_in, n_out = (width(int((m != 0).sum()), len(m)) for m in (m_in, m_out))
        index_in, index_out = kept.index_in[:n_in], kept.index_out[:n_out]
        lanes_in, lanes_out = (m.nonzero().flatten() for m in (m_in, m_out))
        narrow = torch.nn.functional.pad(x.index_select(-1, lanes_in), (0, n_in - len(lanes_in)))
        indices = (index_in, index_out, kept.position_in, kept.position_out)
        y = torch.ops.apt_ext.compact_linear(narrow, kept.packed, bias, A, B, m_in, m_out, *indices, kept.kept, scaling, True, True)
        assert y.shape == (2, 30, n_out) and (y[..., len(lanes_out) :] == 0).all()
        return y.new_zeros(2, 30, 40).index_copy(-1, lanes_out, y[..., : len(lanes_out)])

    problem.check(problem.run(chained))


# -- what autograd, compilers and transforms see -----------------------------------------------------------------------


def arguments(problem, leaves=None):
    x, A, B = leaves or (problem.x, problem.lora_A, problem.lora_B)
    kept, masks = operands(problem.weight, problem.mask_in, problem.mask_out, B.shape[0], A.shape[1], problem.device)
    indices = (kept.index_in, kept.index_out, kept.position_in, kept.position_out)
    return x, kept.packed, problem.bias, A, B, *masks, *indices, kept.kept, problem.scaling


@pytest.mark.parametrize("masks", ["none", "soft"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck itself, torch 2.15
def test_opcheck(device, masks):
    problem = Problem((2, 3), 24, 40, 4, torch.float32, device, masks)
    leaves = [t.clone().requires_grad_() for t in (problem.x, problem.lora_A, problem.lora_B)]
    given = arguments(problem, leaves)
    torch.library.opcheck(torch.ops.apt_ext.compact_linear, given)
    plain = arguments(problem)
    torch.library.opcheck(torch.ops.apt_ext.compact_linear_forward, (*plain, False, False))
    _, t = torch.ops.apt_ext.compact_linear_forward(*plain, False, False)
    x, packed, _, *rest = plain
    for need in ([True] * 4, [False, True, False, True]):
        torch.library.opcheck(
            torch.ops.apt_ext.compact_linear_backward,
            (problem.grad, x, packed, *rest[:2], t, *rest[2:], False, False, 0.0, None, False, need),
        )
    torch.library.opcheck(torch.ops.apt_ext.pack_kept_, (packed, problem.weight, plain[7], plain[8], plain[11]))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole_and_once_across_mask_changes(device, backend):
    p = Problem((4,), 24, 40, 3, torch.float32, device, "soft")
    leaves = [t.clone().requires_grad_() for t in (p.x, p.lora_A, p.lora_B)]
    kept, masks = operands(p.weight, p.mask_in, p.mask_out, 24, 40, device)

    def step(x, A, B):
        return kept.apply(x, kept.packed, p.bias, A, B, (p.mask_in, p.mask_out), 1.5).sin().sum()

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    generator = torch.Generator().manual_seed(0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for share in (0.5, 1.0, 0.0, 0.3, 0.1, 0.9):
            for mask, size in ((p.mask_in, 40), (p.mask_out, 24)):
                mask.copy_((torch.rand(size, generator=generator) < share).float() * 0.5)
            kept.change(p.mask_in, p.mask_out, p.weight)()
            got = torch.autograd.grad(compiled(*leaves), leaves)
            want = torch.autograd.grad(
                reference.apt_linear(leaves[0], p.weight, p.bias, *leaves[1:], p.mask_in, p.mask_out, 1.5).sin().sum(), leaves
            )
            for g, w in zip(got, want, strict=True):
                torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


def test_autocast(device):
    p = Problem((5,), 24, 40, 4, torch.float32, device, "soft")
    A, B = p.lora_A.clone().requires_grad_(), p.lora_B.clone().requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        y = compact_linear(p.x, p.weight, p.bias, A, B, p.mask_in, p.mask_out, p.scaling)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert A.grad.dtype == B.grad.dtype == torch.float32
    expected, magnitude = p.oracle(), p.magnitudes()
    assert_accurate(y, expected["y"], magnitude["y"], torch.bfloat16)


def test_gradcheck_and_second_derivatives_are_refused(device):
    p = Problem((4,), 12, 10, 3, torch.float64, device, "soft")
    leaves = [t.clone().requires_grad_() for t in (p.x, p.bias, p.lora_A, p.lora_B)]

    def f(x, b, A, B):
        return compact_linear(x, p.weight, b, A, B, p.mask_in, p.mask_out, 1.3)

    assert torch.autograd.gradcheck(f, leaves)
    with pytest.raises(RuntimeError, match=r"no second derivative .* call compact\(False\)"):
        torch.autograd.grad(f(*leaves).sum(), leaves, create_graph=True)


def test_transforms_are_right(device):
    p = Problem((4,), 12, 10, 3, torch.float64, device, "soft")

    def f(x, op):
        return op(x, p.weight, p.bias, p.lora_A, p.lora_B, p.mask_in, p.mask_out, 1.3)

    given = operands(p.weight, p.mask_in, p.mask_out, 12, 10, device)

    def g(x):
        kept, masks = given
        return kept.apply(x, kept.packed, p.bias, p.lora_A, p.lora_B, masks, 1.3)

    def plain(x):
        return f(x, reference.apt_linear)

    torch.testing.assert_close(torch.func.vmap(g)(p.x), plain(p.x))
    got, expected = (torch.func.grad(lambda x, h=h: h(x).square().sum())(p.x) for h in (g, plain))
    torch.testing.assert_close(got, expected)
    got, expected = (torch.func.jvp(h, (p.x,), (torch.ones_like(p.x),)) for h in (g, plain))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_change_of_zeros_before_the_backward_is_an_error(device):
    p = Problem((4,), 12, 10, 3, torch.float32, device, "hard")
    A = p.lora_A.clone().requires_grad_()
    kept, masks = operands(p.weight, p.mask_in, p.mask_out, 12, 10, device)
    y = kept.apply(p.x, kept.packed, p.bias, A, p.lora_B, masks, 1.0)
    kept.change(torch.ones(10, device=device), masks[1], p.weight)()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


ERRORS = [
    ({"x": lambda v: v[:, :-1]}, ValueError, r"x must have shape \[\.\.\., K=10\] to fit lora_A"),
    ({"packed": lambda v: v[:16]}, ValueError, "packed must hold at least"),
    ({"packed": lambda v: v.double()}, TypeError, "packed must have x's dtype float32, got float64"),
    ({"bias": lambda v: v[1:]}, ValueError, r"bias must have shape \[N=12\], got \[11\]"),
    ({"index_in": lambda v: v.long()}, TypeError, "index_in must be contiguous and int32"),
    ({"index_out": lambda v: v[:1]}, ValueError, "index_out must have at least"),
    ({"position_in": lambda v: v[1:]}, ValueError, r"position_in must have shape \[K=10\]"),
    ({"kept": lambda v: v.int()}, TypeError, "kept must be an int64 tensor without dimensions"),
    ({"kept": lambda v: v + 100}, ValueError, "kept must say at most K=10"),
    ({"packed": lambda v: v.requires_grad_()}, RuntimeError, "packed is a constant"),
]


@pytest.mark.parametrize("change,error,match", ERRORS)
def test_bad_arguments_are_worded(change, error, match):
    names = ("x", "packed", "bias", "lora_A", "lora_B", "mask_in", "mask_out")
    names += ("index_in", "index_out", "position_in", "position_out", "kept", "scaling")
    given = dict(zip(names, arguments(Problem((4,), 12, 10, 3, torch.float32, masks="soft")), strict=True))
    with pytest.raises(error, match=match):
        torch.ops.apt_ext.compact_linear(**{**given, **{name: f(given[name]) for name, f in change.items()}})


@pytest.mark.parametrize("masks", ["none", "soft"])
@pytest.mark.parametrize("layout", ["inner slice", "stretch"])
def test_stays_within_its_operands(device, dtype, layout, masks):
    """Bands of NaN around every operand: none is read, none is written."""
    p = Problem((33,), 72, 130, 17, dtype, device, masks)
    kept, (m_in, m_out) = operands(p.weight, p.mask_in, p.mask_out, 72, 130, device)
    held = {name: banded(getattr(p, name), layout) for name in ("x", "grad", "bias", "lora_A", "lora_B")}
    held |= {"mask_in": banded(m_in, layout), "mask_out": banded(m_out, layout), "packed": banded(kept.packed, "stretch")}
    before = {name: bits(buffer) for name, (_, buffer) in held.items()}
    view = {name: value for name, (value, _) in held.items()}
    leaves = [view[name].detach().requires_grad_() for name in ("x", "lora_A", "lora_B", "bias")]
    x, A, B, b = leaves
    y = kept.apply(x, view["packed"], b, A, B, (view["mask_in"], view["mask_out"]), p.scaling)
    grads = torch.autograd.grad(y, leaves, view["grad"])
    p.check({"y": y.detach(), **dict(zip(("dx", "dA", "dB", "db"), grads, strict=True))})
    for name, (_, buffer) in held.items():
        assert torch.equal(bits(buffer), before[name]), name
    packed, buffer = banded(torch.zeros_like(kept.packed), "stretch")
    edge = outside(packed, buffer)
    torch.ops.apt_ext.pack_kept_(packed, banded(p.weight, layout)[0], kept.index_in, kept.index_out, kept.kept)
    assert torch.equal(outside(packed, buffer), edge)
    used = len(kept.channels_in) * len(kept.channels_out)
    assert torch.equal(packed[:used], kept.packed[:used])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("N", [40, 1096])
def test_places_of_other_masks_lie_beyond_nothing(device, dtype, N):
    """What a captured graph replays after masks rose, or a forward meets in another thread: wrong values, but only its own memory."""
    p = Problem((70,), N, 24, 4, dtype, device, "none")
    many, few = (torch.arange(N, device=device) % step == 0 for step in (1, 4))
    later, before = (PackedWeight(torch.ones(24, device=device), mask.float(), p.weight) for mask in (many, few))
    given = (before.packed, None, p.lora_A, p.lora_B, None, None, before.index_in, before.index_out)
    y = torch.ops.apt_ext.compact_linear(p.x, *given, before.position_in, later.position_out, before.kept, 1.0, False, False)
    width_out = len(before.channels_out)
    assert (y[:, width_out:] == 0).all() and torch.isfinite(y).all() and (y[:, : N // 4] != 0).any()
