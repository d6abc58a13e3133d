"""Every kernel, few launches and small tensors: what `make cuda-sanitize` runs under tools that make a launch a hundred times slower.

On a CPU it is a test like any other.
"""

import pytest
import torch
from compact_op import compact_linear
from problems import Problem, make_mask

from apt_ext import ops, reference
from apt_ext._C import launch_plan

# Tokens, N, K, R, and how a GPU of today computes it in 16 bits (in 32 and 64: always "library").
SHAPES = {
    # No row starts where a vector load would like it, and no last tile is full.
    "odd": (18, 37, 131, 5, "library"),
    "padded": (70, 37, 131, 5, "passes, padded"),
    # Three spans of tokens, the last one not full.
    "spans": (150, 72, 136, 5, "passes"),
    # Few rows and many columns: several blocks share a row.
    "shared rows": (20, 1096, 1032, 16, "passes"),
    "a rank beyond the passes": (20, 40, 72, 17, "library"),
    "a padded rank": (70, 40, 72, 17, "library, padded"),
}


def test_the_shapes_reach_every_route():
    for tokens, N, K, R, route in SHAPES.values():
        plan = launch_plan(tokens, N, K, R)
        assert plan.route + ", padded" * plan.padded == route
    spans, shared = (launch_plan(*SHAPES[name][:4]) for name in ("spans", "shared rows"))
    assert spans.span_N == 64 and shared.up_splits_N > 1 and shared.up_splits_K > 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masks", ["none", "soft"])
def test_linear(device, dtype, masks, shape):
    tokens, N, K, R, _ = SHAPES[shape]
    problem = Problem((tokens,), N, K, R, dtype, device, masks)
    problem.check(problem.run(ops.apt_linear))


@pytest.mark.parametrize("shape", ["odd", "spans", "shared rows", "a rank beyond the passes", "a padded rank"])
@pytest.mark.parametrize("masks", ["hard", "soft"])
def test_kept_lanes(device, dtype, masks, shape):
    tokens, N, K, R, _ = SHAPES[shape]
    problem = Problem((tokens,), N, K, R, dtype, device, masks)
    problem.check(problem.run(compact_linear))


@pytest.mark.parametrize("op", [ops.apt_linear, compact_linear], ids=["linear", "kept lanes"])
def test_what_is_saved_may_come_back_as_copies(device, dtype, op):
    """t is saved in the longer rows it was made in; hooks that move saved tensors away bring it back without them."""
    tokens, N, K, R, _ = SHAPES["a padded rank"]
    problem = Problem((tokens,), N, K, R, dtype, device, "hard")
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.clone(memory_format=torch.contiguous_format), lambda saved: saved):
        problem.check(problem.run(op))


def test_t_may_lie_in_longer_rows(device, dtype):
    """Whatever lies behind its own entries there takes no part."""
    tokens, N, K, R, _ = SHAPES["a padded rank"]
    g = torch.Generator().manual_seed(3)
    grad, x, W, A, B = (torch.randn(size, generator=g).to(device, dtype) for size in ((tokens, N), (tokens, K), (N, K), (R, K), (N, R)))
    t = torch.ops.apt_ext.apt_linear_forward(x, W, None, A, B, None, None, 0.5)[1]
    assert t.is_contiguous()
    longer = torch.full((tokens, 24), float("nan"), dtype=t.dtype, device=device)
    longer[:, :R] = t
    every = [True] * 4
    found = [
        torch.ops.apt_ext.apt_linear_backward(grad, x, W, A, B, each, None, None, 0.5, 0.0, None, every) for each in (t, longer[:, :R])
    ]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("size", [(37, 131), (40, 1032)], ids=str)
@pytest.mark.parametrize("rank", [0, 3])
def test_merge(device, dtype, rank, size):
    g = torch.Generator().manual_seed(rank)
    N, K = size
    W, A, B = (torch.randn(shape, generator=g).to(dtype) for shape in ((N, K), (rank, K), (N, rank)))
    masks = make_mask("soft", K, g, "cpu"), make_mask("hard", N, g, "cpu")
    for mask_in, mask_out in ((None, None), masks):
        for check in (True, False):
            weight = W.clone().to(device)
            moved = [None if mask is None else mask.to(device) for mask in (mask_in, mask_out)]
            ops.merge_(weight, A.to(device), B.to(device), 0.5, *moved, check=check)
            expected = reference.merge_(W.clone(), A, B, 0.5, mask_in, mask_out)
            torch.testing.assert_close(weight.cpu(), expected)


def test_merge_that_overflows_is_refused(device):
    W = torch.full((37, 131), 60000.0, dtype=torch.float16, device=device)
    before = W.clone()
    factors = torch.full((1, 131), 6000.0, dtype=torch.float16), torch.ones(37, 1, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="finite"):
        ops.merge_(W, *(factor.to(device) for factor in factors), 1.0)
    assert torch.equal(W, before)


def test_mask_grads(device):
    g = torch.Generator().manual_seed(2)
    sizes = [((16, 24), 1), ((7, 5), 0), ((2, 3, 8), 1), ((41,), 0), ((3, 0), 0), ((1, 1000), -1)]
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    grads = [torch.randn(size, generator=g).to(dtype) for dtype in dtypes for size, _ in sizes]
    dims = [dim for _ in dtypes for _, dim in sizes]
    masks = [make_mask("soft", grad.shape[dim], g, "cpu") for grad, dim in zip(grads, dims, strict=True)]
    expected = [reference.scale_lanes(*each) for each in zip(grads, masks, dims, strict=True)]
    moved = [grad.to(device) for grad in grads]
    ops.mask_grads_(moved, [mask.to(device) for mask in masks], dims)
    for got, want in zip(moved, expected, strict=True):
        torch.testing.assert_close(got.cpu(), want)
