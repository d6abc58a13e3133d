"""Pruning in one step: score every block on some batches, keep the best of each."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..model import APTModel
from .scores import BlockScores
from .selection import top_k


def one_shot(model: APTModel, batches: Iterable[Mapping[str, Any]], keep: Mapping[str, int]) -> dict[str, Tensor]:
    """Mask all but the `keep[kind]` most salient of every block of these kinds ("heads", "neurons", "hidden"); returns the masks.

    The gradients of `model(**batch).loss` decide (see `Salience`); neither weights nor gradients are left changed, and dropout is off
    meanwhile. Layers that have to keep the same heads are scored together. A dimension of the residual stream has the sum of its scores
    where attention and feed-forward layers read it.

    Raises ValueError (a kind or number that the model does not have, no batches); masks are then as before.
    """
    check_keep(model, keep)
    scores = block_scores(model, list(keep), batches)
    masks = {name: top_k(score, keep[model.blocks[name].kind]).float() for name, score in scores.items()}
    for name, mask in masks.items():
        model.set_block_mask(name, mask)
    return masks


def check_keep(model: APTModel, keep: Mapping[str, int]) -> None:
    """ValueError for a kind or number that the model does not have."""
    for kind, count in keep.items():
        most = min((block.count for block in model.blocks.values() if block.kind == kind), default=0)
        if not 1 <= count <= most:
            raise ValueError(f"keep: expected 1 to {most} {kind}, got {count}")


def block_scores(model: APTModel, kinds: Collection[str], batches: Iterable[Mapping[str, Any]], kurtosis: float = 0.0) -> dict[str, Tensor]:
    """{block: [count] float32 on the host}: the salience of each block of these kinds, added up over the batches; see `BlockScores`.

    Gradients, weights and modes are afterwards as before. ValueError where there are no batches.
    """
    listener, training = BlockScores(model, kinds, decay=0.0, kurtosis=kurtosis), model.training
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    totals: dict[str, Tensor] = {}
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        model.eval()
        for batch in batches:
            with torch.enable_grad():
                model(**batch).loss.backward()
            listener.salience.update()
            for name, score in listener.salience.scores.items():
                totals[name] = totals[name] + score if name in totals else score.clone()
    finally:
        listener.salience.remove()
        model.train(training)
        for parameter, gradient in gradients:
            parameter.grad = gradient
    if not totals:
        raise ValueError("batches: expected at least one, got none")
    listener.salience.scores = totals
    listener.look_for_outliers()
    return listener.scores()
