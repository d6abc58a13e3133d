"""What an adapter asks of its arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..common.checks import FLOATING, checked_int, checked_number, linear_shape
from .shared_memory import merged_into

if TYPE_CHECKING:
    from .layer import APTAdapter


def checked_arguments(
    in_features: Any, out_features: Any, rank: Any, scaling: Any, max_rank: Any, dropout: Any, init_std: Any, dtype: Any
) -> tuple[int | None, float, torch.dtype]:
    """(max_rank, scaling, dtype) as they are used, or what `APTAdapter` refuses."""
    limit = min(checked_int("in_features", in_features, 0), checked_int("out_features", out_features, 0))
    if checked_int("rank", rank, 0) > limit:
        raise ValueError(f"rank must be at most min(out_features, in_features) = {limit}, got {rank}")
    if max_rank is not None:
        max_rank = min(checked_int("max_rank", max_rank, 0), limit)
        if rank > max_rank:
            raise ValueError(f"rank must be at most max_rank = {max_rank}, got {rank}")
    scaling = checked_number("scaling", scaling)
    if not 0.0 <= checked_number("dropout", dropout) < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    if init_std is not None and checked_number("init_std", init_std) < 0:
        raise ValueError(f"init_std must be at least 0, got {init_std}")
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or dtype not in FLOATING:
        raise TypeError(f"dtype must be float64, float32, float16 or bfloat16, got {dtype!r}")
    return max_rank, scaling, dtype


def checked_linear(linear: nn.Module, rank: int, dtype: torch.dtype | None) -> tuple[int, int, bool, torch.dtype]:
    """(out_features, in_features, whether the weight is stored [K, N], the factors' dtype), or what `from_linear` refuses."""
    out_features, in_features, transposed = linear_shape(linear)
    weight, bias = linear.weight, linear.bias
    assert isinstance(weight, nn.Parameter)
    dtype = weight.dtype if dtype is None else dtype
    if (
        not isinstance(dtype, torch.dtype)
        or dtype != weight.dtype
        and not (dtype == torch.float32 and weight.dtype in (torch.float16, torch.bfloat16))
    ):
        raise TypeError(f"dtype must be the weight's {weight.dtype}, or float32 over a 16-bit weight, got {dtype!r}")
    if checked_int("rank", rank, 0) > min(out_features, in_features):
        raise ValueError(
            f"rank must be at most min(out_features, in_features) = {min(out_features, in_features)} "
            f"for {type(linear).__name__}({in_features}, {out_features}), got {rank}"
        )
    if "forward" in vars(linear) or linear._forward_hooks or linear._forward_pre_hooks:
        raise RuntimeError(
            f"linear must have no forward hooks and no forward of its own, which the adapter would not run, got a "
            f"{type(linear).__name__} with one (accelerate's device_map sets it); remove it, or hook the adapter instead"
        )
    if not weight.is_meta and not bool(torch.isfinite(weight.detach()).all()):
        raise ValueError(f"weight of {type(linear).__name__}({in_features}, {out_features}) must be finite, got NaN or Inf")
    if any(merged_into(tensor) for tensor in (weight, bias) if isinstance(tensor, Tensor)):
        raise RuntimeError("from_linear: this linear already carries the merge of another adapter; unmerge that one first")
    return out_features, in_features, transposed, dtype


def check_override(adapter: APTAdapter, name: str, mask: Any, x: Any) -> None:
    """Raise what `APTAdapter.forward` refuses of a mask that is given to it."""
    size = adapter.in_features if name == "mask_in" else adapter.out_features
    if adapter.merged:
        raise RuntimeError(f"{name} cannot be overridden while merged; call unmerge_weights() first")
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a Tensor or None, got {type(mask).__name__}")
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
    if mask.dtype not in (torch.float32, x.dtype):
        raise TypeError(f"{name} must have dtype float32 or x's {x.dtype}, got {mask.dtype}")
    if mask.shape != (size,):
        raise ValueError(f"{name} must have shape [{size}], got {list(mask.shape)}")
    if mask.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {mask.device}")
