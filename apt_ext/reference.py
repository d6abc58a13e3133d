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
) -> Tensor:
    """y = mask_out * ((mask_in * x) W^T + s ((mask_in * x) A^T) B^T + b), Eq. 2 of the paper with the bias."""
    return apt_linear_forward(x, weight, bias, lora_A, lora_B, mask_in, mask_out, scaling)[0]


def apt_linear_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    mask_in: Tensor | None,
    mask_out: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """(y, t) with y as in :func:`apt_linear` and t = (mask_in * x) A^T [..., R], saved for the backward."""
    masked = scale_lanes(x, mask_in)
    # A and B may be float32 over a 16-bit base: rounded once to the compute dtype.
    t = masked @ select_lanes(lora_A, mask_in, 1).to(x.dtype).T
    y = scaling * (t @ lora_B.to(x.dtype).T)
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
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for (x, lora_A, lora_B, bias); an empty tensor [0] where ``output_mask`` says it is not needed.

    With g = mask_out * grad and u = g B:  dx = mask_in * (g W + s u A),  dA = mask_in * (s u^T x),
    dB = s g^T t,  db = sum of g over the tokens. Pruned rows and columns of dA and dB are exactly 0.
    """
    need_x, need_A, need_B, need_bias = output_mask
    g = scale_lanes(grad, mask_out)
    u = g @ select_lanes(lora_B, mask_out, 0).to(x.dtype)
    g2, u2, x2 = g.flatten(0, -2), u.flatten(0, -2), x.flatten(0, -2)
    if x.dim() == 1:
        g2, u2, x2 = g[None], u[None], x[None]
    t2 = t.reshape(g2.shape[0], -1).to(x.dtype)
    none = x.new_empty(0)
    dx = dA = dB = db = none
    if need_x:
        dx = scaling * (u @ lora_A.to(x.dtype))
        dx = scale_lanes(dx if weight is None else g @ weight + dx, mask_in)
    if need_A:
        dA = scale_lanes((scaling * (u2.T @ x2)).to(lora_A.dtype), mask_in, 1)
    if need_B:
        dB = select_lanes((scaling * (g2.T @ t2)).to(lora_B.dtype), mask_out, 0)
    if need_bias:
        db = g2.sum(0)
    return dx, dA, dB, db


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


def _along(mask: Tensor, x: Tensor, dim: int) -> Tensor:
    shape = [1] * x.dim()
    shape[dim] = -1
    return mask.view(shape)
