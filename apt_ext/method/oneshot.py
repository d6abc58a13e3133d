"""Pruning in one step: score every block on some batches, keep the best of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..model import APTModel
from ..structure.architectures import Block
from ..structure.cutting import alike
from .salience import Salience
from .selection import top_k


def one_shot(model: APTModel, batches: Iterable[Mapping[str, Any]], keep: Mapping[str, int]) -> dict[str, Tensor]:
    """Mask all but the `keep[kind]` most salient of every block of these kinds ("heads", "neurons", "hidden"); returns the masks.

    The gradients of `model(**batch).loss` decide (see `Salience`); neither weights nor gradients are left changed, and dropout is off
    meanwhile. Layers that have to keep the same heads are scored together. A dimension of the residual stream has the sum of its scores
    where attention and feed-forward layers read it.

    Raises ValueError (a kind or number that the model does not have, no batches); masks are then as before.
    """
    check_keep(model, keep)
    blocks = {name: block for name, block in model.blocks.items() if block.kind in keep}
    scores = _scores(model, blocks, batches)
    masks = {name: top_k(scores[name], keep[block.kind]).float() for name, block in blocks.items()}
    for name, mask in masks.items():
        model.set_block_mask(name, mask)
    return masks


def check_keep(model: APTModel, keep: Mapping[str, int]) -> None:
    """ValueError for a kind or number that the model does not have."""
    for kind, count in keep.items():
        most = min((block.count for block in model.blocks.values() if block.kind == kind), default=0)
        if not 1 <= count <= most:
            raise ValueError(f"keep: expected 1 to {most} {kind}, got {count}")


def _scores(model: APTModel, blocks: dict[str, Block], batches: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """{block: one score for each of its count}."""
    sites: dict[str, tuple[nn.Module, int]] = {}
    for name, block in blocks.items():
        if block.kind != "hidden":
            sites[name] = (model.model.get_submodule(block.reader), block.count)
    stream = _stream_readers(model) if "hidden" in blocks else []
    for module in stream:
        sites[f"hidden {module}"] = (model.model.get_submodule(module), blocks["hidden"].count)
    salience, training = Salience(model, sites, decay=0.0), model.training
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    totals: dict[str, Tensor] = {}
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        model.eval()
        for batch in batches:
            with torch.enable_grad():
                model(**batch).loss.backward()
            salience.update()
            for name, score in salience.scores.items():
                totals[name] = totals[name] + score if name in totals else score.clone()
    finally:
        salience.remove()
        model.train(training)
        for parameter, gradient in gradients:
            parameter.grad = gradient
    if not totals:
        raise ValueError("batches: expected at least one, got none")
    if "hidden" in blocks:
        # what reads the stream below the first adapter has no gradient and no score
        totals["hidden"] = sum((totals[f"hidden {module}"] for module in stream if f"hidden {module}" in totals), torch.zeros(()))
    for group in alike(model.model, blocks):
        totals |= dict.fromkeys(group, sum((totals[name] for name in group), torch.zeros(())))
    return totals


def _stream_readers(model: APTModel) -> list[str]:
    """One linear that reads the residual stream for each attention and each feed-forward layer."""
    first = {"heads": 1, "neurons": 0}  # Q among V, Q, K, O; the first of the up projections
    return [block.sides[first[block.kind]].module for block in model.blocks.values() if block.kind in first]
