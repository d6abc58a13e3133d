"""`shrink`: the ordinary, smaller model inside an APTModel."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..errors import naming
from ..model import APTModel, adapters
from .architectures import Side, weight_dim, widths
from .blocks import merged_linear


def shrink(model: APTModel) -> nn.Module:
    """A new model of the stock class, with stock modules only: adapters merged, and cut where a block's mask is exactly zero.

    Rows of the linears that produce a removed channel go, with their bias, and columns of those that consume it; fractional values are
    merged into the weights. It computes what the masked model computes. Where all layers have one width the config says it; different
    widths run as well, but no stock config can say them. A block with nothing left keeps the output bias and norm of its layer.
    `model` is untouched. Every Parameter of the result is trainable, as in a model that was just loaded.

    Raises TypeError (not an APTModel) and RuntimeError (a merged weight would not be finite), naming it.
    """
    if not isinstance(model, APTModel):
        raise TypeError(f"model: expected an APTModel, got {type(model).__name__}")
    kept = {name: model.get_block_mask(name).nonzero().flatten() for name in model.blocks}
    small = copy.deepcopy(model)
    for name, adapter in list(adapters(small)):
        with naming(name):
            small.model.set_submodule(name, merged_linear(adapter))
    result: nn.Module = small.model
    with torch.no_grad():
        for name, block in model.blocks.items():
            if len(kept[name]) < block.count:
                for side in block.sides:
                    _cut(result.get_submodule(side.linear), side, kept[name])
    for field, sizes in widths(result).items():
        if len(set(sizes.values())) == 1:
            setattr(result.config, field, next(iter(sizes.values())))
    for parameter in result.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return result


def _cut(linear: nn.Module, side: Side, kept: Tensor) -> None:
    """Keep the lanes `kept` [count] of one side, in their order."""
    for name, parameter in list(linear.named_parameters(recurse=False)):
        if name == "weight" or side.side == "out":
            dim = weight_dim(linear, side.side) if name == "weight" else 0
            setattr(linear, name, nn.Parameter(parameter.index_select(dim, kept.to(parameter.device))))
    # What nn.Linear and Conv1D say about themselves
    for attribute in ("out_features", "nf") if side.side == "out" else ("in_features", "nx"):
        if hasattr(linear, attribute):
            setattr(linear, attribute, len(kept))
