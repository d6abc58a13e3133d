"""apt_linear against the float64 reference: forward and all gradients, every device, dtype, shape, layout and mask."""

import pytest
import torch
from op_cases import LAYOUTS, MASKS, PADDED_RANK, SHAPES, SOME, ZEROS, gradients_alone, hides_nothing, writes_no_bias
from problems import Problem, assert_accurate

from apt_ext import ops, reference


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("shape,N,K,R", SHAPES)
def test_matches_reference(device, dtype, shape, N, K, R, masks):
    problem = Problem(shape, N, K, R, dtype, device, masks)
    got = problem.run(ops.apt_linear)
    problem.check(got)
    if masks != "none":
        pruned_out, pruned_in = problem.mask_out == 0, problem.mask_in == 0
        assert (got["y"][..., pruned_out] == 0).all() and (got["dx"][..., pruned_in] == 0).all()
        assert (got["dA"][:, pruned_in] == 0).all() and (got["dB"][pruned_out] == 0).all()


@pytest.mark.parametrize("sizes", [((2, 9), 24, 33, 5), PADDED_RANK], ids=["small", "padded rank"])
@pytest.mark.parametrize("masks", ["hard", "soft", "zero", "one"])
def test_poisoned_lanes_never_reach_a_kept_one(device, dtype, masks, sizes):
    clean = Problem(*sizes, dtype, device, masks)
    poisoned = clean.poisoned()
    assert not torch.isfinite(poisoned.x).all()
    poisoned.check(poisoned.run(ops.apt_linear), clean)


def test_a_nan_in_a_kept_lane_is_not_hidden(device):
    problem = Problem((4,), 8, 8, 2, torch.float32, device, "hard")
    kept = int((problem.mask_in != 0).nonzero()[0])
    problem.x[1, kept] = float("nan")
    got = problem.run(ops.apt_linear)
    rows = torch.isnan(got["y"][:, problem.mask_out != 0]).any(1)
    assert rows.tolist() == [False, True, False, False]
    assert (got["y"][:, problem.mask_out == 0] == 0).all() and (got["dB"][problem.mask_out == 0] == 0).all()


@pytest.mark.parametrize("scaling", ZEROS)
@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("tokens, R", [(4, 2), (70, 17)])
def test_a_scaling_of_0_hides_nothing(device, dtype, scaling, weight, tokens, R):
    hides_nothing(ops.apt_linear, device, dtype, scaling, weight, tokens, R)


@pytest.mark.parametrize("sizes", [((7,), 10, 12, 3), PADDED_RANK], ids=["small", "padded rank"])
@pytest.mark.parametrize("weight,bias", [(False, False), (False, True), (True, False)])
def test_weight_and_bias_are_optional(device, dtype, weight, bias, sizes):
    problem = Problem(*sizes, dtype, device, "soft", weight=weight, bias=bias)
    problem.check(problem.run(ops.apt_linear))


@pytest.mark.parametrize("masks", ["none", "soft"])
@pytest.mark.parametrize("R", [0, 3, 17])
def test_a_bias_without_a_weight_is_not_written(device, dtype, masks, R):
    writes_no_bias(ops.apt_linear, Problem((1,), 10, 12, R, dtype, device, masks, weight=False))


@pytest.mark.parametrize("name", ["x", "grad"])
def test_what_lies_between_the_rows_of_a_view_does_not_matter(device, name):
    """oneDNN's bfloat16 product reads it at such sizes."""
    problem = Problem((130,), 512, 776, 2, torch.bfloat16, device, "none", bias=False)
    inside = getattr(problem, name)
    around = torch.full((130, inside.shape[1] + 5), float("nan"), dtype=torch.bfloat16, device=device)
    around[:, :-5] = inside
    setattr(problem, name, around[:, :-5])
    leaves = [problem.x.detach().requires_grad_(), problem.lora_A.clone().requires_grad_(), problem.lora_B.clone().requires_grad_()]
    y = ops.apt_linear(leaves[0], problem.weight, None, *leaves[1:], None, None, problem.scaling)
    got = dict(zip(("y", "dx", "dA", "dB"), (y.detach(), *torch.autograd.grad(y, leaves, problem.grad)), strict=True))
    problem.check(got)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens, N, K, R", [(9, 16, 24, 4), (70, 33, 41, 5), (70, 33, 41, 20), (70, 40, 72, 20)])
def test_float32_factors_over_a_16_bit_base(device, dtype, tokens, N, K, R):
    problem = Problem((tokens,), N, K, R, dtype, device, "soft", factor_dtype=torch.float32)
    got = problem.run(ops.apt_linear)
    assert got["y"].dtype == dtype and got["dA"].dtype == got["dB"].dtype == torch.float32
    problem.check(got)


