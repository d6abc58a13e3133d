"""One fine-tuning run, and what APT adds to it between the backward pass and the next step."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

import apt_ext

from ..method import AdapterImportance, Salience, cubic_density, grown_ranks, kept_count, linear_budget, step_mask, top_k
from .data import Batch


@dataclass(frozen=True)
class Recipe:
    """The numbers of a run. Shares are of all optimizer steps.

    steps         optimizer steps, the same for both methods
    batch, lr     sentences a step; peak learning rate of AdamW, with linear warm-up and linear decay to 0
    rank, alpha   of every adapter at the start
    density       share of the FFN neurons of each layer that APT keeps
    prune         where the density starts to fall, and where it is at its target (the paper's cubic schedule)
    window        how long one mask takes from 1 to 0: the paper's alpha is 1 / (window * steps)
    growths       how often ranks grow, evenly within `prune`
    budget        adapter parameters at the end over those at the start; rank_limit: no adapter grows beyond
    """

    steps: int
    seed: int = 0
    batch: int = 32
    lr: float = 5e-4
    warm_up: float = 0.06
    max_norm: float = 1.0
    rank: int = 8
    alpha: float = 16.0
    density: float = 0.5
    round_to: int = 8
    prune: tuple[float, float] = (0.1, 0.5)
    window: float = 0.1
    growths: int = 4
    budget: float = 4.0
    rank_limit: int = 64

    def config(self) -> apt_ext.APTConfig:
        """Adapters on query, value and both FFN linears; the task head and the pooler, which no task has trained yet, train whole."""
        return apt_ext.APTConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=["query", "value", "intermediate.dense", "output.dense"],
            exclude_modules=["attention.output.dense"],
            modules_to_save=["classifier", "pooler.dense"],
            density=self.density,
            round_to=self.round_to,
        )


class PruneAndGrow:
    """APT on the FFN neurons and adapters of an APTModel: `observe` before each optimizer step, `step` after it.

    While density falls every step selects the most salient neurons anew, the same number in every layer, and moves the masks by one step;
    afterwards the last selection stays until each mask is exactly 0 or 1.
    """

    def __init__(self, model: apt_ext.APTModel, recipe: Recipe) -> None:
        self.model, self.recipe, self.now = model, recipe, 0
        self.start = int(recipe.prune[0] * recipe.steps)
        self.end = max(int(recipe.prune[1] * recipe.steps), self.start + 1)
        self.window = max(int(recipe.window * recipe.steps), 1)
        self.growth_steps = {self.start + (self.end - self.start) * i // recipe.growths for i in range(1, recipe.growths + 1)}
        self.blocks = {name: block for name, block in model.blocks.items() if block.kind == "neurons"}
        modules = {name: model.model.get_submodule(block.reader) for name, block in self.blocks.items()}
        self.salience = Salience(model, {name: (modules[name], block.count) for name, block in self.blocks.items()})
        self.importance = AdapterImportance(apt_ext.adapters(model))
        self.keep = {name: torch.ones(block.count, dtype=torch.bool) for name, block in self.blocks.items()}
        self.initial = self.adapter_parameters()

    def adapter_parameters(self) -> int:
        return sum(adapter.get_parameter_count() for adapter in self.importance.adapters.values())

    def observe(self) -> None:
        """Read this step's activations and gradients, while pruning is still to come."""
        if self.now < self.end:
            self.salience.update()
            self.importance.observe()
            self.importance.update()

    def step(self, optimizer: Optimizer) -> None:
        """Count the step; move masks; at a growth step, grow ranks with the optimizer's state."""
        self.now += 1
        if self.start < self.now <= self.end:
            self._select()
        if self.start < self.now <= self.end + self.window:
            for name, keep in self.keep.items():
                self.model.set_block_mask(name, step_mask(self.model.get_block_mask(name), keep, self.window))
        if self.now in self.growth_steps:
            self._grow(optimizer)
        if self.now == self.end:
            self.salience.remove()

    def _select(self) -> None:
        density = cubic_density(self.now, self.start, self.end, self.recipe.density)
        for name, block in self.blocks.items():
            self.keep[name] = top_k(self.salience.scores[name], kept_count(block.count, density, self.recipe.round_to))

    def _grow(self, optimizer: Optimizer) -> None:
        found = self.importance.adapters
        budget = linear_budget(self.now, self.start, self.end, self.initial, self.recipe.budget)
        grown = grown_ranks(
            ranks={name: adapter.rank for name, adapter in found.items()},
            sizes={name: adapter.in_features + adapter.out_features for name, adapter in found.items()},
            importance=self.importance.importance(),
            budget=budget,
            limits={name: min(self.recipe.rank_limit, adapter.in_features, adapter.out_features) for name, adapter in found.items()},
        )
        for name, rank in grown.items():
            found[name].increase_rank(rank, optimizer=optimizer)
        self.importance.restart()


def fit(model: apt_ext.APTModel, batches: Iterable[Batch], recipe: Recipe, apt: PruneAndGrow | None, label: str) -> float:
    """Train `model` for recipe.steps with one AdamW throughout; returns the seconds it took."""
    parameters = apt_ext.adapter_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr)
    warm_up = max(round(recipe.warm_up * recipe.steps), 1)

    def rate(step: int) -> float:
        return min((step + 1) / warm_up, (recipe.steps - step) / max(recipe.steps - warm_up, 1))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    started = time.perf_counter()
    bar = tqdm(range(recipe.steps), desc=label, unit="step", mininterval=1)
    for _, batch in zip(bar, batches):  # noqa: B905  # the batches have no end
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, recipe.max_norm)
        if apt is not None:
            apt.observe()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if apt is not None:
            apt.step(optimizer)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return time.perf_counter() - started


@torch.no_grad()
def logits_of(model: Any, batches: Iterable[Batch]) -> list[torch.Tensor]:
    """The logits [batch, labels] of each batch, in evaluation mode."""
    model.eval()
    return [model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits for batch in batches]


def accuracy(model: Any, batches: list[Batch]) -> float:
    """The share of examples whose larger logit is their label."""
    right = [logits.argmax(1) == batch["labels"] for logits, batch in zip(logits_of(model, batches), batches, strict=True)]
    return torch.cat(right).float().mean().item()
