"""The ranks of a run's adapters: their budget, how far each may grow, and who grows at an event."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...adapter.layer import APTAdapter
from ...adapter.rank import Uncut
from ...model import APTModel, adapters
from ...optim.initial_state import OptimizerLike
from ...pruning.architectures.lookup import Blocks
from ...pruning.block_masks import lanes_of
from ..schedule import Steps, linear_budget
from .rank_budget import AdapterImportance, Growth, grown_ranks


class RankGrowth:
    """Ranks under a budget. Sizes, limits and the budget are of the linears before the first cut.

    growth      how they grow
    importance  of the adapters with a rank
    initial     {adapter: its rank at the start of the run}
    """

    def __init__(self, model: APTModel, growth: Growth, decay: float) -> None:
        self.growth = growth
        self.importance = AdapterImportance(adapters(model), decay, growth.importance == "signed")
        self._model = model
        widths = {} if model.blocks.origin is None else model.blocks.origin.widths
        self._sizes = {
            name: (widths.get((name, "in"), adapter.in_features), widths.get((name, "out"), adapter.out_features))
            for name, adapter in self.adapters.items()
        }
        self.begin(self.ranks())

    @property
    def adapters(self) -> dict[str, APTAdapter]:
        """{name: adapter} of those with a rank."""
        return self.importance.adapters

    def begin(self, ranks: Mapping[str, int]) -> None:
        """Take these for the ranks at the start of the run."""
        self.initial = dict(ranks)

    def ranks(self) -> dict[str, int]:
        """{adapter: its rank now}."""
        return {name: adapter.rank for name, adapter in self.adapters.items()}

    def parameters(self, ranks: Mapping[str, int]) -> int:
        """Entries of all factors of these ranks."""
        return sum(rank * sum(self._sizes[name]) for name, rank in ranks.items())

    def limits(self) -> dict[str, int]:
        """The highest rank that each adapter may reach."""
        limits = {}
        for name, adapter in self.adapters.items():
            most = 8 * self.initial[name] if self.growth.limit is None else self.growth.limit
            limits[name] = min(most, adapter.max_rank or most, *self._sizes[name])
        return limits

    def growing(self) -> dict[str, APTAdapter]:
        """Those that may grow and have no storage reserved."""
        limits = self.limits() if self.growth.budget > 1.0 else {}
        return {name: one for name, one in self.adapters.items() if one.max_rank is None and one.rank < limits.get(name, 0)}

    def next(self, now: int, steps: Steps) -> dict[str, int]:
        """The adapters that grow at the event `now`, with their new ranks."""
        ranks = {name: adapter.get_current_rank() for name, adapter in self.adapters.items()}
        first = self.parameters(self.initial)
        allowed = linear_budget(now, steps.start, steps.end, first, self.growth.budget)
        before = max((event for event in steps.events if event < now), default=steps.start)
        rate = allowed / linear_budget(before, steps.start, steps.end, first, self.growth.budget)
        return grown_ranks(
            ranks,
            {name: sum(sizes) for name, sizes in self._sizes.items()},
            self.importance.importance(),
            allowed,
            self.limits(),
            rate if self.growth.rule == "paper" else None,
        )

    def grow(self, ranks: Mapping[str, int], optimizer: OptimizerLike, generator: torch.Generator) -> None:
        """Give the adapters these ranks. New rows are drawn for all inputs before the first cut, so that a cut draws no others."""
        blocks = self._model.blocks
        before = {name: Uncut(*self._sizes[name], _lanes_in(name, blocks)) for name in ranks}
        self.importance.grow(self._model, ranks, optimizer, generator, before)

    def check_initial(self, initial: Mapping[str, Any]) -> None:
        """ValueError unless `initial`, of a state, says as many parameters as its ranks have."""
        if initial["parameters"] != (held := self.parameters(initial["ranks"])):
            raise ValueError(f"state['initial']['parameters']: expected {held} of these initial ranks, got {initial['parameters']}")


def _lanes_in(name: str, blocks: Blocks) -> Tensor | None:
    """Which of the inputs of a linear before the first cut are left; None: all."""
    origin = blocks.origin
    if origin is None or (name, "in") not in origin.widths:
        return None
    width = origin.widths[name, "in"]
    stay = torch.ones(width, dtype=torch.bool, device="cpu")
    for block_name, block in blocks.items():
        for side in block.sides:
            if (side.module, side.side) == (name, "in"):
                stay &= lanes_of(origin.left[block_name], side, width)
    return stay.nonzero().flatten()
