"""merge_ and mask_grads_ against the reference, in every dtype and layout, and what they refuse."""

import pytest
import torch
from problems import EPS, Problem, assert_accurate, poison

from apt_ext import ops, reference


@pytest.mark.parametrize("masks", ["none", "hard", "soft", "zero"])
@pytest.mark.parametrize("N,K,R", [(16, 24, 4), (33, 17, 20), (9, 8, 0), (1, 1, 1), (70, 520, 33)])
def test_merge_matches_reference(device, dtype, N, K, R, masks):
    p = Problem((1,), N, K, R, dtype, device, masks)
    for factors in (dtype, torch.float32):
        if factors != dtype and dtype in (torch.float64, torch.float32):
            continue
        A, B = p.lora_A.to(factors), p.lora_B.to(factors)
        args = [None if t is None else t.double().cpu() for t in (p.mask_in, p.mask_out)]
        expected = reference.merge_(p.weight.double().cpu().clone(), A.double().cpu(), B.double().cpu(), p.scaling, *args)
        bound = reference.merge_(p.weight.double().cpu().abs(), A.double().cpu().abs(), B.double().cpu().abs(), p.scaling, *args)
        for check in (True, False):
            for transposed in (False, True):
                W = p.weight.t().clone(memory_format=torch.contiguous_format).t() if transposed else p.weight.clone()
                version = W._version
                assert ops.merge_(W, A, B, p.scaling, p.mask_in, p.mask_out, check) is W
                assert W._version > version
                assert_accurate(W, expected, bound, dtype)
                if dtype in (torch.float16, torch.bfloat16):  # one rounding: half a unit in the last place, elementwise
                    unit = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
                    assert ((W.double().cpu() - expected).abs() <= 1.01 * unit * expected.abs() + 1e-5 * bound + 1e-7).all()


def test_merge_selects_and_leaves_the_surroundings(device, dtype):
    p = Problem((1,), 12, 20, 3, dtype, device, "hard")
    buffer = torch.full((14, 31), 7.0, dtype=dtype, device=device)
    W = buffer[1:13, 5:25]
    W.copy_(poison(poison(p.weight, p.mask_in, 1), p.mask_out, 0))
    ops.merge_(W, poison(p.lora_A, p.mask_in, 1), poison(p.lora_B, p.mask_out, 0), 0.5, p.mask_in, p.mask_out)
    args = [t.double().cpu() for t in (p.weight, p.lora_A, p.lora_B)]
    expected = reference.merge_(args[0].clone(), args[1], args[2], 0.5, p.mask_in.double().cpu(), p.mask_out.double().cpu())
    torch.testing.assert_close(W.double().cpu(), expected, rtol=10 * EPS[dtype], atol=10 * EPS[dtype])
    W.fill_(7.0)
    assert (buffer == 7).all()


def test_merge_refuses_what_would_not_be_finite_and_changes_nothing(device):
    W = torch.full((8, 16), 60000.0, dtype=torch.float16, device=device)
    A, B = torch.zeros(1, 16, dtype=torch.float16, device=device), torch.zeros(8, 1, dtype=torch.float16, device=device)
    A[0, 15], B[7, 0] = 100, 100  # the last element of the last tile: 60000 + 10000 leaves float16
    before = W.clone()
    with pytest.raises(RuntimeError, match="merge_: the merged weight would not be finite.*weight is unchanged"):
        ops.merge_(W, A, B, 1.0)
    assert torch.equal(W, before)
    ops.merge_(W, A, B, 0.1)  # B A exceeds nothing once scaled
    assert W[7, 15] == 61000
    big = torch.full((1, 16), 300.0, dtype=torch.float16, device=device), torch.full((8, 1), 300.0, dtype=torch.float16, device=device)
    ops.merge_(W.zero_(), *big, 0.1)  # B A = 90000 leaves float16, s times it fits
    assert (W == 9000).all()


