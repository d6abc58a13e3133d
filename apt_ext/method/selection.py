"""Which blocks of one family stay: the best `k`, with k rounded to what hardware likes."""

from __future__ import annotations

import torch
from torch import Tensor


def kept_count(count: int, density: float, round_to: int = 1) -> int:
    """The largest multiple of `round_to` within density * count, but at least one `round_to` (or `count`); all of them at density 1.

    The same for every layer of the same width, so that the cut model has one width (uniform).
    """
    if not 0.0 <= density <= 1.0:
        raise ValueError(f"density must lie in [0, 1], got {density}")
    if round_to < 1:
        raise ValueError(f"round_to must be at least 1, got {round_to}")
    if density == 1.0:
        return count
    allowed = int(count * density + 1e-6)  # 0.7 * 10 is a little below 7
    return min(count, max(allowed // round_to, 1) * round_to)


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
