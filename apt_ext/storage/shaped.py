"""A stock model of given widths: made as wide as the widest layer, by a config that its class accepts, and cut to them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..pruning.architectures.lookup import Architecture, Block, architecture_of, find_blocks
from ..pruning.cut import (
    configs,
    lanes_for,
    parameter_changes,
    replace_parameters,
    tell_blocks,
    tell_constants,
    tell_modules,
)
from ..pruning.sizes import Sizes


def unknown_entries(config: Any, sizes: Sizes) -> list[str]:
    """The entries that the row of the table names and the config lacks, in words: no directory can say those sizes."""
    name = type(config).__name__
    return [
        f"{name} has no entry {field!r}, in which the row of the table looks for a number of {sizes.blocks[next(iter(found))].kind}; "
        "correct its width_field"
        for field, found in sizes.widths.items()
        if not hasattr(config, field)
    ]


def widest(row: Architecture, sizes: Sizes) -> dict[str, int]:
    """Entries of a config that accepts them, each at least as large as in any layer."""
    largest = {field: max([*found.values(), 1]) for field, found in sizes.widths.items()}
    entry, hidden = sizes.hidden
    for field in sizes.heads:
        largest[field] = max(largest[field], sizes.shared(field))
    if hidden is not None and row.derives_head_size:
        # heads * channels of a head have to be the hidden size, whichever stack the heads are in
        step = math.lcm(*(size * sizes.shared(field) for field, size in sizes.heads.items())) if sizes.heads else 1
        hidden = max([hidden, *(largest[field] * size for field, size in sizes.heads.items())])
        hidden = -(-hidden // step) * step
        largest |= {field: hidden // size for field, size in sizes.heads.items()}
    elif hidden is not None and row.heads_divide:
        step = math.lcm(*(largest[field] for field in sizes.heads)) if sizes.heads else 1
        hidden = -(-hidden // step) * step
    if hidden is not None:
        largest[entry] = hidden
    for field, groups in sizes.groups.items():
        largest[groups] = largest[field] // sizes.shared(field)
    return largest


def shaped(kind: Any, config: Any, row: Architecture | None, counts: dict[str, int], entries: dict[str, int]) -> Any:
    """A model with these numbers of blocks, cut from one that `config` describes; its values are of no account.

    row      the one by which it is cut; None: that of the table, ValueError without one
    counts   {block: how many there are}
    entries  {entry of the config: what it says in the end}
    """
    model = kind(config)
    if row is None and architecture_of(model) is None:
        raise ValueError(
            f"expected a row of the table for {config.model_type!r}, got none, for an earlier version wrote this directory; call "
            "apt_ext.register_architecture(row) with the row that it was cut by"
        )
    blocks = find_blocks(model, row)
    _check_attributes(model, blocks)
    if blocks.keys() != counts.keys() or any(counts[name] > block.count for name, block in blocks.items()):
        raise ValueError(f'expected "widths" of the blocks of this model, got {str(counts)[:200]}')
    kept = {name: torch.arange(block.count, device="cpu") < counts[name] for name, block in blocks.items()}
    lanes = lanes_for(model, blocks, kept)
    with torch.no_grad():
        replace_parameters(model, parameter_changes(model, lanes))
        tell_modules(model, lanes)
        tell_blocks(model, row)
        if "hidden" in counts:
            tell_constants(model, counts["hidden"])
    for own in configs(model):
        for field, width in entries.items():
            setattr(own, field, width)
    return model


def _check_attributes(model: nn.Module, blocks: dict[str, Block]) -> None:
    """ValueError unless what a cut sets on modules is there already, as a number."""
    for name, block in blocks.items():
        for attribute in (*block.rule.counts, *block.rule.totals) if block.rule is not None and block.owner else ():
            found = getattr(model.get_submodule(block.owner), attribute, None)
            if found is not None and type(found) is not int:
                raise ValueError(f"expected a number {attribute!r} of {block.owner}, which {name} counts, got {type(found).__name__}")
