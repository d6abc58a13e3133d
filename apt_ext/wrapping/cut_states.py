"""States of models that were cut: what they say, and how a model takes their sizes before it loads them.

A state holds, of each block, which of those before the first cut are left: "original.<block>", [count before the first cut] bool.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.layer import APTAdapter
from ..pruning.architectures.lookup import Blocks, origin_of
from ..pruning.architectures.origin import Origin
from ..pruning.cut_in_place import checked_cut_to, way_back

PREFIX = "original."


def tensors_of(blocks: Blocks, prefix: str = "") -> dict[str, Tensor]:
    """The entries of a state; none of a model that was not cut."""
    left = {} if blocks.origin is None else blocks.origin.left
    return {f"{prefix}{PREFIX}{name}": value.clone() for name, value in left.items()}


def without(state: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`state` without those entries."""
    return {key: value for key, value in state.items() if not key.startswith(prefix + PREFIX)}


def read(state: Mapping[str, Any], blocks: Blocks, prefix: str = "") -> dict[str, Tensor] | None:
    """{block: [count before the first cut] bool} of what a state says is left; None: it says nothing.

    TypeError and ValueError for entries that `tensors_of` did not make, or of another model.
    """
    start = prefix + PREFIX
    found = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
    if not found:
        return None
    full = blocks.full
    if found.keys() != full.keys():
        odd = sorted(found.keys() ^ full.keys())
        raise ValueError(f"{start}*: expected an entry for each block of this model, got others: {', '.join(odd[:4])}")
    for name, value in found.items():
        if not isinstance(value, Tensor) or value.dtype != torch.bool:
            got = getattr(value, "dtype", type(value).__name__)
            raise TypeError(f"{start}{name} must be a Tensor of torch.bool, got {got}")
    # A base that was cut alike, but is no APTModel that was: it says the sizes of now.
    alike = blocks.origin is None and all(int(value.sum()) == full[name] for name, value in found.items())
    for name, value in found.items():
        if value.dim() != 1 or not (alike or len(value) == full[name]):
            raise ValueError(
                f"{start}{name} must have shape [{full[name]}], one entry for each of this block before the first cut, "
                f"got {list(value.shape)}"
            )
    if "hidden" in found and not bool(found["hidden"].any()):
        raise ValueError(f"{start}hidden must leave at least one dimension, got none")
    return {name: value.cpu().clone() for name, value in found.items()}


@contextmanager
def cut_to(model: nn.Module, blocks: Blocks, left: Mapping[str, Tensor] | None) -> Iterator[Blocks]:
    """Within this context the model, in place, has the sizes that `left` (see `read`) says; it yields its blocks.

    Whatever raises within brings everything back. ValueError where less is there than `left` says; RuntimeError where a
    Parameter that has to change is held by DDP or FSDP, or an adapter is merged.
    """
    if left is None:
        yield blocks
        return
    if blocks.origin is None and any(len(left[name]) != block.count for name, block in blocks.items()):
        yield _said(model, blocks, left)  # cut alike
        return
    origin = origin_of(model, blocks)
    for name, before in origin.left.items():
        if bool((left[name] & ~before).any()):
            raise ValueError(_less_cut(name, int(left[name].sum()), int(before.sum()), len(before)))
    cut = checked_cut_to(model, blocks, origin.within(left))
    if cut.is_empty:
        yield blocks
        return
    undo = way_back(model, cut)
    try:
        yield cut.make()
    except BaseException:
        undo()
        raise


def refuse_less_cut(state: Mapping[str, Any], blocks: Blocks, prefix: str) -> None:
    """ValueError for a state that says nothing of cuts, and has masks of the sizes before those of this model."""
    if blocks.origin is None:
        return
    for name, block in blocks.items():
        for side in block.sides:
            mask = state.get(f"{prefix}{side.module}.mask_{side.side}")
            before = blocks.origin.widths[side.module, side.side]
            now = len(blocks.origin.positions(name)) < blocks.full[name]
            if now and isinstance(mask, Tensor) and mask.shape == (before,):
                raise ValueError(_less_cut(name, blocks.full[name], block.count, blocks.full[name]))


def _less_cut(name: str, state: int, model: int, full: int) -> str:
    return (
        f"state_dict: expected a state that was cut at least as far as this model, got one that keeps {state} of the {full} of "
        f"block {name!r}, of which this model has {model} left; what a cut took does not come back: load it into a model that "
        "was not cut, or not as far"
    )


def _said(model: nn.Module, blocks: Blocks, left: Mapping[str, Tensor]) -> Blocks:
    """The blocks of a base that was cut alike by other means, with what the state says there was before."""
    widths = {}
    for (name, side), now in origin_of(model, blocks).widths.items():
        owner = next(block for block, found in blocks.items() if any(one.module == name and one.side == side for one in found.sides))
        count = blocks[owner].count
        each = now // count if count else blocks[owner].size  # with nothing left, of heads that do not share keys
        widths[name, side] = each * len(left[owner])
    return Blocks(blocks.row, blocks, Origin(dict(left), widths))


def raise_rank_limits(model: nn.Module, blocks: Blocks) -> None:
    """Let adapters load ranks up to what their linears could hold before the first cut."""
    widths = {} if blocks.origin is None else blocks.origin.widths
    for name, adapter in model.named_modules():
        if isinstance(adapter, APTAdapter):
            before = [widths.get((name, side), size) for side, size in (("in", adapter.in_features), ("out", adapter.out_features))]
            adapter.rank_limit = max(adapter.rank_limit, min(before))
