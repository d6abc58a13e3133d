"""More than 2^31 elements: right, in every operand that can have them. Compared where the offset passes 2^31 and at both ends."""

import os

import pytest
import torch
from problems import Problem, assert_accurate

from apt_ext import ops, reference

pytestmark = pytest.mark.slow

EDGE = 1 << 31
EXTRA = pytest.mark.parametrize("extra", [-64, 0, 64])


@pytest.fixture(autouse=True)
def _no_filling():
    """Filling fresh memory with NaN would take longer than the test."""
    torch.use_deterministic_algorithms(False)


def needs(device, gib):
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < gib << 30:
        pytest.skip(f"needs {gib} GiB, {free >> 30} are free")


def sampled(rows, width):
    """Rows at both ends and on both sides of every multiple of 2^31 elements (and of 2^30: signed bytes of 16 bits)."""
    around = [EDGE // 2 // width, EDGE // width, EDGE // 2 // width - 1, EDGE // width - 1]
    return sorted({0, 1, rows - 2, rows - 1, *(row for row in around if 0 <= row < rows)})


@EXTRA
@pytest.mark.parametrize("inner", [1, 64], ids=["last dimension", "first dimension"])
def test_gradients(device, extra, inner):
    needs(device, 8)
    rows = (EDGE + extra) // 64
    grad = torch.ones(rows, 64, dtype=torch.bfloat16, device=device)
    if inner == 1:
        mask = torch.linspace(0, 1, 64, device=device)
        ops.mask_grads_([grad], [mask], [1])
        want = mask.bfloat16().expand(1 << 20, 64)
        for part in grad.split(1 << 20):
            assert torch.equal(part, want[: len(part)])
    else:
        mask = (torch.arange(rows, device=device) % 3 != 0).float()
        ops.mask_grads_([grad], [mask], [0])
        for part, m in zip(grad.split(1 << 20), mask.split(1 << 20), strict=True):
            assert torch.equal(part, m.bfloat16()[:, None].expand_as(part))


@EXTRA
@pytest.mark.parametrize("shape", ["tall", "wide", "tall, transposed"])
def test_merge(device, extra, shape):
    needs(device, 10)
    long = (EDGE + extra) // 64
    N, K = (64, long) if shape == "wide" else (long, 64)
    W = (
        torch.zeros(K, N, dtype=torch.bfloat16, device=device).t()
        if "transposed" in shape
        else torch.zeros(N, K, dtype=torch.bfloat16, device=device)
    )
    A, B = torch.zeros(2, K, device=device), torch.zeros(N, 2, device=device)
    lines = sampled(long, 64)
    side, other = (A.t(), B) if shape == "wide" else (B, A.t())  # [long, 2], [64, 2]
    side[lines] = torch.randn(len(lines), 2, device=device)
    other.normal_()
    (W.t() if shape == "wide" else W)[lines] = torch.randn(len(lines), 64, device=device).bfloat16()
    before = (W.t() if shape == "wide" else W)[lines].double().cpu()
    m_in, m_out = (torch.ones(size, device=device) for size in (K, N))
    (m_in if shape == "wide" else m_out)[lines[-1]] = 0.5
    ops.merge_(W, A, B, 1.5, m_in, m_out)
    after = W.t() if shape == "wide" else W
    want = before + 1.5 * side[lines].double().cpu() @ other.double().cpu().T
    want[-1] *= 0.5
    assert_accurate(after[lines], want, want.abs() + before.abs(), torch.bfloat16)
    assert int(torch.count_nonzero(after.abs().amax(1))) == len(lines)  # and nothing else was written


@EXTRA
def test_tokens(device, extra):
    """x, y and both their gradients; sums over the tokens see the sampled ones, the others are zero."""
    needs(device, 48)
    rows, K, N = (EDGE + extra) // 64, 64, 64
    chosen = sampled(rows, 64)
    p = Problem((len(chosen),), N, K, 4, torch.bfloat16, device, "soft")
    x, grad = (torch.zeros(rows, 64, dtype=torch.bfloat16, device=device) for _ in range(2))
    x[chosen], grad[chosen] = p.x, p.grad
    leaves = [t.requires_grad_() for t in (x, p.lora_A.clone(), p.lora_B.clone(), p.bias.clone())]
    y = ops.apt_linear(leaves[0], p.weight, leaves[3], leaves[1], leaves[2], p.mask_in, p.mask_out, p.scaling)
    dx, dA, dB, db = torch.autograd.grad(y, leaves, grad)
    p.check({"y": y.detach()[chosen], "dx": dx[chosen], "dA": dA, "dB": dB, "db": db})
    bias = reference.scale_lanes(p.bias.detach(), p.mask_out).float()
    untouched = [row for row in (3, EDGE // 128 + 3, rows - 4) if row not in chosen]
    torch.testing.assert_close(y.detach()[untouched].float(), bias.expand(len(untouched), N), rtol=1e-2, atol=1e-2)
    assert (dx[untouched] == 0).all()


@EXTRA
def test_weight(device, extra):
    """A frozen weight of more than 2^31 elements under a few tokens."""
    needs(device, 12)
    K = 1 << 15
    N = (EDGE + extra * K // 64) // K
    W = torch.empty(N, K, dtype=torch.bfloat16, device=device)
    for part in W.split(1 << 12):
        part.normal_()
    p = Problem((3,), N, K, 2, torch.bfloat16, device, "soft", weight=False)
    x, A, B = (t.clone().requires_grad_() for t in (p.x, p.lora_A, p.lora_B))
    y = ops.apt_linear(x, W, None, A, B, p.mask_in, p.mask_out, p.scaling)
    (dx,) = torch.autograd.grad(y, x, p.grad)
    q = p._double(lambda t: t)
    rows = sampled(N, K)
    masked = reference.scale_lanes(q.x, q.mask_in)
    low = p.scaling * (masked @ q.lora_A.T) @ q.lora_B.T
    want = reference.scale_lanes(masked @ W[rows].double().cpu().T + low[:, rows], q.mask_out[rows])
    assert_accurate(y[:, rows], want, K**0.5 * torch.ones_like(want), torch.bfloat16)
    g = reference.scale_lanes(q.grad, q.mask_out)
    columns = [0, 1, K - 1]
    want = reference.scale_lanes(g @ W[:, columns].double().cpu() + p.scaling * (g @ q.lora_B) @ q.lora_A[:, columns], q.mask_in[columns])
    assert_accurate(dx[:, columns], want, N**0.5 * torch.ones_like(want), torch.bfloat16)