@pytest.mark.parametrize("sizes", [((16,), 24, 32, 8), PADDED_RANK], ids=["small", "padded rank"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(device, dtype, layout, sizes):
    problem = Problem(*sizes, dtype, device, "soft")
    contiguous = problem.run(ops.apt_linear)
    for name in ("x", "grad", "weight", "lora_A", "lora_B"):
        setattr(problem, name, LAYOUTS[layout](getattr(problem, name)))

    def strided(x, weight, bias, A, B, *rest):
        return ops.apt_linear(LAYOUTS[layout](x), weight, bias, LAYOUTS[layout](A), LAYOUTS[layout](B), *rest)

    got = problem.run(strided)
    problem.check(got)
    assert {n: v.shape for n, v in got.items()} == {n: v.shape for n, v in contiguous.items()}


def test_expanded_gradient_and_input(device):
    x = torch.randn(1, 6, device=device, dtype=torch.float64).expand(5, 6)
    A, B = torch.randn(2, 6, device=device).double().requires_grad_(), torch.randn(4, 2, device=device).double().requires_grad_()
    W = torch.randn(4, 6, device=device).double()
    mask = torch.tensor([1.0, 0, 0.5, 1], device=device)
    got = torch.autograd.grad(ops.apt_linear(x, W, None, A, B, None, mask, 2.0).sum(), (A, B))
    want = torch.autograd.grad(reference.apt_linear(x, W, None, A, B, None, mask, 2.0).sum(), (A, B))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("rank", [1, 24])  # on a GPU by passes of our own, and by the library
@pytest.mark.parametrize("scaling, small", [(0.1, 0.5), (2.0, 0.01)])
def test_half_range_of_the_low_rank_path(device, rank, scaling, small):
    """x A^T, and dy B, leave float16's range although s times it, or the result, fits."""

    def full(*shape, value):
        return torch.full(shape, value, dtype=torch.float16, device=device).requires_grad_()

    x, A, B = full(3, 4096, value=1.0), full(rank, 4096, value=64.0), full(8, rank, value=small / rank)  # x A^T = 262144
    y = ops.apt_linear(x, None, None, A, B, None, None, scaling)
    expected = scaling * 262144 * B.detach().double().sum(1).expand(3, 8)
    assert_accurate(y.detach(), expected, expected, torch.float16)
    y.backward(torch.full_like(y, 1e-3))
    want = 3 * float(torch.tensor(1e-3).half()) * scaling * 262144
    torch.testing.assert_close(B.grad.double(), torch.full_like(B.grad, want, dtype=torch.float64), rtol=3e-3, atol=0)

    x, A, B = full(3, 8, value=1e-3), full(rank, 8, value=small / rank), full(4096, rank, value=64.0)
    ops.apt_linear(x, None, None, A, B, None, None, scaling).backward(torch.ones(3, 4096, dtype=torch.float16, device=device))
    expected = scaling * 262144 * A.detach().double().sum(0).expand(3, 8)
    assert_accurate(x.grad, expected, expected, torch.float16)
    torch.testing.assert_close(A.grad.double(), torch.full_like(A.grad, want, dtype=torch.float64), rtol=3e-3, atol=0)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("tokens", [9, 70])
def test_a_token_that_is_not_finite_leaves_the_others_alone(device, bad, tokens):
    """In float16 above rank 16 all tokens share a scale."""
    problem = Problem((tokens,), 16, 24, 20, torch.float16, device, "none")
    good = problem.run(ops.apt_linear)["y"]
    problem.x[4, 3] = bad
    y = problem.run(ops.apt_linear)["y"]
    assert not y[4].isfinite().any()
    assert torch.equal(y[torch.arange(tokens) != 4], good[torch.arange(tokens) != 4])


@pytest.mark.parametrize("sizes", [((64,), 48, 56, 8), PADDED_RANK], ids=["small", "padded rank"])
def test_bitwise_the_same_twice(device, dtype, sizes):
    problem = Problem(*sizes, dtype, device, "soft")
    first, second = problem.run(ops.apt_linear), problem.run(ops.apt_linear)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("asked", SOME)
@pytest.mark.parametrize("sizes", [((20,), 24, 32, 5), ((70,), 33, 41, 5), PADDED_RANK], ids=["small", "padded widths", "padded rank"])
def test_some_gradients_alone(device, dtype, sizes, asked):
    gradients_alone(ops.apt_linear, Problem(*sizes, dtype, device, "soft", bias=False), asked)


def test_gradcheck_and_only_what_is_asked_for():
    p = Problem((4,), 6, 5, 3, torch.float64, masks="soft")
    leaves = [t.clone().requires_grad_() for t in (p.x, p.bias, p.lora_A, p.lora_B)]
    assert torch.autograd.gradcheck(lambda x, b, A, B: ops.apt_linear(x, p.weight, b, A, B, p.mask_in, p.mask_out, 1.3), leaves)
    x = p.x.clone().requires_grad_()
    ops.apt_linear(x, p.weight, p.bias, p.lora_A, p.lora_B).sum().backward()
    assert p.lora_A.grad is None and x.grad is not None


def test_autocast(device):
    p = Problem((5,), 8, 12, 4, torch.float32, device, "soft")
    A, B = p.lora_A.clone().requires_grad_(), p.lora_B.clone().requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        y = ops.apt_linear(p.x, p.weight, p.bias, A, B, p.mask_in, p.mask_out, p.scaling)
        double = ops.apt_linear(*(t.double() for t in (p.x, p.weight, p.bias, p.lora_A, p.lora_B)))
    assert y.dtype == torch.bfloat16 and double.dtype == torch.float64
    y.sum().backward()
    assert A.grad.dtype == B.grad.dtype == torch.float32
    expected, magnitude = p.oracle(), p.magnitudes()
    assert_accurate(y, expected["y"], magnitude["y"], torch.bfloat16)


ERRORS = [
    ({"x": lambda p: p.x.int()}, TypeError, "x must be float64"),
    ({"x": lambda p: p.x.to_sparse()}, TypeError, "x must be a dense strided tensor, got layout Sparse"),
    ({"x": lambda p: p.x[0, 0]}, ValueError, "x must have shape"),
    ({"x": lambda p: p.x[:, :-1]}, ValueError, r"x must have shape \[\.\.\., K=5\] to fit weight and lora_A, got \[4, 4\]"),
    ({"x": lambda p: p.x.to("meta")}, ValueError, "must be on x's device meta, got cpu"),
    ({"weight": lambda p: p.weight.float()}, TypeError, "weight must have x's dtype float64, got float32"),
    ({"weight": lambda p: p.weight[0]}, ValueError, "weight must have shape"),
    ({"bias": lambda p: p.bias[1:]}, ValueError, r"bias must have shape \[N=6\], got \[5\]"),
    ({"lora_A": lambda p: p.lora_A.half()}, TypeError, "lora_A must have dtype float64, got float16"),
    ({"lora_A": lambda p: p.lora_A[:, 1:]}, ValueError, "lora_A must have shape"),
    (
        {"lora_B": lambda p: p.lora_B[:, 1:]},
        ValueError,
        r"lora_B must have shape \[N=6, R=3\] to fit weight .*, got \[6, 2\]",
    ),
    ({"mask_in": lambda p: p.mask_in[:1]}, ValueError, r"mask_in must have shape \[K=5\], got \[1\]"),
    ({"mask_out": lambda p: p.mask_out.half()}, TypeError, "mask_out must have dtype float64 or float32, got float16"),
    ({"mask_out": lambda p: p.mask_out.bool()}, TypeError, "mask_out must have dtype"),
    ({"weight": lambda p: p.weight.requires_grad_()}, RuntimeError, "weight is a constant"),
    ({"mask_in": lambda p: p.mask_in.requires_grad_()}, RuntimeError, "mask_in is a constant"),
]


@pytest.mark.parametrize("change,error,match", ERRORS)
def test_bad_arguments_are_worded(change, error, match):
    p = Problem((4,), 6, 5, 3, torch.float64, masks="soft")
    names = ("x", "weight", "bias", "lora_A", "lora_B", "mask_in", "mask_out")
    with pytest.raises(error, match=match):
        ops.apt_linear(*(change[n](p) if n in change else getattr(p, n) for n in names))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole_and_once_across_mask_changes(device, backend):
    p = Problem((4,), 6, 5, 3, torch.float32, device, "soft")
    leaves = [t.clone().requires_grad_() for t in (p.x, p.lora_A, p.lora_B)]

    def step(x, A, B):
        return ops.apt_linear(x, p.weight, p.bias, A, B, p.mask_in, p.mask_out, 1.5).sin().sum()

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(6):
            with torch.no_grad():
                p.mask_in[i % 5], p.mask_out[i] = 0, 0
            got = torch.autograd.grad(compiled(*leaves), leaves)
            for g, w in zip(got, torch.autograd.grad(step(*leaves), leaves), strict=True):
                torch.testing.assert_close(g, w)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_16_bit_never_takes_a_slow_path(dtype):
    """Without fast 16-bit products the float32 route is taken: same values as the native one within the accuracy."""
    import os
    import subprocess
    import sys

    script = (
        "import torch; from problems import Problem; from apt_ext import ops\n"
        "p = Problem((70,), 96, 2000, 8, torch.bfloat16, masks='soft'); p.check(p.run(ops.apt_linear))\n"
        "assert not torch.ops.mkldnn._is_mkldnn_bf16_supported()\n"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=os.path.dirname(__file__), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("scaling", [0.5, 2.0, 256.0, 512.0, -4.0])
def test_scaling_by_a_power_of_two(device, dtype, scaling):
    """The scaling of most adapters is exact, so on the CPU it is applied where it is cheapest: accurate, and the same wherever it is."""
    p = Problem((70,), 40, 48, 8, dtype, device, "soft", scaling=scaling)
    got = p.run(ops.apt_linear)
    p.check(got)
    if device != "cpu":
        return
    p.scaling, p.lora_B = 1.0, p.lora_B * scaling
    other = p.run(ops.apt_linear)
    for name in ("y", "dx"):
        torch.testing.assert_close(got[name], other[name])
