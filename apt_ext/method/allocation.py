"""Which adapters grow in rank, and how far: importance, and the division of a parameter budget (section 4.3 of the paper)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..adapter import APTAdapter


class AdapterImportance:
    """Moving average of I_k = |sum_j A_kj dL/dA_kj| for each rank k of each adapter; an adapter's importance is its mean over ranks.

    The mean, so that a grown adapter is not favoured by its size; the sum keeps its sign inside, as in the authors' code. Rank-0 adapters
    take no part. Call :meth:`update` before each optimizer step, :meth:`restart` after ranks changed.

    adapters  (name, adapter) pairs, as apt_ext.adapters(model) gives
    decay     I <- decay * I + (1 - decay) * I_now (0.85 in the paper), started at 0
    """

    def __init__(self, adapters: Iterable[tuple[str, APTAdapter]], decay: float = 0.85) -> None:
        self.adapters = {name: adapter for name, adapter in adapters if adapter.rank > 0}
        self.decay = decay
        self.averages: dict[str, Tensor] = {}  # [rank] each
        self.restart()

    def restart(self) -> None:
        """Every average is 0 again, at the adapters' present ranks."""
        self.averages = {name: adapter.lora_A.new_zeros(adapter.rank, dtype=torch.float32) for name, adapter in self.adapters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Read the gradients of lora_A (accumulated over micro-batches); an adapter without a gradient counts 0."""
        for name, adapter in self.adapters.items():
            average, grad = self.averages[name].mul_(self.decay), adapter.lora_A.grad
            if grad is not None:
                product = adapter.Wa.float() * grad[: adapter.rank].float()
                average.add_(product.sum(1).abs(), alpha=1 - self.decay)

    def importance(self) -> dict[str, float]:
        """One plain number for each adapter; waits for the device once."""
        if not self.averages:
            return {}
        means = torch.stack([average.mean() for average in self.averages.values()])
        return dict(zip(self.averages, means.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {name: average.clone() for name, average in self.averages.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError, with nothing changed, unless names and ranks are those of the adapters."""
        expected = {name: adapter.rank for name, adapter in self.adapters.items()}
        got = {name: average.numel() for name, average in state.items()}
        if got != expected:
            raise ValueError(f"state: expected adapters of these ranks: {expected}, got {got}")
        self.averages = {name: state[name].to(average.device, torch.float32, copy=True) for name, average in self.averages.items()}


def grown_ranks(
    ranks: Mapping[str, int], sizes: Mapping[str, int], importance: Mapping[str, float], budget: int, limits: Mapping[str, int]
) -> dict[str, int]:
    """The adapters that grow, with their new ranks, so that all adapters together stay within `budget` parameters.

    The more important half, floor(n / 2), of those that are below their limit takes the whole increase at one rate:
    rate = 1 + (budget - now) / (parameters of the chosen), r' = min(floor(r * rate), limit), which meets the budget to within one rank an
    adapter where no limit binds.

    ranks   present rank of each adapter
    sizes   parameters of one rank: in_features + out_features
    limits  the highest rank each may reach
    """
    now = sum(rank * sizes[name] for name, rank in ranks.items())
    eligible = [name for name, rank in ranks.items() if 0 < rank < limits[name]]
    # sorted() is stable, so equal importance leaves the adapters in their given order
    chosen = sorted(eligible, key=lambda name: importance[name], reverse=True)[: len(eligible) // 2]
    held = sum(ranks[name] * sizes[name] for name in chosen)
    if not chosen or budget <= now:
        return {}
    grown = {name: min(ranks[name] * (held + budget - now) // held, limits[name]) for name in chosen}
    return {name: rank for name, rank in grown.items() if rank > ranks[name]}
