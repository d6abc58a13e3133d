"""The op of a compacted layer with apt_linear's signature."""

import torch

from apt_ext.adapter.packed_weight import PackedWeight


def operands(W, m_in, m_out, N, K, device):
    """(PackedWeight, masks) of a weight [N, K] or none, masks or none."""
    masks = [torch.ones(n, device=device) if m is None else m for m, n in ((m_in, K), (m_out, N))]
    return PackedWeight(*masks, W), masks


def compact_linear(x, W, bias, A, B, m_in, m_out, scaling):
    """apt_linear's signature and function."""
    kept, masks = operands(W, m_in, m_out, B.shape[0], A.shape[1], x.device)
    return kept.apply(x, kept.packed, bias, A, B, masks, scaling)
