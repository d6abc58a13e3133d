"""`merge_and_unload`: a model without adapters, in place."""

from __future__ import annotations

import torch
from torch import nn

from ..adapter.layer import APTAdapter
from ..adapter.shared_memory import indexed
from ..common.checks import error_prefix
from ..pruning.architectures.lookup import Blocks
from ..pruning.block_masks import get_mask, merged_linear
from ..pruning.cut import folded
from ..pruning.float32_heads import narrow
from ..pruning.wrappers import StreamCarrier
from ..storage import stock_saving


def merge_and_unload(model: nn.Module, blocks: Blocks) -> None:
    """Merge adapters and masks into the linears of `model`, which go back to their places (`APTModel.merge_and_unload`)."""
    for name, block in blocks.items():
        if any(side.of == "norm" for side in block.sides) and not bool(get_mask(model, block).all()):
            what = "hidden dimensions" if block.kind == "hidden" else f"{block.kind} of block {name!r}, over which a norm runs,"
            raise RuntimeError(f"merge_and_unload: {what} are pruned, which no full-size model computes; use apt_ext.shrink")
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, APTAdapter)]
    narrow(model, check=True)
    values = folded(model, blocks.row)
    merged_before = [adapter.merged for _, adapter in found]
    with indexed():
        try:
            for name, adapter in found:
                with error_prefix(name):
                    adapter.merge_weights(keep="cpu")
        except BaseException:
            for (_, adapter), merged in zip(found, merged_before, strict=True):
                if not merged:
                    adapter.unmerge_weights()
            raise
        for name, adapter in found:
            model.set_submodule(name, merged_linear(adapter))
    for name, module in list(model.named_modules()):
        if isinstance(module, StreamCarrier):
            model.set_submodule(name, module.base_layer)
    with torch.no_grad():
        for parameter, value in values:
            parameter.copy_(value)
    narrow(model)
    stock_saving.restore(model, blocks.row)
