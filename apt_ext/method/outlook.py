"""What a search will leave of a model, known before anything is trained: for `plan`, and for a Controller at its creation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..common.checks import checked_choice
from ..config import KINDS, APTConfig
from ..exporting.directories import check_class
from ..pruning.architectures.lookup import ARCHITECTURES, Block, Blocks, find_blocks, unknown_modules
from ..pruning.cost import Cost, budget_cost
from ..pruning.sizes import Sizes
from ..storage.formats import allowed, per_layer_refusals
from .schedule import Steps
from .select.groups import groups_of
from .select.search import Group, search

logger = logging.getLogger("apt_ext")

_SLACK = 1 + 1e-12  # 0.29 * 100 is a little below 29


def allowance(density: float, full: float) -> float:
    """The cost that a search may leave at this density of the `full` cost."""
    return density * full * _SLACK


def pruned_blocks(model: nn.Module, blocks: Blocks, config: APTConfig) -> Blocks:
    """The blocks of the kinds in `config.prune`; none where `config.density` is 1. ValueError where there would be none to prune."""
    if config.density == 1.0:
        return Blocks(blocks.row)
    prune = config.prune or []
    found = blocks.of_kinds(prune)
    if found:
        return found
    known = sorted({block.kind for block in blocks.values()})
    text = f"prune: expected kinds of blocks that the model has, {known}, got {prune}"
    if blocks.row is None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        rows = sorted({kind for row in ARCHITECTURES for kind in row.model_types})
        text += (
            f"; declare {type(model).__name__} (model_type {model_type!r}) with apt_ext.register_architecture, which says where its heads, "
            f"neurons and hidden dimensions are, or pass density=1.0 to let ranks grow alone; in the table are {', '.join(rows)}"
        )
    elif not blocks:
        text += "; after merge_and_unload() it has none"
    elif "hidden" in prune:
        text += f"; its row does not say how these modules touch the residual stream: {', '.join(unknown_modules(model, blocks.row)[:4])}"
    raise ValueError(text)


def say_unpruned(model: nn.Module, pruned: Mapping[str, Block], config: APTConfig, meant: bool) -> None:
    """Say it where a Controller will prune nothing, unless that is `meant`, and where `config.prune` names kinds that the model lacks."""
    if not pruned:
        if not meant:
            logger.warning(
                "Controller: density is 1.0, its default, so nothing will be pruned; give density=0.5, for example, to keep half of the "
                "layers' parameters, or density=1.0 to let ranks grow alone"
            )
        return
    missing = [kind for kind in config.prune or () if kind not in {block.kind for block in pruned.values()}]
    if missing:
        logger.warning("Controller: prune names %s, of which %s has no blocks; the others are pruned", missing, type(model).__name__)


@dataclass(frozen=True)
class Outlook:
    """A search that is to come, at the density at which pruning ends.

    model   the stock model, with or without adapters in it; it may lie on meta
    blocks  all blocks of it
    config  whose prune, density, round_to and uniform count
    cost    of those blocks; density is a share of what there was before the first cut
    live    {block: [count] bool}, on the host: what is there now
    floor   chunks that always stay in every block
    joint   as in `search`
    """

    model: nn.Module
    blocks: Blocks
    config: APTConfig
    cost: Cost
    live: Mapping[str, Tensor]
    floor: int = 1
    joint: bool = True

    @cached_property
    def pruned(self) -> Blocks:
        return pruned_blocks(self.model, self.blocks, self.config)

    @cached_property
    def groups(self) -> list[Group]:
        return groups_of(self.model, self.pruned, self.config.round_to, self.config.uniform, self.floor)

    @cached_property
    def _counts(self) -> dict[str, int]:
        return {name: int(live.sum()) for name, live in self.live.items()}

    @cached_property
    def _full(self) -> float:
        return self.cost.total(self.blocks.full)

    def left(self, scores: Mapping[str, float] | None = None, cost: float | None = None) -> dict[str, int]:
        """How many of each block stay.

        scores  {block: the score of each of its entries}; 1 for a block that is not in it
        cost    what may stay; None: what the density allows
        """
        if not self.pruned:
            return dict(self._counts)
        values = {name: torch.full((block.count,), (scores or {}).get(name, 1.0), device="cpu") for name, block in self.pruned.items()}
        allowed_cost = allowance(self.config.density, self._full) if cost is None else cost
        live = {name: self.live[name] for name in self.pruned}
        keep = search(values, live, self.groups, self.cost, self._counts, allowed_cost, self.joint).keep
        return {**self._counts, **{name: int(kept.sum()) for name, kept in keep.items()}}

    def check_density(self) -> None:
        """ValueError where even the floors cost more than the density allows."""
        share = self.cost.total(self.left(cost=-1.0)) / self._full if self.pruned and self._full else 0.0
        if share > allowance(self.config.density, 1.0):
            left = [kind for kind in KINDS if kind not in (self.config.prune or ())]
            others = f" ({', '.join(left)})" if left else " (all are in it)"
            raise ValueError(
                f"density: expected at least {share:.4f}, which is what stays where every block keeps its floor and {self.config.prune} "
                f"alone are pruned, got {self.config.density}; the floor is what always stays of a block, here {self.floor} times a "
                f"head or {self.config.round_to} neurons or hidden dimensions. Take a higher density, or add a kind to prune{others}"
            )

    def competing(self) -> bool:
        """Whether scores decide how many stay, and not only which."""
        return len(self.groups) > 1

    def outcomes(self) -> Iterator[dict[str, int]]:
        """How many of each block may stay: where all scores are alike, and then each number that other scores may leave of one group.

        The cost never falls when a count grows, so a group keeps the fewest where its scores are the lowest of all and the most where they
        are the highest.
        """
        even = self.left()
        yield even
        for group in self.groups if self.pruned and self.competing() else ():
            least, most = (self.left(dict.fromkeys(group.blocks, score))[group.blocks[0]] for score in (0.0, 1e9))
            # Of neurons no config asks more than that all layers have the same.
            between = () if group.kind == "neurons" else range(least, most, group.chunk)
            for number in dict.fromkeys((most, least, *between)):
                yield {**even, **dict.fromkeys(group.blocks, number)}

    def unwritable(self) -> list[str]:
        """Which constraints stand against an outcome that no stock class can say, in words; none: each can be exported as a stock model."""
        for counts in self.outcomes():
            formats = allowed(self.model, Sizes.of(self.model, self.blocks, counts))
            if formats["stock"] and formats.get("retyped", formats["stock"]):
                return formats["stock"]
        return []

    def writable(self) -> str | None:
        """Other settings that reach the density and whose outcomes can all be exported as stock models, in words; None: none was found."""
        config = self.config
        without = [kind for kind in config.prune or () if kind != "heads"]
        changes: list[dict[str, Any]] = [
            {"uniform": True},
            {"prune": without},
            {"prune": without, "uniform": True},
            {"prune": ["neurons"], "uniform": True},
        ]
        for change in changes:
            if all(getattr(config, name) == value for name, value in change.items()) or change.get("prune") == []:
                continue
            other = replace(self, config=replace(config, **change))
            try:
                other.check_density()
                if not other.unwritable():
                    return " with ".join(f"{name}={value}" for name, value in change.items())
            except ValueError:  # a kind that the model does not have, a density out of reach
                continue
        return None


def chosen(config: APTConfig, blocks: Mapping[str, Block], outlook_of: Callable[[APTConfig], Outlook]) -> Outlook:
    """The outlook of `config`, with the kinds to prune chosen where its `prune` is None.

    Chosen are heads and neurons where a stock config can store what may be left, else neurons alone where it can store
    those and the density can be reached so, else heads and neurons, of which `check_export` then warns.

    outlook_of  makes the Outlook of a config; a ValueError of it says that this config does not fit
    """
    if config.prune is not None:
        return outlook_of(config)
    kinds = [kind for kind in ("heads", "neurons") if any(block.kind == kind for block in blocks.values())]
    every = replace(config, prune=kinds or ["heads", "neurons"])
    for one in (every, replace(config, prune=["neurons"])) if config.density < 1.0 else ():
        try:
            outlook = outlook_of(one)
            outlook.check_density()
            if not outlook.unwritable():
                return outlook
        except ValueError:  # a kind that the model does not have, a density out of reach
            continue
    return outlook_of(every)


def check_export(outlook: Outlook, export: str | None) -> None:
    """ValueError, with what would pass, where what may be left cannot be written as `export` says; TypeError for a model of no stock class.

    None: the logger says it where no stock model may come of it.
    """
    if export is not None:
        checked_choice("export", export, ("stock", "per_layer"))
        check_class(outlook.model)
    elif not outlook.pruned:
        return
    refused = per_layer_refusals(outlook.model, Sizes.of(outlook.model, outlook.blocks, outlook.left()))
    if export == "per_layer" and refused:
        raise ValueError(f"export: expected a model that per_layer=True can write, but {'; '.join(refused)}")
    failures = outlook.unwritable() if export != "per_layer" else []
    if not failures:
        return
    settings, other = f"prune={outlook.config.prune} with uniform={outlook.config.uniform}", outlook.writable()
    if export is None:
        would = f"; {other} would pass" if other else ""
        own = "export(..., per_layer=True) writes it in any case (Controller(export='per_layer') says that this is meant)"
        if refused:
            own = "nor can export(..., per_layer=True) write it"
        text = "Controller: no stock config may be able to say what %s leaves: %s%s; %s"
        logger.warning(text, settings, "; ".join(failures), would, own)
        return
    if refused:
        would = f"{other} would pass" if other else "no other export would pass"
    else:
        would = f"{other} would pass, and so would export='per_layer'" if other else "export='per_layer' would pass"
    raise ValueError(
        f"export: expected settings of which a stock config can say whatever is left, got {settings}: {'; '.join(failures)}; {would}"
    )


def check_settings(
    model: nn.Module, config: APTConfig, steps: int, export: str, budget: str, length: int, floor: int, joint: bool
) -> APTConfig:
    """ValueError or TypeError for what a Controller of `steps` optimizer steps would refuse, known from the shapes of a stock model, which
    may lie on meta; returns the config with the kinds that are pruned.
    """
    blocks = find_blocks(model)
    live = {name: torch.ones(block.count, dtype=torch.bool, device="cpu") for name, block in blocks.items()}

    def outlook_of(one: APTConfig) -> Outlook:
        cost = budget_cost(model, blocks, budget, length, None, pruned_blocks(model, blocks, one))
        return Outlook(model, blocks, one, cost, live, floor, joint)

    Steps.of(config.schedule, steps)
    outlook = chosen(config, blocks, outlook_of)
    outlook.check_density()
    try:
        check_export(outlook, export)
    except ValueError:
        if config.prune is None and any(block.kind == "neurons" for block in blocks.values()):
            outlook_of(replace(config, prune=["neurons"])).check_density()  # says how far what stock configs can store would go
        raise
    return outlook.config
