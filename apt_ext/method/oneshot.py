"""Pruning in one step: score every block on some batches, keep the best of each."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..common.checks import FLOATING, checked_bool, checked_int, checked_mapping, checked_number
from ..common.log import logger
from ..common.modes import evaluating
from ..model import APTModel, adapters
from ..pruning.architectures.lookup import Blocks
from ..pruning.cost import cost_of
from ..pruning.sizes import Sizes
from ..storage.formats import retype_failures, stock_failures
from .outlook import Outlook, allowance, chosen
from .refusals import checked_scores, refuse_second
from .score.block_scores import BlockScores
from .select.groups import groups_of
from .select.search import search
from .select.top_k import top_k


def one_shot(
    model: APTModel, batches: Iterable[Mapping[str, Any]], keep: Mapping[str, int] | float, *, kurtosis: float = 0.0
) -> dict[str, Tensor]:
    """Mask all but the most salient blocks, in one step; returns the masks {block: [count]}.

    keep      {kind: how many stay of every block of that kind ("heads", "neurons", "hidden")}, or a density: see `within_density`
    kurtosis  the weight of outliers in the salience, see `BlockScores`

    The gradients of `model(**batch).loss` decide (see `Salience`), added up over the batches: a few hundred samples of a pretrained model,
    before it is tuned, or of a tuned one. Neither weights nor gradients are left changed, and dropout is off meanwhile. Layers that have to
    keep the same heads are scored together. A dimension of the residual stream has the sum of its scores where attention and feed-forward
    layers read it.
    Where no stock config can say the numbers of `keep`, the logger warns before anything is scored.

    Raises ValueError (a kind or number that the model does not have, a density outside [0, 1] or below the floors, no batches, batches
    without labels or whose loss is not finite), TypeError, and RuntimeError (salience that is not finite or 0 everywhere, a merged adapter,
    a Controller at work on the model, within inference mode); masks are then as before.
    """
    _check_model(model)
    if isinstance(keep, Mapping):
        check_keep(model, keep)
        counts = {name: keep.get(block.kind, int((model.get_block_mask(name) != 0).sum())) for name, block in model.blocks.items()}
        _say_unwritable(model, counts)
        scores = block_scores(model, list(keep), batches, kurtosis)
        masks = {name: top_k(score, keep[model.blocks[name].kind]).float() for name, score in scores.items()}
    else:
        _check_density("keep", keep)
        masks = within_density(model, block_scores(model, pruned_kinds(model, keep), batches, kurtosis), keep)
    before = {name: model.get_block_mask(name) for name in masks}
    try:
        for name, mask in masks.items():
            model.set_block_mask(name, mask)
    except BaseException:
        for name, mask in before.items():
            if not torch.equal(model.get_block_mask(name), mask):
                model.set_block_mask(name, mask)
        raise
    return masks


def _say_unwritable(model: APTModel, counts: Mapping[str, int]) -> None:
    """Say it, before anything is scored, where no stock config can say what will be left."""
    sizes, config = Sizes.of(model.model, model.blocks, counts), getattr(model.model, "config", None)
    failures = stock_failures(config, sizes)
    if failures and retype_failures(config, sizes):
        logger.warning(
            "one_shot: no stock config can say what keep leaves: %s; export(..., per_layer=True) writes it in any case", "; ".join(failures)
        )


def pruned_kinds(model: APTModel, density: float) -> list[str]:
    """The kinds of blocks that the model's config prunes at this density of the layers' parameters."""
    config, cost = replace(model.apt_config, density=density), cost_of(model.model, model.blocks)
    live = {name: model.get_block_mask(name).cpu() != 0 for name in model.blocks}
    return chosen(config, model.blocks, lambda one: Outlook(model.model, model.blocks, one, cost, live)).config.prune or []


def within_density(model: APTModel, scores: Mapping[str, Tensor], density: float, joint: bool = True, floor: int = 1) -> dict[str, Tensor]:
    """The masks {block: [count] of 0 and 1} of the best blocks of these scores that are within `density` of the layers' parameters
    before the first cut.

    Chosen as a Controller chooses at an event, with its arguments and the config's `round_to` and `uniform`; nothing is masked here.
    TypeError, and ValueError: no scores, or of what is no block, of another size or not finite; a density below what always stays.
    """
    _check_model(model)
    _check_density("density", density)
    checked_bool("joint", joint)
    checked_int("floor", floor, 0)
    if not checked_mapping("scores", scores):
        raise ValueError("scores: expected those of some blocks of this model, got none")
    for name, score in scores.items():
        count = model.block(name).count
        if not isinstance(score, Tensor) or score.dtype not in FLOATING:
            raise TypeError(f"scores[{name!r}]: expected a floating tensor, got {getattr(score, 'dtype', type(score).__name__)}")
        if list(score.shape) != [count] or not bool(score.isfinite().all()):
            raise ValueError(f"scores[{name!r}]: expected {count} finite numbers, got {score}")
    config, cost = model.apt_config, cost_of(model.model, model.blocks)
    live = {name: model.get_block_mask(name).cpu() != 0 for name in model.blocks}
    counts = {name: int(kept.sum()) for name, kept in live.items()}
    full = cost.total(model.blocks.full)
    allowed = allowance(density, full)
    scored = Blocks(model.blocks.row, {name: model.blocks[name] for name in scores}, model.blocks.origin)
    groups = groups_of(model.model, scored, config.round_to, config.uniform, floor)
    keep = search({name: score.cpu() for name, score in scores.items()}, live, groups, cost, counts, allowed, joint).keep
    least = cost.total({**counts, **{name: int(kept.sum()) for name, kept in keep.items()}})
    if least > allowed:
        raise ValueError(f"keep: expected a density of at least {least / full:.4f}, which is what always stays, got {density}")
    return {name: kept.float() for name, kept in keep.items()}


def _check_model(model: Any) -> None:
    if not isinstance(model, APTModel):
        raise TypeError(f"model: expected an APTModel, got {type(model).__name__}")


def _check_density(name: str, value: Any) -> None:
    if not 0.0 <= checked_number(name, value) <= 1.0:
        raise ValueError(f"{name}: expected a density in [0, 1], got {value}")


def check_keep(model: APTModel, keep: Mapping[str, int]) -> None:
    """ValueError for a kind or number that the model does not have, TypeError for no number."""
    kinds = dict.fromkeys(block.kind for block in model.blocks.values())
    if not keep:
        raise ValueError(f"keep: expected numbers for some of {', '.join(kinds) or 'no kinds of blocks'}, got none")
    for kind, count in keep.items():
        if kind not in kinds:
            raise ValueError(f"keep: expected kinds of blocks of this model ({', '.join(kinds) or 'it has none'}), got {kind!r}")
        if not isinstance(count, int) or isinstance(count, bool):
            raise TypeError(f"keep: expected an int for {kind}, got {type(count).__name__}")
        most = min((block.count for block in model.blocks.values() if block.kind == kind), default=0)
        if not 1 <= count <= most:
            raise ValueError(f"keep: expected 1 to {most} {kind}, got {count}")


def block_scores(model: APTModel, kinds: Collection[str], batches: Iterable[Mapping[str, Any]], kurtosis: float = 0.0) -> dict[str, Tensor]:
    """{block: [count] float32 on the host}: the salience of each block of these kinds, added up over the batches; see `BlockScores`.

    Gradients, weights and modes are afterwards as before. TypeError for batches that are no mappings; ValueError where there are none, no
    labels or a loss that is not finite; RuntimeError where salience is not finite or 0 everywhere, an adapter is merged, a Controller is at
    work on the model (it would hear these batches), and within inference mode.
    """
    _check_model(model)
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise TypeError(f"batches: expected an iterable of dicts of the model's arguments, got {type(batches).__name__}")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("batches: expected to be scored by gradients, got a call within torch.inference_mode(), which has none")
    if not any(block.kind in kinds for block in model.blocks.values()):
        raise ValueError(f"kinds: expected kinds of blocks that the model has, got {list(kinds)}")
    refuse_second(model, "no Controller")
    merged = next((name for name, adapter in adapters(model) if adapter.merged), None)
    if merged is not None:
        raise RuntimeError(f"model: expected adapters that gradients go through, got {merged} merged; call its unmerge_weights() first")
    batches = iter(batches)
    listener = BlockScores(model, kinds, decay=0.0, kurtosis=kurtosis)
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    totals: dict[str, Tensor] = {}
    means: dict[str, Tensor] = {}
    number = -1
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        with evaluating(model):
            for number, batch in enumerate(batches):
                with torch.enable_grad():
                    loss = getattr(model(**checked_mapping(f"batches[{number}]", batch)), "loss", None)
                    if loss is None:
                        raise ValueError(f"batches[{number}]: expected labels, got a batch for which the model computes no loss")
                    if not bool(torch.isfinite(loss)):
                        raise ValueError(f"batches[{number}]: expected a finite loss, got {loss.item()}")
                    loss.backward()
                listener.salience.update()
                for found, sums in ((listener.salience.scores, totals), (listener.salience.means, means)):
                    sums.update({name: sums[name] + value if name in sums else value.clone() for name, value in found.items()})
    finally:
        listener.salience.remove()
        for parameter, gradient in gradients:
            parameter.grad = gradient
    if number < 0:
        raise ValueError("batches: expected at least one, got none")
    listener.salience.load_state_dict({"scores": totals, "means": means})
    listener.look_for_outliers()
    return dict(checked_scores("batches", listener.scores()))
