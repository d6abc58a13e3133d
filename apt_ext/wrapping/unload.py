"""`merge_and_unload`: a model without adapters, in place."""

from __future__ import annotations

import torch
from torch import nn

from ..adapter.layer import APTAdapter
from ..adapter.merge import merge_for_good
from ..common.interrupts import held
from ..pruning.architectures.lookup import Blocks
from ..pruning.block_masks import get_mask, take_carriers
from ..pruning.cut import folded
from ..pruning.float32_heads import narrowing
from ..pruning.wrappers import is_carrier
from ..storage import stock_saving


def merge_and_unload(model: nn.Module, blocks: Blocks) -> None:
    """Merge adapters and masks into the linears of `model`, which go back to their places (`APTModel.merge_and_unload`).

    All that can fail comes first: what is refused, memory for folded values and for values that get their own dtype back,
    and `merge_for_good`, which checks every layer before it writes the first. An interrupt waits until all is written.
    """
    for name, block in blocks.items():
        if any(side.of == "norm" for side in block.sides) and not bool(get_mask(model, block).all()):
            what = "hidden dimensions" if block.kind == "hidden" else f"{block.kind} of block {name!r}, over which a norm runs,"
            raise RuntimeError(f"merge_and_unload: {what} are pruned, which no full-size model computes; use apt_ext.shrink")
    carriers = {name: module for name, module in model.named_modules() if is_carrier(module)}
    narrow = narrowing(model)
    values = folded(model, blocks.row)  # before the merge, which zeroes columns of a tied weight
    with held(), torch.no_grad():
        merge_for_good({name: module for name, module in carriers.items() if isinstance(module, APTAdapter)})
        take_carriers(model, carriers)
        for parameter, value in values:
            parameter.copy_(value)
        narrow()
    stock_saving.restore(model, blocks.row)
