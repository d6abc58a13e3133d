"""What a model was before its first cut: the sizes that every share is of, and the numbering that blocks had."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Origin:
    """The blocks of a model before its first cut, and what cuts have left of them.

    left    {block: [count before the first cut] bool, on the host}: which are there
    widths  {(module, "in" or "out"): channels before the first cut} of each side that a block touches
    """

    left: Mapping[str, Tensor]
    widths: Mapping[tuple[str, str], int]

    @property
    def counts(self) -> dict[str, int]:
        """{block: how many there were}."""
        return {name: len(left) for name, left in self.left.items()}

    def positions(self, name: str) -> Tensor:
        """Return where those that are left of a block were, int64 [count now], ascending."""
        return self.left[name].nonzero().flatten()

    def after(self, kept: Mapping[str, Tensor]) -> Origin:
        """Return the Origin once a cut has kept, of those that are left of each block, `kept` ([count now] bool)."""
        left = {}
        for name, old in self.left.items():
            left[name] = torch.zeros_like(old)
            left[name][self.positions(name)[kept[name].cpu()]] = True
        return Origin(left, self.widths)

    def within(self, others: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return, for what `others` leaves ({block: [count before the first cut] bool}), which of those here: [count now] bool."""
        return {name: others[name][old] for name, old in self.left.items()}
