"""Which adapters grow in rank, and how far: importance, and the division of a parameter budget (section 4.3 of the paper)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...adapter.layer import APTAdapter
from ...adapter.rank import Uncut, increase_rank
from ...common.checks import FLOATING, checked_choice, checked_int, checked_mapping, checked_number
from ...distributed.dtensor import is_sharded, whole
from ...optim.initial_state import OptimizerLike
from ..score.moving_average import Averages
from .rank_advice import Advice


@dataclass(frozen=True)
class Growth:
    """How ranks grow at the schedule's events, from the adapter parameters at the start to `budget` times as many.

    budget      1 lets no rank grow; 4 in the authors' code
    limit       no rank grows beyond; None: 8 times its rank at the start, and max_rank in any case
    rule        "budget": the chosen half takes the whole increase (the authors' code); "paper": its ranks grow at the budget's own rate,
                which falls short of it
    importance  "signed" (the authors' code) or "paper", see AdapterImportance
    """

    budget: float = 4.0
    limit: int | None = None
    rule: str = "budget"
    importance: str = "signed"

    def __post_init__(self) -> None:
        checked_number("growth.budget", self.budget, 1.0)
        if self.limit is not None:
            checked_int("growth.limit", self.limit, 1)
        checked_choice("growth.rule", self.rule, ("budget", "paper"))
        checked_choice("growth.importance", self.importance, ("signed", "paper"))


class AdapterImportance:
    """Moving average of what each rank of each adapter matters, and from it the adapter's importance.

    Of rank k |sum_j A_kj dL/dA_kj|, of the adapter the mean over ranks, so that a grown one is not favoured by its size: the authors' code.
    Or sum_i |B_ik dL/dB_ik|, and their sum over ranks: the paper. Rank-0 adapters take no part. Call :meth:`observe` before an optimizer
    step and :meth:`update` after it (a step that was skipped has no update), :meth:`restart` after ranks changed.

    adapters  (name, adapter) pairs, as apt_ext.adapters(model) gives
    decay     I <- decay * I + (1 - decay) * I_now (0.85 in the paper), started at 0
    signed    the code's formula; False: the paper's
    """

    def __init__(self, adapters: Iterable[tuple[str, APTAdapter]], decay: float = 0.85, signed: bool = True) -> None:
        self.adapters = {name: adapter for name, adapter in adapters if adapter.rank > 0}
        self.signed = signed
        self.advice = Advice(self.adapters)
        self._averages = Averages(decay)  # of all rows of a factor, those that no rank uses yet among them
        self._alike: list[dict[str, int]] = []  # {adapter: rows}, for each number of columns
        self._seen: list[tuple[dict[str, int], Tensor]] = []  # each of those with its products of the last observe, end to end
        self.restart()

    @property
    def averages(self) -> dict[str, Tensor]:
        """[rank] float32 each; to be read only."""
        return {name: average[: self.adapters[name].rank] for name, average in self._averages.named.items()}

    def _rows(self, factor: Tensor) -> Tensor:
        return factor if self.signed else factor.t()

    def _factor(self, name: str) -> Tensor:
        factors = self.adapters[name]._parameters  # attribute access through nn.Module is slow
        factor = factors["lora_A" if self.signed else "lora_B"]
        assert factor is not None
        return factor

    def restart(self) -> None:
        """Every average is 0 again, at the adapters' present ranks."""
        by_columns: dict[int, dict[str, int]] = {}
        zeros = {}
        for name in self.adapters:
            factor = self._factor(name)
            rows, columns = self._rows(factor).shape
            by_columns.setdefault(columns, {})[name] = rows
            zeros[name] = torch.zeros(rows, dtype=torch.float32, device=factor.device)
        self._averages.replace(zeros)
        self._alike, self._seen = list(by_columns.values()), []

    def follow_cut(self) -> None:
        """Factors have fewer columns: those that are alike are others; the averages stay."""
        averages = self._averages.state()
        self.restart()
        self._averages.replace(averages)

    @torch.no_grad()
    def observe(self) -> None:
        """Read the gradients (accumulated over micro-batches). One without counts 0, and is named."""
        if any(self._factor(name).grad is None for name in self.adapters):  # as of each that learns nothing
            self.advice.of_gradients()
        self._seen = [(names, self._products([self._factor(name) for name in names])) for names in self._alike]

    def _products(self, factors: list[Tensor]) -> Tensor:
        """What every row of these factors matters, end to end; a few launches for all of them."""
        grads = [torch.zeros_like(factor) if factor.grad is None else factor.grad for factor in factors]
        if any(map(is_sharded, factors)):  # each on its own: the sums travel, not the products
            return torch.cat([whole(self._sums(factor, grad)) for factor, grad in zip(factors, grads, strict=True)])
        along = 0 if self.signed else 1
        return self._sums(torch.cat(factors, along), torch.cat(grads, along))

    def _sums(self, factor: Tensor, grad: Tensor) -> Tensor:
        products = self._rows(factor.float() * grad.float())
        return products.sum(1).abs() if self.signed else products.abs().sum(1)

    @torch.no_grad()
    def update(self) -> None:
        """The step was made: what was observed enters the averages."""
        for names, seen in self._seen:
            self._averages.add(names, seen)
        self._seen = []

    def grow(
        self,
        model: nn.Module,
        ranks: Mapping[str, int],
        optimizer: OptimizerLike,
        generator: torch.Generator,
        uncut: Mapping[str, Uncut],
    ) -> None:
        """Give the adapters these ranks; `model` holds them, and may be compiled. `uncut`: their sizes before the first cut."""
        self.advice.of_growth(model, ranks)
        for name, rank in ranks.items():
            increase_rank(self.adapters[name], rank, optimizer=optimizer, generator=generator, uncut=uncut[name])

    def importance(self) -> dict[str, float]:
        """One plain number for each adapter; waits for the device once."""
        averages = self.averages
        if not averages:
            return {}
        of_ranks = torch.mean if self.signed else torch.sum
        return dict(zip(averages, torch.stack([of_ranks(average) for average in averages.values()]).tolist(), strict=True))

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
        self.restart()
        for name, average in self.averages.items():
            average.copy_(state[name])


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
