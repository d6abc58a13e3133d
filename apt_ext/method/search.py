"""Which blocks stay: the largest set within a budget, in the order of salience for what a block costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import checked_int, checked_mapping
from .cost import Cost


@dataclass(frozen=True)
class Group:
    """Blocks of one kind that keep the same number.

    blocks  their names
    chunk   they go in so many at a time, so that what is kept is a multiple of it (or all)
    floor   so many chunks, the best ones, always stay
    """

    blocks: tuple[str, ...]
    kind: str
    chunk: int = 1
    floor: int = 1

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ValueError("blocks: expected at least one, got none")
        checked_int("chunk", self.chunk, 1)
        checked_int("floor", self.floor, 0)


@dataclass(frozen=True)
class Found:
    """`keep` {block: [count] bool}; `threshold`: the salience for its cost of the last chunk that stays, infinite where only floors do."""

    keep: dict[str, Tensor]
    threshold: float


def search(
    scores: Mapping[str, Tensor],
    live: Mapping[str, Tensor],
    groups: Sequence[Group],
    cost: Cost,
    counts: Mapping[str, int],
    budget: float,
    joint: bool = True,
) -> Found:
    """The longest beginning of the chunks in their order whose cost is within `budget`; the floors stay whatever they cost.

    scores  {block: [count]} of every block of the groups, on the host; NaN counts as the lowest
    live    {block: [count] bool}, on the host: the others are gone and do not come back
    counts  of every block that `cost` knows: those in no group stay what they are here
    joint   one order of all kinds by salience for the cost at the present counts; False: every kind keeps the same share of its chunks, in
            its own order by salience for the cost

    Equal ones stay in the order of the groups and, within a block, of their index. At least one chunk stays.

    TypeError and ValueError for what is missing or does not fit, naming the block.
    """
    if not groups:
        raise ValueError("groups: expected at least one, got none")
    for name in (name for group in groups for name in group.blocks):
        _check_block(name, checked_mapping("scores", scores), checked_mapping("live", live))
    order = {name: _ranked(scores[name], live[name]) for group in groups for name in group.blocks}
    try:
        unit = cost.marginal({**counts, **{name: len(ranks) for name, ranks in order.items()}})
    except KeyError as error:
        raise ValueError(f"counts: expected numbers of every block that the cost knows, got none of {error.args[0]!r}") from None
    unknown = next((name for name in order if name not in unit), None)
    if unknown is not None:
        raise ValueError(f"cost: expected one that knows the blocks of the groups, got one that does not know {unknown!r}")
    chunks = [_chunks(group, scores, order, unit) for group in groups]
    owner = torch.cat([torch.full((len(c.sizes),), i, device="cpu") for i, c in enumerate(chunks)])
    sizes, worth = torch.cat([c.sizes for c in chunks]), torch.cat([c.worth for c in chunks])
    forced = torch.cat([torch.arange(len(c.sizes), device="cpu") < group.floor for c, group in zip(chunks, groups, strict=True)])
    key = -worth if joint else _shares(worth, forced, owner, groups)
    line = torch.argsort(torch.where(forced, -torch.inf, key), stable=True)
    owner, sizes = owner[line], sizes[line]

    def kept(number: int) -> dict[str, int]:
        of_group = torch.bincount(owner[:number], sizes[:number].double(), len(groups)).tolist()
        return {name: int(n) for group, n in zip(groups, of_group, strict=True) for name in group.blocks}

    least = low = max(int(forced.sum()), min(1, len(line)))
    high = len(line)
    while low < high:
        middle = (low + high + 1) // 2
        if cost.total({**counts, **kept(middle)}) <= budget:
            low = middle
        else:
            high = middle - 1
    keep = {}
    for name, number in kept(low).items():
        keep[name] = torch.zeros(len(scores[name]), dtype=torch.bool, device="cpu")
        keep[name][order[name][:number]] = True
    return Found(keep, float(worth[line[low - 1]]) if low > least else float("inf"))


def _check_block(name: str, scores: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> None:
    for what, values in (("scores", scores), ("live", live)):
        if name not in values:
            raise ValueError(f"{what}: expected those of every block of the groups, got none of {name!r}")
        if not isinstance(values[name], Tensor):
            raise TypeError(f"{what}[{name!r}]: expected a tensor, got {type(values[name]).__name__}")
    if live[name].dtype != torch.bool:
        raise TypeError(f"live[{name!r}]: expected a tensor of torch.bool, got {live[name].dtype}")
    if scores[name].dim() != 1 or live[name].shape != scores[name].shape:
        raise ValueError(
            f"scores[{name!r}], live[{name!r}]: expected [count] twice, got {list(scores[name].shape)}, {list(live[name].shape)}"
        )


def _ranked(score: Tensor, live: Tensor) -> Tensor:
    """The indices of the live ones, the most salient first; equal ones in order."""
    order = torch.argsort(score.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf), descending=True, stable=True)
    return order[live[order]]


@dataclass(frozen=True)
class _Chunks:
    """The chunks of one group, the most salient first: how many of each block are in one, and salience for the cost."""

    sizes: Tensor  # [chunks] int64
    worth: Tensor  # [chunks] float64, never rising


def _chunks(group: Group, scores: Mapping[str, Tensor], order: Mapping[str, Tensor], unit: Mapping[str, float]) -> _Chunks:
    """Blocks of different length are as long as the shortest."""
    length = min(len(order[name]) for name in group.blocks)
    number = -(-length // group.chunk)
    sums = torch.zeros(number, dtype=torch.float64, device="cpu")
    for name in group.blocks:
        ranked = scores[name].double().nan_to_num(nan=0.0)[order[name][:length]]
        sums += torch.nn.functional.pad(ranked, (0, number * group.chunk - length)).view(number, group.chunk).sum(1)
    sizes = torch.full((number,), group.chunk, device="cpu")
    if number:
        sizes[-1] = length - (number - 1) * group.chunk
    worth = sums / (sizes * max(sum(unit[name] for name in group.blocks), 1e-30))
    return _Chunks(sizes, torch.cummin(worth, 0).values if number else worth)  # sums may round upwards


def _shares(worth: Tensor, forced: Tensor, owner: Tensor, groups: Sequence[Group]) -> Tensor:
    """For each chunk, the share of its kind that comes before it."""
    found = torch.zeros_like(worth)
    kinds = list(dict.fromkeys(group.kind for group in groups))
    kind = torch.tensor([kinds.index(group.kind) for group in groups], device="cpu")[owner]
    for i in range(len(kinds)):
        own = (kind == i).nonzero().flatten()
        line = own[torch.argsort(torch.where(forced[own], -torch.inf, -worth[own]), stable=True)]
        found[line] = torch.arange(len(line), dtype=torch.float64, device="cpu") / max(len(line), 1)
    return found
