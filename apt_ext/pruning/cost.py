"""What a number of blocks costs: parameters, FLOPs, bytes, or measured time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from ..common.checks import checked_int, checked_mapping, checked_number
from .architectures.lookup import Block, Blocks, as_blocks, ends_with, is_linear, owners, side_width
from .block_masks import host_mask

Counts = Mapping[str, int]


class Cost(Protocol):
    """The cost of keeping `counts` of each block; never falls when a count grows."""

    def total(self, counts: Counts) -> float: ...

    def marginal(self, counts: Counts) -> dict[str, float]:
        """What one more of each block costs, at these counts."""
        ...


@dataclass(frozen=True)
class Products:
    """A sum of terms, coefficient * product of the counts of its blocks (none, one or two): exact for everything made of matrices."""

    terms: Mapping[tuple[str, ...], float]

    def total(self, counts: Counts) -> float:
        return sum(value * _product(counts, blocks) for blocks, value in self.terms.items())

    def marginal(self, counts: Counts) -> dict[str, float]:
        found: dict[str, float] = dict.fromkeys(counts, 0.0)
        for blocks, value in self.terms.items():
            for i, block in enumerate(blocks):
                found[block] += value * _product(counts, (*blocks[:i], *blocks[i + 1 :]))
        return found


def _product(counts: Counts, blocks: tuple[str, ...]) -> int:
    product = 1
    for block in blocks:
        product *= counts[block]
    return product


@dataclass(frozen=True)
class Latency:
    """Time from tables: the sum over the layers' blocks of the time at the number kept, between entries on a straight line.

    kinds   {block: kind}
    tables  {kind: {number kept: seconds for one layer}}; of "hidden" only the ratio to its last entry counts, as a factor of everything.
            A wider layer is never taken to be faster: each entry counts as the largest up to it.

    TypeError for what is no such table; ValueError for a kind without one, and for one with fewer than two entries or negative ones.
    """

    kinds: Mapping[str, str]
    tables: Mapping[str, Mapping[int, float]]
    _steps: dict[str, tuple[list[int], list[float]]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        checked_mapping("latency", self.tables)
        for kind in set(self.kinds.values()):
            given = checked_mapping(f"latency[{kind!r}]", self.tables.get(kind, {}))
            for number, seconds in given.items():
                checked_int(f"number of {kind} in latency", number, 0)
                checked_number(f"latency[{kind!r}][{number}]", seconds)
            table = sorted(given.items())
            if len(table) < 2 or table[0][0] < 0 or not all(seconds >= 0 for _, seconds in table):
                raise ValueError(f"latency: expected two or more {{number of {kind} kept: seconds}}, got {dict(table)}")
            widths, times = [width for width, _ in table], [max(s for _, s in table[: i + 1]) for i in range(len(table))]
            self._steps[kind] = widths, times

    def _time(self, kind: str, count: float) -> float:
        widths, times = self._steps[kind]
        i = min(max(bisect_left(widths, count), 1), len(widths) - 1)
        share = (count - widths[i - 1]) / (widths[i] - widths[i - 1])
        return max(times[i - 1] + share * (times[i] - times[i - 1]), 0.0)

    def _factor(self, counts: Counts) -> float:
        hidden = [block for block, kind in self.kinds.items() if kind == "hidden"]
        return self._time("hidden", counts[hidden[0]]) / max(self._steps["hidden"][1][-1], 1e-30) if hidden else 1.0

    def total(self, counts: Counts) -> float:
        layers = sum(self._time(kind, counts[block]) for block, kind in self.kinds.items() if kind != "hidden")
        return layers * self._factor(counts)

    def marginal(self, counts: Counts) -> dict[str, float]:
        """On average over all that are there: a measured table has steps."""
        now = self.total(counts)
        return {block: (now - self.total({**counts, block: 0})) / max(counts[block], 1) for block in self.kinds}


def cost_of(model: nn.Module, blocks: Mapping[str, Block], budget: str = "parameters", length: int = 128) -> Products:
    """The exact cost of the layers of a model: linears and norms within them, biases included, and nothing outside.

    Embeddings, what stands behind the last layer, and adapters do not count, as in the paper. Of a model that was cut it is
    the same as before the first cut, as a function of the counts.

    budget  "parameters"; "memory": their bytes; "flops": of one token in a sequence of `length`, linears and attention
    """
    blocks = as_blocks(model, blocks)
    row = blocks.row
    terms: dict[tuple[str, ...], float] = {}

    def add(value: float, *forms: Mapping[str | None, float]) -> None:
        """value * the product of linear forms {block, or None for the constant: coefficient}."""
        products: dict[tuple[str, ...], float] = {(): value}
        for form in forms:
            products = {
                (*found, *([] if block is None else [block])): v * coefficient
                for found, v in products.items()
                for block, coefficient in form.items()
            }
        for found, v in products.items():
            key = tuple(sorted(found))
            terms[key] = terms.get(key, 0.0) + v

    for name, module in owners(dict(model.named_modules())):
        if row is None or isinstance(module, nn.Embedding) or not any(_within(layers.pattern, name) for layers in row.layers):
            continue
        out = _channels(model, blocks, name, "out")
        for entry, parameter in module.named_parameters(recurse=False):
            unit = {"parameters": 1.0, "memory": float(parameter.element_size()), "flops": 2.0}[budget]
            if is_linear(module) and entry == "weight":
                add(unit, out, _channels(model, blocks, name, "in"))
            elif budget != "flops":
                add(unit, out)
    if budget == "flops":
        for block in blocks.values():
            if block.kind == "heads":
                add(4.0 * length, _channels(model, blocks, block.reader, "in"))
    return Products(terms)


def budget_cost(
    model: nn.Module,
    blocks: Blocks,
    budget: str,
    length: int,
    latency: Mapping[str, Mapping[int, float]] | None,
    pruned: Mapping[str, Block],
) -> Cost:
    """The cost of one of BUDGETS; "latency" counts the `pruned` blocks alone, by the tables. ValueError where they do not fit."""
    if budget != "latency":
        if latency is not None:
            raise ValueError(f"latency: expected None with budget={budget!r}, got tables")
        return cost_of(model, blocks, budget, length)
    if latency is None:
        raise ValueError("latency: expected {kind: {number kept: seconds}} with budget='latency', got None; see measure_latency")
    return Latency({name: block.kind for name, block in pruned.items()}, latency)


def density_of(model: nn.Module, blocks: Blocks) -> float:
    """The share of the layers' parameters before the first cut that masks above 0 keep. On meta, where masks have no values,
    of all that is there.
    """
    masks = {name: host_mask(model, block) for name, block in blocks.items()}
    kept = {name: len(mask) if mask.is_meta else int(mask.count_nonzero()) for name, mask in masks.items()}
    cost = cost_of(model, blocks)
    full = cost.total(blocks.full)
    return cost.total(kept) / full if full else 1.0


def _channels(model: nn.Module, blocks: Blocks, name: str, direction: str) -> dict[str | None, float]:
    """One side of a module as {block: channels that each of it has there, None: channels that always stay}."""
    before, full = {} if blocks.origin is None else blocks.origin.widths, blocks.full
    width = before.get((name, direction)) or side_width(model.get_submodule(name), direction)
    form: dict[str | None, float] = {}
    covered = 0
    for block_name, block in blocks.items():
        for side in block.sides:
            if side.module == name and side.side == direction and full[block_name]:
                stretch = width // side.parts
                form[block_name] = form.get(block_name, 0.0) + stretch / full[block_name]
                covered += stretch
    return form if covered else {None: float(width)}


def channels(model: nn.Module, blocks: Blocks, name: str, direction: str, counts: Counts) -> float:
    """How many channels one side of a module has when `counts` of each block are left."""
    form = _channels(model, blocks, name, direction)
    return sum(value * (1 if block is None else counts[block]) for block, value in form.items())


def _within(pattern: str, name: str) -> bool:
    """Whether a module of this name lies in a layer of this pattern."""
    parts = name.split(".")
    return any(ends_with(pattern, ".".join(parts[:i])) for i in range(1, len(parts)))
