"""Dropout inside the ops: the mask that is drawn, what is computed with it, and that nothing of it is kept."""

import gc
import re
from functools import partial

import pytest
import torch
from compact_op import compact_linear as full_compact
from compact_op import operands
from op_cases import MASKS, SHAPES
from problems import Problem
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from apt_ext import ops, reference

SEEDS = [(3, 4), (-1, 1 << 62), (1 << 40, -7)]


def rng_of(seed=(3, 4), device="cpu"):
    return torch.tensor(seed, device=device)


def dropping(p, rng, op=ops.apt_linear):
    return lambda *given: op(*given, p, rng)


def formula(p, rng, shape):
    """The reference with the mask drawn on the CPU."""
    return partial(reference.apt_linear, dropout=p, keep=reference.dropout_mask(shape, p, rng.cpu()))


def compact_linear(x, W, bias, A, B, m_in, m_out, scaling, dropout, rng):
    kept, masks = operands(W, m_in, m_out, B.shape[0], A.shape[1], x.device)
    return kept.apply(x, kept.packed, bias, A, B, masks, scaling, dropout=dropout, rng=rng)


# -- the mask ----------------------------------------------------------------------------------------------------------


def philox(counter, key, rounds=7):
    a, b, c, d = counter
    (k0, k1), low = key, 0xFFFFFFFF
    for _ in range(rounds):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = second >> 32 ^ b ^ k0, second & low, first >> 32 ^ d ^ k1, first & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return a, b, c, d


