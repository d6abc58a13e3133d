"""A call of the linear that an adapter wraps."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def through_base(base: nn.Module, transposed: bool, x: Tensor) -> Tensor:
    """Return base(x). Where that fails because of x, the error names x; what does not fail pays nothing."""
    try:
        return base(x)  # type: ignore[no-any-return]
    except (RuntimeError, TypeError, IndexError, AttributeError):
        weight = base.weight
        assert isinstance(weight, Tensor)
        K = weight.shape[0] if transposed else weight.shape[1]
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a Tensor, got {type(x).__name__}") from None
        if x.dim() == 0 or x.shape[-1] != K:
            raise ValueError(f"x must have shape [..., K={K}], got {list(x.shape)}") from None
        if x.device != weight.device:
            raise ValueError(f"x must be on weight's device {weight.device}, got {x.device}") from None
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"x must have weight's dtype {weight.dtype}, got {x.dtype}") from None
        raise
