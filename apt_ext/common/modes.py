"""Evaluation mode, and exact products, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model is in evaluation mode; afterwards every module within it has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def exact_products() -> Iterator[None]:
    """Float32 products are not rounded to TF32 (`Trainer` with torch_compile turns that on); afterwards they are as before."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by torch's newer functions, which do not mix with this one
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        with suppress(RuntimeError):
            torch.set_float32_matmul_precision(precision)
