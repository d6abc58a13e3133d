"""Losses that read the weight of the output layer instead of calling it, and so go round an adapter there."""

from __future__ import annotations

import logging

from torch import nn

from ..adapter.layer import APTAdapter

logger = logging.getLogger("apt_ext")


def tell_of_output_adapter(model: nn.Module) -> None:
    """Say by the logger "apt_ext" that an adapter is on the output layer of `model`, where there is one."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if not (isinstance(head, APTAdapter) and head.rank):
        return
    name = next(name for name, module in model.named_modules() if module is head)
    logger.warning(
        "target_modules: %s is the output layer, and its adapter learns only where the loss calls it. A "
        "loss that reads its weight (Liger, cut-cross-entropy, the fused output layer of TRL) goes round "
        "the adapter: it then has no effect and gets no gradient. Turn that loss off, or leave the layer "
        "out with exclude_modules=[%r]",
        name,
        name.rpartition(".")[2],
    )
