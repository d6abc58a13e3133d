"""`shrink`: the ordinary, smaller model inside an APTModel."""

from __future__ import annotations

import copy
import logging

import torch
from torch import nn

from ..adapter.mask import Mask
from ..adapter.merge import merge_for_good
from ..common.checks import checked_bool
from ..model import APTModel, adapters
from ..pruning.block_masks import host_mask, take_carriers
from ..pruning.cut import (
    Removal,
    folded,
    parameter_changes,
    removal,
    replace_parameters,
    report_spared,
    tell_blocks,
    tell_constants,
    tell_modules,
)
from ..pruning.float32_heads import narrowing
from ..pruning.wrappers import is_carrier
from ..storage import stock_saving
from ..wrapping import use_cache

logger = logging.getLogger("apt_ext")


def shrink(model: APTModel, *, unfinished: bool = False) -> nn.Module:
    """A new model of the stock class, with stock modules only: adapters merged, and cut where a block's mask is exactly zero.

    Rows of the linears that produce a removed channel go, with their bias, and columns of those that consume it; embeddings and norms
    follow the residual stream; fractional values are merged into the weights. It computes what the masked model computes. Where all layers
    have one width the config says it; different widths run as well, but no stock config can say them. Then `save_pretrained` and
    `push_to_hub` of the result write what `apt_ext.load_export` reads.

    A sub-layer with nothing left keeps its output bias and its norm. Where the stock class cannot run with nothing left (GPT-2's heads and
    neurons, the heads of the layer in which a decoder's cache is asked for its length) one stays, with output weights of zero, and the
    logger "apt_ext" says so.
    Where the output layer shares the embedding's weight, the last norm takes back what a fraction scales there.

    `model` is untouched. Every Parameter of the result is trainable, as in a model that was just loaded, and `use_cache` of its config is
    what it was when the adapters came.

    unfinished  take the model as it is also where a Controller has not reached its density

    Raises TypeError (not an APTModel), ValueError (layers that have to keep the same heads and do not; nothing kept of the residual
    stream) and RuntimeError (a merged weight would not be finite; a Controller has not reached its density), naming it.
    """
    if not isinstance(model, APTModel):
        raise TypeError(f"model: expected an APTModel, got {type(model).__name__}")
    if not checked_bool("unfinished", unfinished):
        model.refuse_unfinished("shrink")
    gone = removal(model.model, model.blocks)
    _tell_of_fractions(model)
    with torch.inference_mode(False):  # Parameters born in inference mode could never be trained
        return _shrunk(copy.deepcopy(model), gone)


def _tell_of_fractions(model: APTModel) -> None:
    """Say which blocks have fractions in their masks: they are merged, and only exact zeros are cut."""
    masks = {name: host_mask(model.model, block) for name, block in model.blocks.items()}
    soft = [name for name, mask in masks.items() if not mask.is_meta and Mask(mask).has_fractions]
    if soft:
        logger.warning(
            "shrink: the masks of %d blocks hold fractions, %r first; nothing is cut there, since only exact zeros are. A moving "
            "average of buffers makes such masks: average the Parameters alone (use_buffers=False), and copy the masks",
            len(soft),
            soft[0],
        )


def _shrunk(small: APTModel, gone: Removal) -> nn.Module:
    result: nn.Module = small.model
    hidden = gone.kept.get("hidden")
    width = None if hidden is None else int(hidden.sum())
    with torch.no_grad():
        values = folded(result, small.blocks.row, width)  # before the merge, which zeroes columns of a tied weight
        merge_for_good(dict(adapters(small)))
        take_carriers(result, {name: module for name, module in result.named_modules() if is_carrier(module)})
        for parameter, value in values:
            parameter.copy_(value)
        replace_parameters(result, parameter_changes(result, gone.lanes))
        tell_modules(result, gone.lanes)
        tell_blocks(result, small.blocks.row)
        if width is not None:
            tell_constants(result, width)
        narrowing(result)()
    report_spared(gone.spared)
    for parameter in result.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    use_cache.restore(result, small.use_cache_before)
    stock_saving.restore(result, small.blocks.row)
    return result
