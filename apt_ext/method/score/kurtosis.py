"""Outliers: the kurtosis of what a block contributes to the outputs of the linear that reads it (Eq. 5 of the paper)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...adapter.layer import APTAdapter
from ...distributed.dtensor import whole
from ...pruning.architectures.lookup import stored, weight_dim


def kurtosis(values: Tensor, dim: int = -1) -> Tensor:
    """Excess kurtosis along `dim`: m4 / m2^2 - 3 with the central moments m_k = mean((x - mean)^k).

    0 where all values are equal or there are none.

    SciPy's `kurtosis(fisher=True, bias=True)`. Computed in float32 (float64 for float64).
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if not values.shape[dim]:
        return values.sum(dim)
    scale = values.abs().amax(dim, keepdim=True)
    centred = values / torch.where(scale > 0, scale, 1)  # small numbers keep their fourth power
    centred = centred - centred.mean(dim, keepdim=True)
    second = centred.square().mean(dim)
    constant = centred.abs().amax(dim) <= 8 * torch.finfo(values.dtype).eps  # what rounding the mean leaves
    return torch.where(constant, 0.0, centred.pow(4).mean(dim) / torch.where(constant, 1.0, second.square()) - 3.0)


@torch.no_grad()
def outliers(reader: nn.Module, mean: Tensor | None, count: int) -> Tensor:
    """sqrt(max(kurtosis, 0)) of O = W_eff * mean for each of `count` blocks of adjacent input channels of `reader`: [count].

    Over all products of a block's channels with the outputs, W_eff = W + s B A under the masks; masked outputs do not count.

    mean  [in_features] of the inputs, up to one factor; None: ones, which gives the same where a block is one channel
    """
    products = _products(reader, mean)  # [out, in]
    each = products.numel() // max(count, 1)  # a cut may have left no block
    return kurtosis(products.t().reshape(count, each)).clamp_min(0).sqrt()


@torch.no_grad()
def row_outliers(reader: nn.Module, mean: Tensor | None) -> Tensor:
    """The same of each output of `reader`, over its inputs: [out_features]; 0 for masked outputs. Masked inputs do not count."""
    products = _products(reader, mean, rows=False)
    if isinstance(reader, APTAdapter) and not bool((reader.mask_in != 0).all()):
        products = products[:, reader.mask_in != 0]
    return kurtosis(products).clamp_min(0).sqrt()


def _products(reader: nn.Module, mean: Tensor | None, rows: bool = True) -> Tensor:
    """W_eff * mean, [out, in]; rows: without the outputs that are masked."""
    base = stored(reader)
    weight = whole(base.weight.detach())  # type: ignore[operator]
    if isinstance(reader, APTAdapter) and reader.packing.store.host is not None:
        weight = reader.packing.store.host.to(weight.device)
    if weight_dim(base, "out") == 1:
        weight = weight.t()
    weight = weight.float() if weight.dtype != torch.float64 else weight
    if isinstance(reader, APTAdapter):
        if reader.rank and not reader.merged:
            A, B = (whole(factor.detach()).to(weight.dtype) for factor in (reader.lora_A, reader.lora_B))
            weight = torch.addmm(weight, B[:, : reader.rank], A[: reader.rank], alpha=reader.scaling)
        weight = torch.where(reader.mask_in != 0, weight, 0)
        if rows and not bool((reader.mask_out != 0).all()):
            weight = weight[reader.mask_out != 0]
        elif not rows:
            weight = torch.where((reader.mask_out != 0).unsqueeze(1), weight, 0)
    return weight if mean is None else weight * mean.to(weight.dtype)
