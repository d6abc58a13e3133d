"""The functional API: one compiled op each, also as ``torch.ops.apt_ext.*`` and, positional and typed, in ``apt_ext._C``.

Symbols: M tokens, N out_features, K in_features, R rank. :mod:`apt_ext.reference` holds the same formulas in eager torch.

Masks are float32 or x's dtype. Where a mask is exactly 0 its lane is skipped, not multiplied: Inf or NaN there never
reaches a kept lane, pruned outputs and gradients are exactly 0. Errors are ValueError (value, shape), TypeError (dtype,
layout) and RuntimeError (state); each names the argument, what was expected and what came, and nothing has changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _is_torch_function_mode_enabled
from torch.compiler import is_compiling
from torch.nn import functional as F

from . import _C

__all__ = ["apt_linear", "build_info", "dropout_mask", "mask_grads_", "merge_"]

# Bound once.
_apt_linear = torch.ops.apt_ext.apt_linear.default
_dropout_mask = torch.ops.apt_ext.dropout_mask.default
_merge_ = torch.ops.apt_ext.merge_.default
_mask_grads_ = torch.ops.apt_ext.mask_grads_.default


_LARGEST = (1 << 63) - 1
_MISTYPED = re.compile(r"Expected a value of type '([^']+)' for argument '([^']+)' but instead found type '([^']+)'")


def call(op: Any, *args: Any) -> Any:
    """``op(*args)``; what torch cannot convert at all (a list, None, a string) is a TypeError and no RuntimeError."""
    try:
        return op(*args)
    except RuntimeError as error:
        found = _MISTYPED.search(str(error))
        if found is None:
            raise
        expected, name, came = found.groups()
        kind = "a Tensor" if expected == "Tensor" else f"of type {expected}"
        raise TypeError(f"{name} must be {kind}, got {came}") from None


def drawn_rng(x: Any) -> Tensor | None:
    """(seed, offset) of a dropout of x, int64 [2], from torch's generator of its device; None of what is no Tensor.

    By an operation of torch, so that seeds, checkpoints, compilers and graph captures treat it as they treat any other: on CUDA one
    launch. On a CPU one number is drawn.
    """
    if not isinstance(x, Tensor):
        return None  # which the op refuses by name
    if x.is_cpu:
        return F.pad(torch.randint(_LARGEST, (1,), device=x.device), (0, 1))
    return torch.randint(_LARGEST, (2,), device=x.device)


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
) -> Tensor:
    """y = mask_out * ((mask_in * x) W^T + s ((mask_in * x) A^T) B^T + b), Eq. 2 of the paper with the bias.

    Args:
        x: [..., K] of float64, float32, float16 or bfloat16, any strides.
        weight: [N, K] of x's dtype, finite, either dimension contiguous; or None for the low-rank path alone.
        bias: [N] of x's dtype, or None.
        lora_A, lora_B: [R, K], [N, R] of x's dtype, or float32 over a 16-bit x (then rounded once, gradients float32).
        mask_in, mask_out: [K], [N], or None for all ones.
        scaling: s.
        dropout: p, 0 <= p < 1. The mask_in * x that A is multiplied with is dropped with this probability and scaled by
            1 / (1 - p); that of W is not. A NaN that is dropped does not reach the low-rank path.
        rng: int64 [2] on x's device, (seed, offset) of the generator that decides what is dropped: the same, the same.
            None: drawn from torch's generator of the device. See :func:`dropout_mask`.

    Returns:
        y [..., N] of x's dtype, a new tensor. Full-size always: masks can change in place with no recompilation and no
        new graph capture. float32 accumulation for the 16-bit types; on CUDA float32 follows
        ``torch.get_float32_matmul_precision()``.

    Gradients for x, lora_A, lora_B and bias, under the masks of this forward. weight and masks are constants: a
    RuntimeError names one that requires a gradient. Second derivatives, forward mode, ``torch.func`` and ``vmap`` run the
    same formula in plain torch operations, wider and slower. Of dropout rng alone is kept for the backward, which draws the
    mask again.
    """
    if rng is None and dropout:
        rng = drawn_rng(x)
    # The typed door costs less host time than torch.ops' and reaches the same dispatcher. It misses __torch_function__
    # and tracers of Python, and words a wrong argument worse.
    if type(x) is Tensor and not is_compiling() and not _is_torch_function_mode_enabled():
        try:
            return _C.apt_linear(x, weight, bias, lora_A, lora_B, mask_in, mask_out, scaling, dropout, rng)
        except TypeError:
            pass
    return call(_apt_linear, x, weight, bias, lora_A, lora_B, mask_in, mask_out, scaling, dropout, rng)  # type: ignore[no-any-return]


def dropout_mask(shape: Sequence[int], p: float, rng: Tensor) -> Tensor:
    """Draw the mask that :func:`apt_linear` drops by: bool [shape], True where an element is kept, on rng's device.

    It follows from rng, the row of an element in x with all but its last dimension flattened, and its channel: the shape does
    not matter beyond these, a compacted layer drops the same, and CPU and CUDA agree.

    Args:
        shape: of x, [..., K].
        p: probability of dropping, 0 <= p < 1. Rounded to a multiple of 2^-16, and to 1 - 2^-16 at most, while
            :func:`apt_linear` scales by 1 / (1 - p) as it was given.
        rng: int64 [2], (seed, offset).
    """
    if not isinstance(rng, Tensor):  # without one there is no device to dispatch on
        raise TypeError(f"rng must be a Tensor, got {type(rng).__name__}")
    return call(_dropout_mask, shape, p, rng)  # type: ignore[no-any-return]


def merge_(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    mask_in: Tensor | None = None,
    mask_out: Tensor | None = None,
    check: bool = True,
) -> Tensor:
    """W <- diag(mask_out) (W + s B A) diag(mask_in) in place; returns ``weight``.

    Accumulated in float32 (float64 for float64) and rounded once. Scratch: 4 bytes on CUDA, a block of rows a thread on the CPU,
    never W's size. Pruned rows and columns become 0 whatever they held.

    Args:
        weight: [N, K], written; no two of its elements may share memory.
        lora_A, lora_B: [R, K], [N, R] of the weight's dtype, or float32 over a 16-bit weight.
        check: True reads before it writes and raises RuntimeError, weight bitwise as it was, when a result would not be
            finite. False is one asynchronous pass, the one that can be captured in a CUDA graph.
    """
    call(_merge_, weight, lora_A, lora_B, scaling, mask_in, mask_out, check)
    return weight


def mask_grads_(grads: Sequence[Tensor], masks: Sequence[Tensor], dims: Sequence[int]) -> None:
    """Scale ``grads[i]`` along ``dims[i]`` by ``masks[i]`` in place, zeros selected.

    All contiguous gradients of a device go in one launch (one per 600 tensors), which a CUDA graph can capture; two
    gradients may not share memory. ``masks[i]`` has shape [grads[i].shape[dims[i]]] and lies on the gradient's device.
    """
    lists = {name: _listed(name, values) for name, values in (("grads", grads), ("masks", masks), ("dims", dims))}
    if any(lists.values()):  # without a tensor there is no device to dispatch on, and nothing to do
        call(_mask_grads_, *lists.values())


def _listed(name: str, values: Any) -> list[Any]:
    """A list of tensors, of "dims" of ints: for lists torch's own words name no element."""
    kind, word = ((int, torch.SymInt), "an int") if name == "dims" else ((Tensor,), "a Tensor")
    if isinstance(values, Tensor) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list, got {type(values).__name__}")
    found = list(values)
    for i, value in enumerate(found):
        if not isinstance(value, kind):
            raise TypeError(f"{name}[{i}] must be {word}, got {type(value).__name__}")
    return found


def build_info() -> dict[str, Any]:
    """What this build is: version, cuda (bool), cuda_archs, torch_version, cuda_version, cpu_capability."""
    return dict(_C.build_info())
