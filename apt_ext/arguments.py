"""What the adapter's calls ask of their arguments, in words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def checked_mask(name: str, mask: Any, like: Tensor) -> Tensor:
    """``mask`` as a detached float32 tensor of ``like``'s shape and device, values in [0, 1]; else a worded error."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(mask).__name__}")
    if mask.dtype not in FLOATING:
        raise TypeError(f"{name} must be floating (float64, float32, float16 or bfloat16), got {mask.dtype}")
    if mask.shape != like.shape:
        raise ValueError(f"{name} must have shape {list(like.shape)}, got {list(mask.shape)}")
    if mask.device != like.device:
        raise ValueError(f"{name} must be on the module's device {like.device}, got {mask.device}")
    value = mask.detach().to(torch.float32)
    if not value.is_meta and not bool(((value >= 0) & (value <= 1)).all()):  # false for NaN as well
        low, high = value.min().item(), value.max().item()
        raise ValueError(f"{name} must hold values in [0, 1], got values from {low} to {high}")
    return value


def all_ones(mask: Tensor) -> bool:
    return not mask.is_meta and bool((mask == 1).all())


def checked_int(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def linear_shape(linear: nn.Module) -> tuple[int, int, bool]:
    """(out_features, in_features, weight is stored [K, N]), or TypeError for what is no plain linear layer."""
    kind = type(linear).__name__
    is_linear = isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward
    is_conv1d = kind == "Conv1D" and type(linear).__module__.startswith("transformers.")
    weight = getattr(linear, "weight", None)
    plain = type(weight) is nn.Parameter and weight.dtype in FLOATING
    if not (is_linear or is_conv1d) or not plain:
        held = "" if plain or weight is None else f" with a weight of type {type(weight).__name__} and dtype {weight.dtype}"
        raise TypeError(
            f"linear must be an nn.Linear or transformers' Conv1D with a plain floating weight (quantised layers cannot be "
            f"merged or cut), got {type(linear).__module__}.{kind}{held}"
        )
    assert weight is not None
    rows, columns = weight.shape
    return (columns, rows, True) if is_conv1d else (rows, columns, False)