def test_merge_bad_arguments():
    W, A, B = torch.randn(4, 6), torch.randn(2, 6), torch.randn(4, 2)
    for arguments, error, match in (
        ((W, A[:, :5], B), ValueError, r"lora_A must have shape \[R=2, K=6\] to fit weight \[4, 6\], got \[2, 5\]"),
        ((W, A, B[:3]), ValueError, r"lora_B must have shape \[N=4, R=2\] to fit weight \[4, 6\] and lora_A \[2, 6\], got \[3, 2\]"),
        ((W.int(), A, B), TypeError, "weight must be float64"),
        ((W, A.half(), B.half()), TypeError, "lora_A must have dtype float32, got float16"),
        ((torch.randn(1, 6).expand(4, 6), A, B), RuntimeError, "single memory location"),
        ((W, W[:2], B), ValueError, "lora_A must not share memory with weight"),
        ((W.clone().requires_grad_(), A, B), RuntimeError, "weight is a constant"),
    ):
        with pytest.raises(error, match=match):
            ops.merge_(*arguments, 1.0)
    with pytest.raises(ValueError, match="mask_in must have shape"):
        ops.merge_(W, A, B, 1.0, torch.ones(5))


def test_merge_takes_trainable_factors_and_stays_out_of_the_graph():
    W, A, B = torch.randn(4, 6), torch.randn(2, 6, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    ops.merge_(W, A, B, 1.0)
    assert not W.requires_grad and W.grad_fn is None


@pytest.mark.parametrize("count", [1, 7, 700])
def test_mask_grads_matches_reference(device, count):
    g = torch.Generator().manual_seed(1)
    grads, masks, dims = [], [], []
    for i in range(count):
        dtype = (torch.float32, torch.bfloat16, torch.float16, torch.float64)[i % 4]
        shape = ((16, 24), (7, 5), (2, 3, 8), (40,), (3, 0))[i % 5]
        dim = (-1, 0, 1, 0, 1)[i % 5]
        mask = (torch.rand(shape[dim], generator=g) > 0.4).float() * torch.rand(shape[dim], generator=g)
        grad = torch.randn(shape, generator=g).to(dtype)
        grad = poison(grad, mask, dim)
        grads.append((grad.transpose(0, -1).contiguous().transpose(0, -1) if i % 6 == 5 else grad).to(device))
        masks.append((mask.to(dtype) if i % 2 else mask).to(device))
        dims.append(dim)
    expected = [reference.scale_lanes(a.cpu(), b.cpu(), d) for a, b, d in zip(grads, masks, dims, strict=True)]
    versions = [t._version for t in grads]
    assert ops.mask_grads_(grads, masks, dims) is None
    for got, want, version in zip(grads, expected, versions, strict=True):
        torch.testing.assert_close(got.cpu(), want)
        assert got._version > version


def test_mask_grads_bad_arguments():
    grad, mask = torch.randn(4, 6), torch.ones(6)
    for arguments, error, match in (
        (([grad], [mask], []), ValueError, "equal lengths, got 1, 1 and 0"),
        (([grad], [mask], [2]), ValueError, r"dims\[0\] must lie in \[-2, 1\]"),
        (([grad], [mask], [0]), ValueError, r"masks\[0\] must have shape \[size=4\], got \[6\]"),
        (([grad, grad], [mask, mask], [1, 1]), ValueError, "two that share memory"),
        (([grad.int()], [mask], [1]), TypeError, r"grads\[0\] must be float64"),
        (([grad[:1].expand(4, 6)], [mask], [1]), RuntimeError, "single memory location"),
        ((grad, [mask], [1]), TypeError, "grads must be a list, got Tensor"),
        ((None, [mask], [1]), TypeError, "grads must be a list, got NoneType"),
        (([grad, None], [mask, mask], [1, 1]), TypeError, r"grads\[1\] must be a Tensor, got NoneType"),
        (([grad], [[1.0] * 6], [1]), TypeError, r"masks\[0\] must be a Tensor, got list"),
        (([grad], [mask], 1), TypeError, "dims must be a list, got int"),
        (([grad], [mask], [1.0]), TypeError, r"dims\[0\] must be an int, got float"),
    ):
        before = grad.clone()
        with pytest.raises(error, match=match):
            ops.mask_grads_(*arguments)
        assert torch.equal(grad, before)
    ops.mask_grads_([], [], [])
    ops.mask_grads_((one for one in [grad]), (mask * 0,), range(1, 2))
    assert not grad.any()
