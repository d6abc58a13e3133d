"""Which blocks of one family stay: the best `k`."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(score: Tensor, k: int) -> Tensor:
    """Bool [count], True at the `k` largest of `score` [count]; of equal scores the lower index stays. NaN ranks lowest."""
    if score.dim() != 1:
        raise ValueError(f"score must have one dimension, got shape {list(score.shape)}")
    if not 0 <= k <= score.numel():
        raise ValueError(f"k must lie between 0 and {score.numel()}, got {k}")
    order = torch.argsort(score.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf), descending=True, stable=True)
    keep = torch.zeros_like(score, dtype=torch.bool)
    keep[order[:k]] = True
    return keep
