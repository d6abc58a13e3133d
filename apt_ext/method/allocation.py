"""Which adapters grow in rank, and how far: importance, and the division of a parameter budget (section 4.3 of the paper)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..adapter import APTAdapter
from ..arguments import FLOATING, checked_mapping, checked_number
from ..sharding import is_sharded, whole


class AdapterImportance:
    """Moving average of what each rank of each adapter matters; an adapter's importance is its mean over ranks.

    I_k = |sum_j A_kj dL/dA_kj| for rank k, as in the authors' code, or sum_i |B_ik dL/dB_ik|, as the paper has it. The mean, so that a
    grown adapter is not favoured by its size. Rank-0 adapters take no part. Call :meth:`observe` before an optimizer step and
    :meth:`update` after it (a step that was skipped has no update), :meth:`restart` after ranks changed.

    adapters  (name, adapter) pairs, as apt_ext.adapters(model) gives
    decay     I <- decay * I + (1 - decay) * I_now (0.85 in the paper), started at 0
    signed    the code's formula; False: the paper's
    """

    def __init__(self, adapters: Iterable[tuple[str, APTAdapter]], decay: float = 0.85, signed: bool = True) -> None:
        if not 0.0 <= checked_number("decay", decay) < 1.0:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.adapters = {name: adapter for name, adapter in adapters if adapter.rank > 0}
        self.decay, self.signed = decay, signed
        self.averages: dict[str, Tensor] = {}  # [rank] each
        self._seen: dict[str, Tensor] = {}  # the products of the last observe
        self.restart()

    def restart(self) -> None:
        """Every average is 0 again, at the adapters' present ranks."""
        self.averages = {
            name: torch.zeros(adapter.rank, dtype=torch.float32, device=adapter.lora_A.device) for name, adapter in self.adapters.items()
        }
        self._seen = {}

    @torch.no_grad()
    def observe(self) -> None:
        """Read the gradients (accumulated over micro-batches); an adapter without a gradient counts 0."""
        factors = {name: adapter.lora_A if self.signed else adapter.lora_B for name, adapter in self.adapters.items()}
        grads = {name: factor.grad for name, factor in factors.items()}
        given = {name: (factors[name].float(), grad.float()) for name, grad in grads.items() if grad is not None}
        self._seen = {name: torch.zeros_like(average) for name, average in self.averages.items() if name not in given}
        if not given:
            return
        # A few launches for all of them: the products of factors of one width lie in one matrix, a row for each rank.
        products = torch._foreach_mul(*map(list, zip(*given.values(), strict=True)))
        by_width: dict[int, dict[str, Tensor]] = {}
        for name, product in zip(given, products, strict=True):
            rows = product if self.signed else product.t()
            if is_sharded(rows):  # the sums travel, not the products
                rows = whole((rows if self.signed else rows.abs()).sum(1, keepdim=True))
            by_width.setdefault(rows.shape[1], {})[name] = rows[: self.adapters[name].rank]
        for of_width in by_width.values():
            matrix = torch.cat(list(of_width.values()))
            sums = matrix.sum(1).abs() if self.signed else matrix.abs().sum(1)
            self._seen |= zip(of_width, torch.split(sums, [len(rows) for rows in of_width.values()]), strict=True)

    @torch.no_grad()
    def update(self) -> None:
        """The step was made: what was observed enters the averages."""
        if self._seen:
            averages = [self.averages[name] for name in self._seen]
            torch._foreach_mul_(averages, self.decay)
            torch._foreach_add_(averages, list(self._seen.values()), alpha=1 - self.decay)
        self._seen = {}

    def importance(self) -> dict[str, float]:
        """One plain number for each adapter; waits for the device once."""
        if not self.averages:
            return {}
        means = torch.stack([average.mean() for average in self.averages.values()])
        return dict(zip(self.averages, means.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {name: average.clone() for name, average in self.averages.items()}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """TypeError or ValueError unless names and ranks are those of the adapters."""
        for name, average in checked_mapping("state", state).items():
            if not isinstance(average, Tensor) or average.dtype not in FLOATING or average.dim() != 1:
                raise TypeError(f"state[{name!r}]: expected a floating tensor of one dimension, got {average!r:.80}")
        expected = {name: adapter.rank for name, adapter in self.adapters.items()}
        got = {name: average.numel() for name, average in state.items()}
        if got != expected:
            raise ValueError(f"state: expected adapters of these ranks: {expected}, got {got}")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises TypeError or ValueError, with nothing changed, unless names and ranks are those of the adapters."""
        self.check_state(state)
        self.averages = {name: state[name].to(average.device, torch.float32, copy=True) for name, average in self.averages.items()}


def grown_ranks(
    ranks: Mapping[str, int],
    sizes: Mapping[str, int],
    importance: Mapping[str, float],
    budget: int,
    limits: Mapping[str, int],
    rate: float | None = None,
) -> dict[str, int]:
    """The adapters that grow, with their new ranks, so that all adapters together stay within `budget` parameters.

    The more important half, floor(n / 2), of those that are below their limit takes the whole increase at one rate, which meets the budget
    to within one rank an adapter. What one cannot take because of its limit goes to the others of that half; where all are at their limit
    the budget is not reached.

    ranks   present rank of each adapter
    sizes   parameters of one rank: in_features + out_features
    limits  the highest rank each may reach
    rate    the paper's rule instead: r' = floor(r * rate) for the chosen, with the rate at which the budget grows; falls short of it
    """
    now = sum(rank * sizes[name] for name, rank in ranks.items())
    eligible = [name for name, rank in ranks.items() if 0 < rank < limits[name]]
    # sorted() is stable, so equal importance leaves the adapters in their given order
    chosen = sorted(eligible, key=lambda name: importance[name], reverse=True)[: len(eligible) // 2]
    if not chosen or budget <= now:
        return {}
    if rate is not None:
        grown = {name: min(int(ranks[name] * rate), limits[name]) for name in chosen}
    else:
        grown = _at_one_rate(ranks, sizes, {name: limits[name] for name in chosen}, budget - now)
    return {name: rank for name, rank in grown.items() if rank > ranks[name]}


def _at_one_rate(ranks: Mapping[str, int], sizes: Mapping[str, int], limits: Mapping[str, int], more: int) -> dict[str, int]:
    """The ranks that take `more` parameters at one rate, those at their limit apart."""
    full: dict[str, int] = {}
    while free := [name for name in limits if name not in full]:
        held = sum(ranks[name] * sizes[name] for name in free)
        left = more - sum((rank - ranks[name]) * sizes[name] for name, rank in full.items())
        grown = {name: ranks[name] * (held + left) // held for name in free}
        over = {name: limits[name] for name, rank in grown.items() if rank > limits[name]}
        if not over:
            return full | grown
        full |= over
    return full
