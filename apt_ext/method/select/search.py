"""Which blocks stay: the largest set within a budget, in the order of salience for what a block costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...common.checks import checked_int, checked_mapping
from ...pruning.cost import Cost


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
    checked_mapping("scores", scores), checked_mapping("live", live)
    names = [name for group in groups for name in group.blocks]
    for name in names:
        _check_block(name, scores, live)
    order = {name: _ranked(scores[name], live[name]) for name in names}
    try:
        unit = cost.marginal({**counts, **{name: len(ranks) for name, ranks in order.items()}})
    except KeyError as error:
        raise ValueError(f"counts: expected numbers of every block that the cost knows, got none of {error.args[0]!r}") from None
    unknown = next((name for name in order if name not in unit), None)
    if unknown is not None:
        raise ValueError(f"cost: expected one that knows the blocks of the groups, got one that does not know {unknown!r}")
    owner, sizes, worth, forced = _chunks(groups, scores, order, unit)
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
    sizes_of = [len(scores[name]) for name in names]
    keep = dict(zip(names, torch.split(torch.zeros(sum(sizes_of), dtype=torch.bool, device="cpu"), sizes_of), strict=True))
    for name, number in kept(low).items():
        keep[name].index_fill_(0, order[name][:number], True)
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


def _chunks(
    groups: Sequence[Group], scores: Mapping[str, Tensor], order: Mapping[str, Tensor], unit: Mapping[str, float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All chunks in the order of the groups, the most salient of each first: its group's number, how many of each block are in it, its
    salience for the cost (float64, never rising within a group), and whether it is one of the floor.

    Blocks of a group of different length are as long as the shortest.
    """
    lengths = [min(len(order[name]) for name in group.blocks) for group in groups]
    chunks = [min(group.chunk, max(length, 1)) for group, length in zip(groups, lengths, strict=True)]  # of more than all: all of them
    numbers = [-(-length // chunk) for chunk, length in zip(chunks, lengths, strict=True)]
    sums = torch.cat([_sums(*of, scores, order) for of in zip(groups, chunks, lengths, strict=True)])
    # The rest is done for all groups at once: as a rule many are small.
    owner, at = torch.arange(len(groups), device="cpu"), torch.tensor(numbers, device="cpu")
    owner = owner.repeat_interleave(at)
    place = torch.arange(len(owner), device="cpu") - (at.cumsum(0) - at)[owner]
    chunk, floor, length = torch.tensor(
        [(chunk, min(group.floor, n), n) for group, chunk, n in zip(groups, chunks, lengths, strict=True)], device="cpu"
    ).t()[:, owner]
    sizes = torch.minimum(chunk, length - place * chunk)
    cost = torch.tensor([max(sum(unit[name] for name in group.blocks), 1e-30) for group in groups], device="cpu")[owner]
    table = torch.full((len(groups), max(numbers)), torch.inf, dtype=torch.float64, device="cpu")
    table[owner, place] = sums / (sizes * cost)
    return owner, sizes, table.cummin(1).values[owner, place], place < floor  # sums may round upwards


def _sums(group: Group, chunk: int, length: int, scores: Mapping[str, Tensor], order: Mapping[str, Tensor]) -> Tensor:
    """[chunks] float64: the salience of the chunks of a group, which has `length` of each block."""
    ranked = [scores[name].double().nan_to_num(nan=0.0)[order[name][:length]] for name in group.blocks]
    if chunk > 1:
        ranked = [torch.nn.functional.pad(one, (0, -length % chunk)).view(-1, chunk).sum(1) for one in ranked]
    return sum(ranked[1:], ranked[0])


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
