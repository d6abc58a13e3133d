"""One fine-tuning run, with or without APT."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

import apt_ext

from .data import Batch
from .training import adamw, update


@dataclass(frozen=True)
class Recipe:
    """The numbers of a run. Shares are of all optimizer steps.

    steps         optimizer steps, the same for both methods
    batch, lr     sentences a step; peak learning rate of AdamW, with linear warm-up and linear decay to 0
    rank, alpha   of every adapter at the start
    density       share of the encoder's weights that APT keeps, by pruning FFN neurons: about half of them go
    prune         where the density starts to fall, and where it is at its target (the paper's cubic schedule)
    events        how often masks become exactly 0 or 1 and ranks grow, evenly within `prune`
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
    density: float = 0.67
    round_to: int = 8
    prune: tuple[float, float] = (0.1, 0.5)
    events: int = 4
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
            prune=["neurons"],
            density=self.density,
            schedule=apt_ext.Schedule(start=self.prune[0], end=self.prune[1], events=self.events),
            round_to=self.round_to,
        )


@dataclass(frozen=True)
class Fitted:
    """Hold how a training run went.

    seconds       that it took
    step_seconds  of every step
    events        the steps at whose end the Controller pruned and let ranks grow; they count from 1
    """

    seconds: float
    step_seconds: list[float]
    events: list[int]


def fit(model: apt_ext.APTModel, batches: Iterable[Batch], recipe: Recipe, label: str, prune: bool = False) -> Fitted:
    """Train `model` for recipe.steps with one AdamW throughout, under a Controller if it is to prune."""
    optimizer, schedule = adamw(apt_ext.adapter_parameters(model), recipe.lr, recipe.steps, recipe.warm_up)
    growth = apt_ext.Growth(recipe.budget, recipe.rank_limit)
    controller = apt_ext.Controller(model, optimizer, recipe.steps, growth=growth, seed=recipe.seed, log=tqdm.write) if prune else None
    model.train()
    step_seconds = []
    started = time.perf_counter()
    bar = tqdm(range(recipe.steps), desc=label, unit="step", mininterval=1)
    for _, batch in zip(bar, batches):  # noqa: B905  # the batches have no end
        began = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        update(optimizer, schedule, recipe.max_norm, controller)
        step_seconds.append(time.perf_counter() - began)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    events = [event["step"] for event in controller.history] if controller is not None else []
    return Fitted(time.perf_counter() - started, step_seconds, events)


@torch.no_grad()
def logits_of(model: Any, batches: Iterable[Batch]) -> list[torch.Tensor]:
    """The logits [batch, labels] of each batch, in evaluation mode."""
    model.eval()
    return [model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits for batch in batches]


def accuracy(model: Any, batches: list[Batch]) -> float:
    """The share of examples whose larger logit is their label."""
    right = [logits.argmax(1) == batch["labels"] for logits, batch in zip(logits_of(model, batches), batches, strict=True)]
    return torch.cat(right).float().mean().item()
