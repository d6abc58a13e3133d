"""Which blocks of a model keep the same number, in which steps, and of which something always stays."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ...pruning.architectures.lookup import Block, as_blocks
from ...pruning.cut import alike, never_empty
from .search import Group


def groups_of(model: nn.Module, blocks: Mapping[str, Block], round_to: int, uniform: bool, floor: int) -> list[Group]:
    """The groups of these blocks of a model, with or without adapters in it.

    uniform  blocks that one entry of the stock config counts, and of which there were as many before the first cut, are one group
    floor    chunks that always stay; one, whatever it says, of hidden dimensions, where stock classes cannot run with nothing, and of the
             last attention of a decoder to its encoder, which would be cut off
    """
    tied = {name: tuple(group) for group in alike(model, blocks) for name in group}
    together: dict[tuple[object, ...], list[str]] = {}
    full = as_blocks(model, blocks).full
    for name, block in blocks.items():
        key = (block.kind, block.width_field, full[name]) if uniform else tied.get(name, (name,))
        together.setdefault(key, []).append(name)
    spared = _spared(model, blocks)
    groups = []
    for names in together.values():
        least = max(floor, int(any(name in spared for name in names)))
        kind = blocks[names[0]].kind
        groups.append(Group(tuple(names), kind, 1 if kind == "heads" else round_to, least))
    return groups


def _spared(model: nn.Module, blocks: Mapping[str, Block]) -> set[str]:
    row = as_blocks(model, blocks).row
    found = {name for name, block in blocks.items() if block.kind == "hidden"}
    if row is not None:
        found |= set(never_empty(row, model, blocks))
    cross = sorted((name for name, block in blocks.items() if block.is_cross), key=lambda name: blocks[name].layer)
    return found | set(cross[-1:])
