"""Moving averages of many small vectors at the cost of one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...common.checks import checked_number


class Averages:
    """A <- decay * A + (1 - decay) * A_now for vectors with names; started at 0, no bias correction.

    Those that come together lie end to end in one tensor: an update is two launches, whatever their number.

    decay  in [0, 1)
    named  {name: the average}; to be read only
    """

    def __init__(self, decay: float) -> None:
        if not 0.0 <= checked_number("decay", decay) < 1.0:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.named: dict[str, Tensor] = {}
        self._joined: dict[tuple[str, ...], Tensor] = {}  # of which those are views

    def add(self, sizes: Mapping[str, int], now: Tensor) -> None:
        """One update of the vectors of these names and lengths, which lie end to end in `now`. The others stay."""
        names = tuple(sizes)
        joined = self._joined.get(names)
        if joined is None:
            joined = torch.cat([self.named.get(name, now.new_zeros(size)) for name, size in sizes.items()])
            self._joined = {others: tensor for others, tensor in self._joined.items() if not sizes.keys() & set(others)} | {names: joined}
            self.named |= zip(names, torch.split(joined, list(sizes.values())), strict=True)
        joined.mul_(self.decay).add_(now, alpha=1 - self.decay)

    def replace(self, values: Mapping[str, Tensor]) -> None:
        """Go on from these, of which copies are kept."""
        self.named, self._joined = {name: value.clone() for name, value in values.items()}, {}

    def state(self) -> dict[str, Tensor]:
        """Copies."""
        return {name: value.clone() for name, value in self.named.items()}
