"""What `plan` says of training steps on given GPUs."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...common.checks import checked_bool, checked_int
from ...common.names import parameters_of
from ...config import APTConfig
from ...pruning.architectures.lookup import Blocks, output_layer, side_width, weight_dim
from ...pruning.cut import Changes, left
from .layers import FAMILIES, FLOAT, Family, drops_attention, family_of, is_causal, widths_of
from .rates import rates_of
from .step import SHARDINGS, Setting, Shape, Step, step_of

Given = str | os.PathLike[str] | Mapping[str, Any] | None


@dataclass(frozen=True)
class Prediction:
    """One training step, dense and after the cut, on each of some GPUs; nothing of it was run.

    gpus, sharding     how many, and "ddp", "fsdp" or "" (one GPU)
    batch, length      sequences of one GPU a step, and their tokens
    liger, checkpointing  Liger's kernels; layers computed again in the backward
    dtype              of the weights
    rates              the GPU, and `sources` {rate: where its number comes from}
    dense, target      the step now and after the cut
    notes              what is not predicted, and why
    """

    gpus: int
    sharding: str
    batch: int
    length: int
    liger: bool
    checkpointing: bool
    dtype: str
    rates: str
    memory: int
    dense: Step
    target: Step
    sources: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        how = [f"{self.gpus} GPUs, {self.sharding}" if self.gpus > 1 else "1 GPU", f"batch {self.batch} a GPU, length {self.length}"]
        how += [self.dtype, *["Liger"] * self.liger, *["gradient checkpointing"] * self.checkpointing]
        lines = [f"a training step, predicted for {self.rates}: {'; '.join(how)}", f"{'':28}{'now':>14}{'after the cut':>16}"]
        pair = (self.dense, self.target)
        for name in dict.fromkeys(name for step in pair for name in step.memory):
            lines.append(_line(name, *(_gib(step.memory.get(name)) for step in pair)))
        lines.append(_line("peak a GPU", *(_gib(step.peak) for step in pair)) + f"  of {_gib(self.memory)}")
        for name in dict.fromkeys(name for step in pair for name in step.parts):
            lines.append(_line(name, *(_ms(step.parts.get(name)) for step in pair)))
        for name in dict.fromkeys(name for step in pair for name in step.seconds):
            lines.append(_line({"eager": "a step", "graph": "a step in one graph"}[name], *(_ms(s.seconds.get(name)) for s in pair)))
        lines.append(_line("tokens a second", *(_count(step.tokens_per_second) for step in pair)))
        for name, step in (("now", self.dense), ("after the cut", self.target)):
            lines += [f"refused {name}: {step.refused}"] * bool(step.refused)
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True)
class Asked:
    """How a step is to be predicted, checked.

    batch  None where it was not given
    """

    gpus: int
    sharding: str
    liger: bool
    checkpointing: bool
    rates: Given


def asked(gpus: int | None, sharding: str | None, batch: int | None, liger: bool, checkpointing: bool, rates: Given) -> Asked | None:
    """The arguments of `plan` that ask for a prediction; None where none does. TypeError and ValueError in words."""
    checked_bool("liger", liger)
    checked_bool("checkpointing", checkpointing)
    if gpus is None:
        given = {"sharding": sharding is not None, "liger": liger, "checkpointing": checkpointing, "rates": rates is not None}
        name = next((name for name, there in given.items() if there), None)
        if name is not None:
            raise ValueError(f"gpus: expected how many GPUs with {name}, got None")
        return None
    checked_int("gpus", gpus, 1)
    if sharding is not None and sharding not in SHARDINGS:
        raise ValueError(f"sharding: expected {' or '.join(map(repr, SHARDINGS))}, got {sharding!r}")
    if sharding is None and gpus > 1:
        raise ValueError(f"sharding: expected {' or '.join(map(repr, SHARDINGS))} with {gpus} GPUs, got None")
    if batch is None:
        raise ValueError("batch: expected the sequences of one GPU a step with gpus, got None")
    return Asked(gpus, (sharding or "") if gpus > 1 else "", liger, checkpointing, rates)


@dataclass(frozen=True)
class Subject:
    """What of a model and its configuration a prediction is made from.

    kind     the model type
    family   how its layers are predicted, or in words why they are not
    dense, target  now and after the cut
    dtype    of the weights
    dropout  of the adapters
    """

    kind: str
    family: Family | str
    dense: Shape
    target: Shape
    dtype: str
    dropout: float


def subject_of(
    model: nn.Module, config: APTConfig, blocks: Blocks, ranks: Mapping[str, int], saved: list[str], changes: Changes
) -> Subject:
    """Read off a model; `ranks` {linear: its adapter's rank}, `saved` modules that train whole, `changes` of a cut."""
    family = family_of(model, blocks)
    known = isinstance(family, Family)
    dense, target = (_shape(model, config, blocks, ranks, saved, one, known) for one in ({}, changes))
    dtype = next((str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()), "")
    kind = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    return Subject(kind, family, dense, target, dtype, config.lora_dropout)


def predicted(subject: Subject, how: Asked, batch: int, length: int) -> Prediction:
    """The steps before and after a cut. ValueError for Liger where it has no kernels, and for rates that are none."""
    family = subject.family if isinstance(subject.family, Family) else None
    if how.liger and family is not None and not family.liger:
        kinds = ", ".join(kind for kind, one in FAMILIES.items() if one.liger)
        raise ValueError(f"liger: expected a model of {kinds}, for which it has kernels, got {subject.kind}")
    rates = rates_of(how.rates)
    setting = Setting(how.gpus, how.sharding, batch, length, how.liger, how.checkpointing, rates)
    notes = [f"activations and time are not predicted: {subject.family}"] if isinstance(subject.family, str) else []
    if family is not None and subject.dense.size != 2:
        notes.append(f"time is not predicted: expected 16-bit weights, which the rates are of, got {subject.dtype}; plan it in bfloat16")
    if subject.dropout:
        notes.append("the dropout of adapters is not in the prediction")
    if how.gpus > 1:
        notes.append(f"under {how.sharding} a model is not cut while it trains: after the cut is one that was cut before it was wrapped")
        notes.append("what passes between GPUs is predicted from the rates' link and network, and no run of several GPUs has checked it")
    return Prediction(
        gpus=how.gpus,
        sharding=how.sharding,
        batch=batch,
        length=length,
        liger=how.liger,
        checkpointing=how.checkpointing,
        dtype=subject.dtype,
        rates=rates.name,
        memory=int(rates.memory),
        dense=step_of(subject.dense, family, setting),
        target=step_of(subject.target, family, setting),
        sources=rates.sources,
        notes=notes,
    )


def _shape(
    model: nn.Module,
    config: APTConfig,
    blocks: Blocks,
    ranks: Mapping[str, int],
    saved: list[str],
    changes: Changes,
    known: bool,
) -> Shape:
    sizes = {parameter: math.prod(left(parameter, changes)) for parameter in model.parameters()}
    size = max((parameter.element_size() for parameter in sizes), default=FLOAT)
    exact = FLOAT if config.float32_factors else 0  # of a 16-bit model
    entries = 0
    for name, rank in ranks.items():
        linear = model.get_submodule(name)
        reserved = max(rank, min(config.max_rank or rank, side_width(linear, "out"), side_width(linear, "in")))
        shape = left(_weight(model, name), changes)
        entries += reserved * (shape[weight_dim(linear, "out")] + shape[weight_dim(linear, "in")])
    whole = sum(sizes[one] for one in {one: None for name in saved for one in parameters_of(model, name)})
    output = output_layer(model)
    rows = [0, 0] if output is None else left(_weight(model, output), changes)
    return Shape(
        weights=sum(entries * parameter.element_size() for parameter, entries in sizes.items()),
        factors=entries * max(size, exact),
        trained=entries + whole,
        trained_bytes=(entries + whole) * max(size, exact),
        size=size,
        layers=widths_of(model, blocks, ranks, changes) if known else None,
        hidden=rows[1],
        vocabulary=rows[0],
        causal=is_causal(model, blocks),
        dropped=drops_attention(model),
    )


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _line(name: str, now: str, then: str) -> str:
    return f"{name:28}{now:>14}{then:>16}"


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.2f} GiB"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:,.1f} ms"


def _count(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.0f}"
