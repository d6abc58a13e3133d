"""What the config of a cut model has to say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from .architectures.lookup import Blocks, side_width
from .cut import widths

Widths = dict[str, dict[str, int]]  # see `cut.widths`


@dataclass(frozen=True)
class Sizes:
    """What a config has to say. Its entries are named as the row of the table names them.

    widths  the width of every block by its entry
    heads   {entry that counts heads: how many channels one has}
    groups  {entry that counts heads: the one that counts the KV heads that they share}, of configs that have it
    hidden  the entry that says how many hidden dimensions there are, and how many; None: the model does not show it
    counts  {block: how many there are of it}
    blocks  the blocks of the model that they are sizes of, as it is
    """

    widths: Widths
    heads: dict[str, int]
    groups: dict[str, str]
    hidden: tuple[str, int | None]
    counts: dict[str, int]
    blocks: Blocks

    @classmethod
    def of(cls, model: nn.Module, blocks: Blocks, counts: Mapping[str, int] | None = None) -> Sizes:
        """Those of a model as it is, or with `counts` {block: number left}."""
        row = blocks.row
        found = widths(model, blocks, counts)
        heads = {name: block for name, block in blocks.items() if block.kind == "heads" and block.rule is not None}
        entry = "hidden_size" if row is None or row.stream is None else row.stream.width_field
        hidden = next(iter(found.get(entry, {}).values()), None)
        for block in heads.values() if hidden is None else ():
            if not block.is_cross:
                hidden = side_width(model.get_submodule(block.linear("q")), "in")
                break
        groups = {block.width_field: block.rule.groups_field for block in heads.values() if block.rule is not None}
        return cls(
            found,
            {block.width_field: block.size for block in heads.values()},
            {field: shared for field, shared in groups.items() if shared in found},
            (entry, hidden),
            {name: block.count for name, block in blocks.items()} if counts is None else dict(counts),
            blocks,
        )

    def common(self, field: str | None) -> int | None:
        """The width that all blocks of an entry have, or None."""
        found = set(self.widths.get(field or "", {}).values())
        return found.pop() if len(found) == 1 else None

    def shared(self, field: str) -> int:
        """How many query heads share a KV head, of the heads that this entry counts."""
        groups = self.widths.get(self.groups.get(field, ""), {})
        return next((heads // groups[name] for name, heads in self.widths[field].items() if groups.get(name)), 1)
