"""The formulas of every op in eager torch, with the op's own signature: the executable specification.

Run in float64 this is the oracle the compiled kernels are tested against. It is differentiable, works in any floating
dtype and imports only torch. M tokens, N out_features, K in_features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def scale_lanes(x: Tensor, mask: Tensor | None, dim: int = -1) -> Tensor:
    """``x`` times ``mask`` along ``dim``; where the mask is 0 the result is 0 whatever ``x`` holds (selection)."""
    if mask is None:
        return x
    m = _along(mask, x, dim)
    return torch.where(m == 0, 0, x * m).to(x.dtype)


def select_lanes(x: Tensor, mask: Tensor | None, dim: int = -1) -> Tensor:
    """``x`` where ``mask`` along ``dim`` is not 0, else 0. Fractions do not scale."""
    return x if mask is None else torch.where(_along(mask, x, dim) == 0, 0, x)


def apt_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    mask_in: Tensor | None = None,
    mask_out: Tensor | None = None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    rng: Tensor | None = None,
    *,
    keep: Tensor | None = None,
) -> Tensor:
    """y = mask_out * ((mask_in * x) W^T + s ((mask_in * x) A^T) B^T + b), Eq. 2 of the paper with the bias.

    With dropout p the second mask_in * x is dropped and scaled by 1 / (1 - p): by the mask `keep` [..., K], where it is
    given, instead of ``dropout_mask(x.shape, p, rng)``.
    """
    return apt_linear_forward(x, weight, bias, lora_A, lora_B, mask_in, mask_out, scaling, dropout, rng, keep=keep)[0]


def apt_linear_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    mask_in: Tensor | None,
    mask_out: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    rng: Tensor | None = None,
    *,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, t) with y as in :func:`apt_linear` and t = drop(mask_in * x) A^T [..., R], saved for the backward."""
    masked = scale_lanes(x, mask_in)
    # A and B may be float32 over a 16-bit base: rounded once to the compute dtype.
    t = _dropped(masked, dropout, rng, keep) @ select_lanes(lora_A, mask_in, 1).to(x.dtype).T
    y = scaling / (1.0 - dropout) * (t @ lora_B.to(x.dtype).T)
    if weight is not None:
        y = masked @ weight.T + y
    if bias is not None:
        y = y + bias
    # float16 ends at 65504, before many a low-rank activation does: there t travels in float32.
    return scale_lanes(y, mask_out), t.float() if x.dtype == torch.float16 else t


def apt_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    t: Tensor,
    mask_in: Tensor | None,
    mask_out: Tensor | None,
    scaling: float,
    dropout: float,
    rng: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for (x, lora_A, lora_B, bias); an empty tensor [0] where ``output_mask`` says it is not needed.

    With g = mask_out * grad and u = g B:  dx = mask_in * (g W + s u A),  dA = mask_in * (s u^T x),
    dB = s g^T t,  db = sum of g over the tokens. Pruned rows and columns of dA and dB are exactly 0.
    With dropout p, s stands for s / (1 - p), and what was dropped of x is dropped of u A, and of the x in dA.
    """
    scaling = scaling / (1.0 - dropout)
    need_x, need_A, need_B, need_bias = output_mask
    g = scale_lanes(grad, mask_out)
    u = g @ select_lanes(lora_B, mask_out, 0).to(x.dtype)
    used = _dropped(x, dropout, rng)
    g2, u2, x2 = g.flatten(0, -2), u.flatten(0, -2), used.flatten(0, -2)
    if x.dim() == 1:
        g2, u2, x2 = g[None], u[None], used[None]
    t2 = t.reshape(g2.shape[0], -1).to(x.dtype)
    none = x.new_empty(0)
    dx = dA = dB = db = none
    if need_x:
        dx = _dropped(scaling * (u @ lora_A.to(x.dtype)), dropout, rng)
        dx = scale_lanes(dx if weight is None else g @ weight + dx, mask_in)
    if need_A:
        dA = scale_lanes((scaling * (u2.T @ x2)).to(lora_A.dtype), mask_in, 1)
    if need_B:
        dB = select_lanes((scaling * (g2.T @ t2)).to(lora_B.dtype), mask_out, 0)
    if need_bias:
        db = g2.sum(0)
    return dx, dA, dB, db


def dropout_mask(shape: Sequence[int], p: float, rng: Tensor) -> Tensor:
    """Which elements of a low-rank input of this shape [..., K] are kept, bool: those that draw at least p 2^16 of 16 bits.

    rng (seed, offset) int64 [2]. Row m of the flattened input and channel k draw by Philox4x32 with 7 rounds, the key the seed and the
    counter (k // 8, m, offset), 32 bits a word from the lowest up (m's upper half added to the offset's): channel k gets half k % 2 of
    word k % 8 // 2. p is rounded to a multiple of 2^-16, and to 1 - 2^-16 at most.
    """
    low, size = 0xFFFFFFFF, torch.Size(shape)
    rows = torch.arange(size[:-1].numel(), device=rng.device)[:, None]
    groups = torch.arange(-(-size[-1] // 8), device=rng.device)[None, :]
    (k0, c2), (k1, c3) = rng & low, rng >> 32 & low
    a, b, c, d = groups, rows & low, c2, (c3 + (rows >> 32)) & low
    for _ in range(7):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c  # of 64 bits that wrap around: >> and & take the upper and the lower half
        a, b, c, d = (second >> 32 & low) ^ b ^ k0, second & low, (first >> 32 & low) ^ d ^ k1, first & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    halves = torch.stack([half for word in (a, b, c, d) for half in (word & 0xFFFF, word >> 16)], -1)
    return (halves >= min(round(p * 65536), 65535)).flatten(1)[:, : size[-1]].reshape(size)


def merge_(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    mask_in: Tensor | None = None,
    mask_out: Tensor | None = None,
    check: bool = True,
) -> Tensor:
    """W <- diag(mask_out) (W + s B A) diag(mask_in) in place, accumulated in float32 (float64), rounded once."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    merged = weight.to(wide) + scaling * (lora_B.to(wide) @ lora_A.to(wide))
    merged = scale_lanes(scale_lanes(merged, mask_in, 1), mask_out, 0).to(weight.dtype)
    if check and not bool(torch.isfinite(merged).all()):
        raise RuntimeError("merge_: the merged weight would not be finite; weight is unchanged")
    with torch.no_grad():
        return weight.copy_(merged)


def mask_grads_(grads: Sequence[Tensor], masks: Sequence[Tensor], dims: Sequence[int]) -> None:
    """Scale ``grads[i]`` along ``dims[i]`` by ``masks[i]`` in place, zeros selected."""
    with torch.no_grad():
        for grad, mask, dim in zip(grads, masks, dims, strict=True):
            grad.copy_(scale_lanes(grad, mask, dim))


def _dropped(x: Tensor, p: float, rng: Tensor | None, keep: Tensor | None = None) -> Tensor:
    if p == 0.0:
        return x
    if keep is None:
        if rng is None:
            raise ValueError("rng must be an int64 tensor [2] (seed, offset) where dropout is not 0 and no mask is given, got None")
        keep = dropout_mask(x.shape, p, rng)
    return torch.where(keep, x, 0)


def _along(mask: Tensor, x: Tensor, dim: int) -> Tensor:
    shape = [1] * x.dim()
    shape[dim] = -1
    return mask.view(shape)