def test_the_generator_has_the_published_values():
    """Random123's known answers of philox4x32 with 7 rounds; the first is the mask's, too."""
    ones = 0xFFFFFFFF
    assert philox((0,) * 4, (0, 0)) == (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    assert philox((ones,) * 4, (ones, ones)) == (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox(pi, (0xA4093822, 0x299F31D0)) == (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)


@pytest.mark.parametrize("seed", SEEDS, ids=str)
def test_an_element_is_kept_by_its_own_16_bits(device, seed):
    rng, (s, o) = rng_of(seed, device), (n % (1 << 64) for n in seed)
    for row, channel in ((0, 0), (1, 5), (2, 8), (5, 19), (0, 7)):
        words = philox((channel // 8, row, o & 0xFFFFFFFF, o >> 32), (s & 0xFFFFFFFF, s >> 32))
        drawn = words[channel % 8 // 2] >> 16 * (channel % 2) & 0xFFFF
        for p, kept in ((drawn / 65536, True), ((drawn + 1) / 65536, False)):
            assert bool(ops.dropout_mask((6, 20), min(p, 0.99999), rng)[row, channel]) is (kept or p > 0.99999)


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.05, 0.5, 0.9999999])
@pytest.mark.parametrize("shape", [(7,), (3, 5, 40), (4, 131), (0, 8), (3, 0)], ids=str)
def test_the_op_draws_what_the_reference_says(device, shape, p):
    for seed in SEEDS:
        mask = ops.dropout_mask(shape, p, rng_of(seed, device))
        assert mask.dtype == torch.bool and mask.device.type == device
        assert torch.equal(mask.cpu(), reference.dropout_mask(shape, p, rng_of(seed)))
    assert p > 1e-9 or bool(mask.all())


def test_the_mask_of_an_element_does_not_know_the_shape(device):
    rng = rng_of(device=device)
    whole = ops.dropout_mask((40, 48), 0.3, rng)
    assert torch.equal(ops.dropout_mask((5, 8, 48), 0.3, rng).flatten(0, 1), whole)
    assert torch.equal(ops.dropout_mask((11, 19), 0.3, rng), whole[:11, :19])
    assert torch.equal(ops.dropout_mask((48,), 0.3, rng), whole[0])
    assert torch.equal(ops.dropout_mask((40, 48), 0.3, torch.stack([rng, rng]).t()[:, 1]), whole)  # rng with strides


@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 0.9])
def test_the_share_that_is_dropped(device, p):
    """Of everything, of every channel and of every row: within 5 sigma; 6 where the largest of thousands is looked at."""
    dropped = ~ops.dropout_mask((2048, 1024), p, rng_of(device=device))
    sigma = (p * (1 - p)) ** 0.5
    for dims, bound in (((0, 1), 5), ((0,), 6), ((1,), 6)):
        share = dropped.double().mean(dims)
        count = dropped.numel() / share.numel()
        assert float((share - p).abs().max()) < bound * sigma / count**0.5 + (2**-16 if p < 0.01 else 1e-4)


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_elements_are_not_correlated(device, p):
    """Neighbours, the same place of the next group, rows, and the masks of other seeds and offsets."""
    draw = partial(ops.dropout_mask, (2048, 1024), p)
    own = draw(rng_of((7, 9), device)).double()
    pairs = {f"channels {n} apart": (own[:, n:], own[:, :-n]) for n in (1, 2, 4, 8, 16)}
    pairs |= {f"rows {n} apart": (own[n:], own[:-n]) for n in (1, 2, 8, 16)}
    other = {"seed": (8, 9), "offset": (7, 10), "both swapped": (9, 7), "high seed": (7 + (1 << 32), 9), "high offset": (7, 9 + (1 << 32))}
    pairs |= {name: (own, draw(rng_of(seed, device)).double()) for name, seed in other.items()}
    for name, (one, two) in pairs.items():
        correlation = float(((one - (1 - p)) * (two - (1 - p))).mean()) / (p * (1 - p))
        assert abs(correlation) * one.numel() ** 0.5 < 5, name


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", ["none", "soft"])
@pytest.mark.parametrize("shape,N,K,R", SHAPES)
def test_matches_reference(device, dtype, shape, N, K, R, masks):
    problem, rng = Problem(shape, N, K, R, dtype, device, masks), rng_of(device=device)
    problem.check(problem.run(dropping(0.3, rng)), formula=formula(0.3, rng, problem.x.shape))


@pytest.mark.parametrize("p", [0.05, 0.95])
@pytest.mark.parametrize("R", [4, 8, 16, 64])
@pytest.mark.parametrize("masks", ["none", "soft"])
def test_shares_and_ranks(device, dtype, masks, R, p):
    problem, rng = Problem((2, 150), 136, 264, R, dtype, device, masks), rng_of((5, 6), device)
    problem.check(problem.run(dropping(p, rng)), formula=formula(p, rng, problem.x.shape))


@pytest.mark.parametrize("weight,bias", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("op", [ops.apt_linear, compact_linear], ids=["linear", "kept lanes"])
def test_weight_and_bias_are_optional(device, dtype, op, weight, bias):
    problem, rng = Problem((70,), 40, 56, 4, dtype, device, "soft", weight=weight, bias=bias), rng_of(device=device)
    problem.check(problem.run(dropping(0.3, rng, op)), formula=formula(0.3, rng, problem.x.shape))


@pytest.mark.parametrize("base", [torch.float16, torch.bfloat16], ids=str)
def test_float32_factors(device, base):
    problem, rng = Problem((70,), 40, 56, 4, base, device, "soft", factor_dtype=torch.float32), rng_of(device=device)
    problem.check(problem.run(dropping(0.3, rng)), formula=formula(0.3, rng, problem.x.shape))


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("sizes", [((2, 30), 40, 56, 4), ((6,), 16, 24, 4), ((96,), 1096, 1032, 16), ((70,), 40, 72, 17)], ids=str)
def test_kept_channels_are_dropped_as_in_the_full_layer(device, dtype, masks, sizes):
    problem, rng = Problem(*sizes, dtype, device, masks), rng_of(device=device)
    problem.check(problem.run(dropping(0.3, rng, compact_linear)), formula=formula(0.3, rng, problem.x.shape))


@pytest.mark.parametrize("side", ["in", "out"])
def test_one_side_is_kept_whole(device, dtype, side):
    problem, rng = Problem((2, 70), 136, 264, 8, dtype, device, "hard"), rng_of(device=device)
    setattr(problem, f"mask_{side}", None)
    problem.check(problem.run(dropping(0.3, rng, compact_linear)), formula=formula(0.3, rng, problem.x.shape))


@pytest.mark.parametrize("op", [ops.apt_linear, compact_linear], ids=["linear", "kept lanes"])
@pytest.mark.parametrize("sizes", [((2, 9), 24, 33, 5), ((130,), 72, 136, 16), ((70,), 24, 32, 17)], ids=str)
def test_pruned_lanes_are_selected(device, dtype, op, sizes):
    clean, rng = Problem(*sizes, dtype, device, "soft"), rng_of(device=device)
    poisoned = clean.poisoned()
    poisoned.check(poisoned.run(dropping(0.3, rng, op)), clean, formula(0.3, rng, clean.x.shape))


@pytest.mark.parametrize("op", [ops.apt_linear, compact_linear], ids=["linear", "kept lanes"])
@pytest.mark.parametrize("sizes", [((2, 9), 24, 33, 5), ((130,), 72, 136, 16), ((70,), 24, 32, 17)], ids=str)
def test_what_is_dropped_is_selected(device, dtype, op, sizes):
    """NaN and Inf there reach neither the low-rank path nor its gradients."""
    clean, rng = Problem(*sizes, dtype, device, "soft", weight=False), rng_of(device=device)
    dropped = ~ops.dropout_mask(clean.x.shape, 0.3, rng)
    poisoned = object.__new__(Problem)
    poisoned.__dict__.update(clean.__dict__)
    bad = torch.where(torch.arange(clean.x.shape[-1], device=device) % 2 == 0, float("nan"), float("inf")).to(dtype)
    poisoned.x = torch.where(dropped, bad, clean.x)
    poisoned.check(poisoned.run(dropping(0.3, rng, op)), clean, formula(0.3, rng, clean.x.shape))


def test_a_nan_that_is_dropped_takes_the_dense_path(device, dtype):
    problem, rng = Problem((130,), 72, 136, 16, dtype, device), rng_of(device=device)
    row, channel = (~ops.dropout_mask((130, 136), 0.3, rng)).nonzero()[5].tolist()
    problem.x[row, channel] = float("nan")
    got = problem.run(dropping(0.3, rng))
    hit = got["y"].isnan()
    assert bool(hit[row].all()) and int(hit.any(1).sum()) == 1
    assert all(bool(got[name].isfinite().all()) for name in ("dx", "dA", "dB", "db"))


@pytest.mark.parametrize("op", [ops.apt_linear, compact_linear], ids=["linear", "kept lanes"])
def test_the_same_bits_twice(device, dtype, op):
    problem, rng = Problem((300,), 136, 264, 8, dtype, device, "soft"), rng_of(device=device)
    one, two = (problem.run(dropping(0.3, rng, op)) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_rows_of_the_parts_are_those_of_the_whole(device):
    """However a pass is cut, an element's mask is its own: 16 tokens by themselves are the first of many."""
    problem, rng = Problem((2000,), 72, 1032, 8, torch.bfloat16, device, weight=False, bias=False), rng_of(device=device)
    few = problem.x[:16].clone()
    given = (None, None, problem.lora_A, problem.lora_B, None, None, 1.0, 0.5, rng)
    torch.testing.assert_close(ops.apt_linear(problem.x, *given)[:16], ops.apt_linear(few, *given))


def test_no_dropout_takes_an_rng_and_changes_nothing(device, dtype):
    problem = Problem((70,), 40, 56, 4, dtype, device, "soft")
    one, two = problem.run(ops.apt_linear), problem.run(dropping(0.0, rng_of(device=device)))
    assert all(torch.equal(one[name], two[name]) for name in one)


# -- draws -------------------------------------------------------------------------------------------------------------


def call(p, problem, rng=None):
    given = (problem.weight, problem.bias, problem.lora_A, problem.lora_B, problem.mask_in, problem.mask_out, 1.0)
    return ops.apt_linear(problem.x, *given, p, rng)


def test_without_an_rng_torchs_generator_decides(device):
    problem = Problem((20,), 8, 24, 2, torch.float32, device, "soft")
    torch.manual_seed(5)
    first, second = (call(0.5, problem) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(call(0.5, problem), first) and not torch.equal(first, second)
    state = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
    call(0.0, problem)
    after = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
    assert torch.equal(state, after)  # without dropout nothing is drawn


def test_the_cpu_draws_one_number():
    problem = Problem((20,), 8, 24, 2, torch.float32)
    torch.manual_seed(5)
    got, following = call(0.5, problem), torch.randint(1 << 40, (1,))
    torch.manual_seed(5)
    seed = torch.randint((1 << 63) - 1, (1,))
    assert torch.equal(call(0.5, problem, torch.cat([seed, torch.zeros(1, dtype=torch.int64)])), got)
    assert torch.equal(torch.randint(1 << 40, (1,)), following)


def saved_by(compute):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        compute()
    return saved


@pytest.mark.parametrize("op", [ops.apt_linear, compact_linear], ids=["linear", "kept lanes"])
def test_two_numbers_are_kept_for_the_backward(device, dtype, op):
    problem, rng = Problem((70,), 40, 56, 4, dtype, device, "hard"), rng_of(device=device)
    x, A = problem.x.requires_grad_(), problem.lora_A.requires_grad_()
    given = (problem.weight, None, A, problem.lora_B, problem.mask_in, problem.mask_out, 1.0)
    without, dropped = (saved_by(lambda p=p: op(x, *given, p, rng)) for p in (0.0, 0.3))
    sizes = [sorted(t.numel() for t in saved) for saved in (without, dropped)]
    assert sorted([*sizes[0], 2]) == sizes[1]


def test_an_rng_changed_before_the_backward_is_torchs_error(device):
    problem, rng = Problem((4,), 6, 5, 3, torch.float64, device), rng_of(device=device)
    problem.x.requires_grad_()
    y = call(0.3, problem, rng)
    rng.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# -- derivatives, transforms, compilers ----------------------------------------------------------------------------------


def small(device="cpu"):
    p = Problem((2, 3), 6, 12, 2, torch.float64, device, "soft")
    return p, [t.clone().requires_grad_() for t in (p.x, p.lora_A, p.lora_B, p.bias)]


def of_leaves(p, rng, share=0.4):
    return lambda x, A, B, bias: ops.apt_linear(x, p.weight, bias, A, B, p.mask_in, p.mask_out, 1.3, share, rng)


def test_every_derivative(device):
    p, leaves = small(device)
    function = of_leaves(p, rng_of(device=device))
    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=False)
    assert gradgradcheck(function, leaves)


def test_torch_func(device):
    p, leaves = small(device)
    plain, rng = [t.detach() for t in leaves], rng_of(device=device)
    function = of_leaves(p, rng)
    want = torch.autograd.grad(function(*leaves).sin().sum(), leaves)
    torch.testing.assert_close(torch.func.grad(lambda *a: function(*a).sin().sum(), (0, 1, 2, 3))(*plain), want)
    tangents = [torch.randn_like(t) for t in plain]
    _, got = torch.func.jvp(function, tuple(plain), tuple(tangents))
    with forward_ad.dual_level():
        dual = function(*(forward_ad.make_dual(t, d) for t, d in zip(plain, tangents, strict=True)))
        torch.testing.assert_close(got, forward_ad.unpack_dual(dual).tangent)


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule:UserWarning")
def test_vmap(device):
    p, _ = small(device)
    batch = torch.randn(4, 3, 12, dtype=torch.float64, device=device)
    given = (p.weight, p.bias, p.lora_A, p.lora_B, p.mask_in, p.mask_out, 1.3, 0.4)
    rng, rngs = rng_of(device=device), torch.arange(8, device=device).view(4, 2)
    one = torch.stack([ops.apt_linear(x, *given, rng) for x in batch])
    torch.testing.assert_close(torch.vmap(lambda x: ops.apt_linear(x, *given, rng))(batch), one)
    each = torch.stack([ops.apt_linear(x, *given, r) for x, r in zip(batch, rngs, strict=True)])
    torch.testing.assert_close(torch.vmap(lambda x, r: ops.apt_linear(x, *given, r))(batch, rngs), each)
    x = batch[:1].expand(4, 3, 12)
    same = torch.vmap(lambda x: ops.apt_linear(x, *given), randomness="same")(x)
    other = torch.vmap(lambda x: ops.apt_linear(x, *given), randomness="different")(x)
    assert torch.equal(same[0], same[1]) and not torch.allclose(other[0], other[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda x: ops.apt_linear(x, *given))(batch)


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule:UserWarning")
def test_per_sample_gradients(device):
    p, _ = small(device)
    batch, rng = torch.randn(4, 3, 12, dtype=torch.float64, device=device), rng_of(device=device)

    def loss(A, x):
        return ops.apt_linear(x, p.weight, p.bias, A, p.lora_B, p.mask_in, p.mask_out, 1.3, 0.4, rng).sin().sum()

    got = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(p.lora_A, batch)
    A = p.lora_A.clone().requires_grad_()
    torch.testing.assert_close(got, torch.stack([torch.autograd.grad(loss(A, x), A)[0] for x in batch]))


@pytest.mark.parametrize("op", [full_compact, compact_linear], ids=["none", "dropout"])
def test_transforms_of_a_compacted_layer(device, op):
    """Its composite: by the full channels, too."""
    p, _ = small(device)
    more = (0.4, rng_of(device=device)) if op is compact_linear else ()
    given = (p.weight, p.bias, p.lora_A, p.lora_B, p.mask_in, p.mask_out, 1.3)
    tangent = torch.randn_like(p.x)
    (got, moved), (want, expected) = (torch.func.jvp(lambda x, f=f: f(x, *given, *more), (p.x,), (tangent,)) for f in (op, ops.apt_linear))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(moved, expected)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("given", [True, False], ids=["rng", "none"])
def test_compiles_whole(device, backend, given):
    p, leaves = small(device)
    rng = rng_of(device=device) if given else None
    compiled = torch.compile(of_leaves(p, rng), backend=backend, fullgraph=True)
    first = compiled(*leaves)
    grads = torch.autograd.grad(first.sum(), leaves, retain_graph=True)
    if given:
        want = of_leaves(p, rng)(*leaves)
        torch.testing.assert_close(first, want)
        torch.testing.assert_close(grads, torch.autograd.grad(want.sum(), leaves))
        return
    torch.manual_seed(1)
    one, two = compiled(*leaves), compiled(*leaves)
    torch.manual_seed(1)
    assert torch.equal(compiled(*leaves), one) and not torch.equal(one, two)
    # The gradient is that of the very mask that the forward drew: y is linear in B.
    B = leaves[2]
    (dB,) = torch.autograd.grad(first.sum(), B, retain_graph=True)
    bare = ops.apt_linear(p.x, p.weight, p.bias, p.lora_A[:0], p.lora_B[:, :0], p.mask_in, p.mask_out)
    torch.testing.assert_close((dB * B).sum(), (first - bare).sum())
    torch.testing.assert_close((grads[1] * leaves[1]).sum(), (first - bare).sum())


def test_meta_and_autocast(device):
    p = Problem((5,), 6, 16, 2, torch.float32, device, "soft")
    given = (p.x, p.weight, p.bias, p.lora_A, p.lora_B, p.mask_in, p.mask_out)
    y = ops.apt_linear(*(t.to("meta") for t in given), 1.0, 0.4)
    assert y.is_meta and y.shape == (5, 6) and ops.dropout_mask((2, 3), 0.1, rng_of(device="meta")).is_meta
    rng = rng_of(device=device)
    with torch.autocast(device, torch.bfloat16):
        got = ops.apt_linear(*given, 1.0, 0.4, rng)
    narrow = ops.apt_linear(*(t.bfloat16() for t in given), 1.0, 0.4, rng)
    assert got.dtype == torch.bfloat16 and torch.equal(got, narrow)


# -- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1.0, -0.1, float("nan"), float("inf")])
def test_a_share_out_of_range(p):
    problem = Problem((4,), 6, 5, 2, torch.float32)
    problem.x.requires_grad_()
    for rng in (None, rng_of()):
        with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\), got"):
            call(p, problem, rng)
        with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\), got"):
            compact_linear(problem.x, problem.weight, None, problem.lora_A, problem.lora_B, None, None, 1.0, p, rng)
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\), got"):
        ops.dropout_mask((3, 4), p, rng_of())


def test_the_op_itself_draws_nothing():
    problem = Problem((4,), 6, 5, 2, torch.float32)
    given = (problem.x, problem.weight, None, problem.lora_A, problem.lora_B, None, None, 1.0, 0.5)
    with pytest.raises(
        ValueError, match="rng must be an int64 tensor .*where dropout is not 0, got None; apt_ext.ops.apt_linear draws one"
    ):
        torch.ops.apt_ext.apt_linear(*given)
    with pytest.raises(ValueError, match="rng must be an int64 tensor .*got None"):
        reference.apt_linear(*given)


@pytest.mark.parametrize(
    "shape,p,rng,error,text",
    [
        ((3, -1), 0.1, rng_of(), ValueError, r"shape must have sizes of at least 0, got [3, -1]"),
        ((), 0.1, rng_of(), ValueError, "shape must be that of x [..., K], got []"),
        ((3, 4), 0.1, torch.tensor([1, 2, 3]), ValueError, "rng must have shape [seed and offset=2], got [3]"),
        ((3, 4), 0.1, torch.tensor([1.0, 2.0]), TypeError, "rng must be an int64 tensor (seed, offset), got float32"),
        ((3, 4), 0.1, None, TypeError, "rng must be a Tensor, got NoneType"),
        ((3, 4), "x", rng_of(), TypeError, "p must be of type float, got str"),
    ],
)
def test_a_mask_that_cannot_be_drawn(shape, p, rng, error, text):
    with pytest.raises(error, match=re.escape(text)):
        ops.dropout_mask(shape, p, rng)


@pytest.mark.parametrize("change", [{"dropout": "x"}, {"dropout": 0.5, "rng": "x"}, {"dropout": 0.5, "rng": [1, 2]}], ids=str)
def test_what_has_another_type(change):
    problem = Problem((4,), 6, 5, 2, torch.float32)
    given = (problem.x, problem.weight, None, problem.lora_A, problem.lora_B, None, None, 1.0)
    with pytest.raises(TypeError, match=f"{list(change)[-1]} must be "):
        ops.apt_linear(*given, **change)


# -- what needs a GPU ----------------------------------------------------------------------------------------------------

cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
on_cuda = pytest.mark.parametrize("where", [pytest.param("cuda", marks=cuda)])


@on_cuda
@pytest.mark.parametrize("compute", [ops.apt_linear, compact_linear], ids=["linear", "kept lanes"])
def test_a_replay_draws_anew_unless_rng_is_given(where, compute):
    problem = Problem((300,), 136, 264, 8, torch.bfloat16, where, "hard")
    kept, masks = operands(problem.weight, problem.mask_in, problem.mask_out, 136, 264, where)
    factors = problem.lora_A, problem.lora_B

    def step(rng):
        x = problem.x.detach().requires_grad_()  # a leaf of this stream
        if compute is ops.apt_linear:
            y = ops.apt_linear(x, problem.weight, None, *factors, *masks, 1.0, 0.5, rng)
        else:
            y = kept.apply(x, kept.packed, None, *factors, masks, 1.0, dropout=0.5, rng=rng)
        return y, torch.autograd.grad(y, x, problem.grad)[0]

    for rng in (None, rng_of(device=where)):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(rng)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step(rng)
        seen = []
        for _ in range(3):
            graph.replay()
            seen.append([r.clone() for r in results])
        torch.cuda.manual_seed(9)
        graph.replay()
        first = [r.clone() for r in results]
        torch.cuda.manual_seed(9)
        graph.replay()
        assert all(torch.equal(one, two) for one, two in zip(first, results, strict=True))
        repeats = [torch.equal(one, two) for one, two in zip(seen[1], seen[2], strict=True)]
        assert repeats == [rng is not None] * 2


@on_cuda
@pytest.mark.parametrize("masks", ["none", "soft"])
def test_the_peak_is_that_without_dropout(where, masks):
    problem = Problem((4096,), 1024, 1024, 8, torch.bfloat16, where, masks)
    x, A, B = (t.requires_grad_() for t in (problem.x, problem.lora_A, problem.lora_B))
    peaks = {}
    gc.collect()  # what tests before have left would go meanwhile
    for p in (0.05, 0.0, 0.05, 0.0):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = ops.apt_linear(x, problem.weight, None, A, B, problem.mask_in, problem.mask_out, 1.0, p)
        held = torch.cuda.memory_allocated() - before
        torch.autograd.grad(y, (x, A, B), problem.grad)
        del y
        peaks[p] = held, torch.cuda.max_memory_allocated() - before
    assert all(one <= other + 512 for one, other in zip(peaks[0.05], peaks[0.0], strict=True)), peaks
