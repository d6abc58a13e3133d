"""Cases of apt_linear that the op of a compacted layer shares, and what both must do."""

import torch
from problems import Problem, assert_accurate

ZEROS = [0.0, 1e-60]  # as a scaling
# leading shape, N, K, R
SHAPES = [
    ((6,), 16, 24, 4),
    ((0,), 8, 8, 2),
    ((1,), 9, 7, 1),
    ((5,), 13, 11, 0),
    ((2, 3), 33, 17, 5),
    ((2, 1, 4), 8, 40, 8),
    ((130,), 72, 136, 16),
    ((), 12, 10, 3),
    ((3,), 0, 6, 0),
    ((3,), 6, 0, 0),
    # On CUDA in 16 bits these take the passes around the dense product, but for the ranks above 16; some in padded widths and ranks.
    ((96,), 40, 72, 3),
    ((77,), 136, 264, 6),
    ((2, 70), 264, 136, 16),
    ((300,), 128, 384, 17),
    ((2, 70), 136, 72, 24),
    ((64,), 130, 24, 12),
    ((65,), 24, 131, 20),
    ((70,), 33, 41, 5),
]
MASKS = ["none", "hard", "soft", "zero", "one"]
PADDED_RANK = ((70,), 24, 32, 17)  # on CUDA in 16 bits


def hides_nothing(compute, device, dtype, scaling, weight, tokens=4, R=2):
    """Libraries leave out a product times 0."""
    problem = Problem((tokens,), 8, 8, R, dtype, device, "hard", weight=weight, scaling=scaling)
    lane, kept = int((problem.mask_in != 0).nonzero()[0]), problem.mask_out != 0
    problem.lora_A[0, lane] = float("nan")
    got = {name: value.isnan() for name, value in problem.run(compute).items()}
    assert bool((got["y"] == kept).all()) and bool(got["dx"][:, lane].all()) and bool((got["dB"][:, 0] == kept).all())
    assert int(got["dx"].sum()) == tokens and int(got["dB"].sum()) == int(kept.sum()) and not got["dA"].any() and not got["db"].any()


def writes_no_bias(compute, problem):
    """One row of a bias is contiguous already."""
    before = problem.bias.clone()
    for x in (problem.x, problem.x[0]):
        with torch.no_grad():
            y = compute(x, None, problem.bias, problem.lora_A, problem.lora_B, problem.mask_in, problem.mask_out, problem.scaling)
        assert torch.equal(problem.bias, before) and y.data_ptr() != problem.bias.data_ptr()
    problem.check(problem.run(compute))


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.t().contiguous().t(),
    "offset": lambda t: torch.cat([torch.full_like(t[:1], float("nan")), t])[1:],
    "odd rows": lambda t: torch.nn.functional.pad(t, (0, 3), value=float("nan"))[:, : t.shape[1]],
    "unaligned": lambda t: torch.nn.functional.pad(t, (1, 0), value=float("nan"))[:, 1:],
    "every second": lambda t: t.repeat_interleave(2, 1)[:, ::2],
}


def gradients_alone(compute, problem, asked):
    """Of a layer without bias, the gradients of some of x, lora_A and lora_B."""
    expected, magnitude, names = problem.oracle(), problem.magnitudes(), ("dx", "dA", "dB")
    leaves = [t.detach().clone().requires_grad_(i in asked) for i, t in enumerate((problem.x, problem.lora_A, problem.lora_B))]
    masks = problem.mask_in, problem.mask_out, problem.scaling
    y = compute(leaves[0], problem.weight, None, *leaves[1:], *masks)
    for i, got in zip(asked, torch.autograd.grad(y, [leaves[i] for i in asked], problem.grad), strict=True):
        assert_accurate(got, expected[names[i]], magnitude[names[i]], problem.dtype, names[i])


SOME = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]
