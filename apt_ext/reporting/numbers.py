"""Everything that the page shows, as plain values that JSON can say."""

from __future__ import annotations

import platform
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch
from torch import nn

from .._version import __version__
from ..exporting.shrinking import shrink
from ..method.planner import Size, forward_products, size_of
from ..model import adapters
from ..pruning.architectures.lookup import origin_of
from ..pruning.block_masks import host_mask
from ..pruning.cut import parameter_changes, removal
from . import timing, words
from .layers import kept_panels, rank_panels
from .losses import Curve, thinned
from .subject import Subject
from .twins import stock_twin

FORMAT = 1


def collected(
    subject: Subject,
    *,
    curves: dict[str, Curve],
    example: Any,
    rounds: int,
    exported: dict[str, Any] | None,
    metrics: dict[str, Any],
    title: str | None,
) -> dict[str, Any]:
    """All numbers of a report. ValueError where the model does not take `example`; the model is untouched."""
    notes: list[str] = []
    first = next(subject.stock.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    inputs = None if example is None else timing.checked_example(subject.stock, example, device)
    density = _density(subject, notes)
    sizes = _sizes(subject, notes)
    speed = _speed(subject, inputs, rounds, device, notes)
    name = type(subject.stock).__name__
    share = "" if density["now"] is None else ", not pruned" if density["now"] == 1.0 else f", pruned to {words.percent(density['now'])}"
    return {
        "format": FORMAT,
        "title": title or f"{name}{share}",
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": {"apt_ext": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "model": {
            "class": name,
            "name": str(getattr(getattr(subject.stock, "config", None), "_name_or_path", "") or ""),
            "dtype": "" if first is None else str(first.dtype).removeprefix("torch."),
            "device": str(device),
        },
        "density": density,
        "kept": _kept(subject),
        "ranks": _ranks(subject),
        "sizes": sizes,
        "speed": speed,
        "losses": {name: thinned(curve) for name, curve in curves.items()},
        "exported": exported,
        "metrics": metrics,
        "notes": notes,
    }


def _density(subject: Subject, notes: list[str]) -> dict[str, Any]:
    """The density now, the target, and each event; everything None for a model without adapters."""
    apt, controller = subject.apt, subject.controller
    if apt is None:
        notes.append("The model has no adapters, so what it was before it was cut is not known.")
        return {"now": None, "target": None, "budget": None, "reached": None, "initial": None, "total_steps": None, "events": []}
    target = apt.target
    if subject.blocks and not apt.blocks:
        notes.append("merge_and_unload() was called: what masks pruned is zeros in full-size weights, which nothing here shows.")
    if target is not None and not target.reached:
        notes.append(
            f"Not finished: the Controller, whose target is a density of {target.density:g}, has not made its last event. "
            "These numbers are of the model as it is."
        )
    if controller is None:
        return {
            "now": apt.density,
            "target": None if target is None else target.density,
            "budget": "parameters" if target is None else target.budget,
            "reached": None if target is None else target.reached,
            "initial": None,
            "total_steps": None,
            "events": [],
        }
    return {
        "now": controller.density,
        "target": controller.config.density if controller.blocks else None,
        "budget": controller.budget,
        "reached": controller.done,
        "initial": controller.state_dict()["initial"]["density"],
        "total_steps": controller.total_steps,
        "events": [{name: event[name] for name in ("step", "density", "adapter_parameters", "threshold")} for event in controller.history],
    }


def _kept(subject: Subject) -> dict[str, Any]:
    blocks, full = subject.blocks, subject.blocks.full
    origin = origin_of(subject.stock, blocks)
    found: dict[str, Any] = {}
    for name, block in blocks.items():
        found[name] = {"kind": block.kind, "kept": subject.kept[name], "of": full[name]}
        if block.kind == "heads":  # of neurons and dimensions there are too many to list
            mask = host_mask(subject.stock, block)
            found[name]["original"] = origin.positions(name)[mask != 0].tolist()
    panels = kept_panels(subject.stock, blocks, subject.kept)
    return {"panels": panels, "hidden": found.get("hidden"), "blocks": found}


def _ranks(subject: Subject) -> dict[str, Any]:
    """Ranks of the adapters that have one, now and when the Controller came."""
    if subject.apt is None:
        return {"panels": [], "outside": {}, "adapters": {}, "parameters": None}
    controller = subject.controller
    initial = {} if controller is None else controller.ranks.initial
    found = {name: adapter.rank for name, adapter in adapters(subject.apt) if adapter.rank or initial.get(name)}
    panels, outside = rank_panels(subject.stock, subject.blocks, found)
    parameters = None
    if controller is not None:
        parameters = {"before": controller.ranks.parameters(controller.ranks.initial), "after": controller.adapter_parameters}
    every = {name: {"rank": rank, "initial": initial.get(name)} for name, rank in found.items()}
    return {"panels": panels, "outside": outside, "adapters": every, "parameters": parameters}


def _sizes(subject: Subject, notes: list[str]) -> dict[str, Any]:
    """Parameters, bytes and FLOPs, without adapters: before the first cut, and after the one that `shrink` makes."""
    before: Size | None = None
    after: Size | None = None
    if subject.apt is None:
        length = timing.length_for(subject.stock)
        after = size_of(subject.stock, forward_products(subject.stock, subject.blocks, 1, length), {})
    else:
        full, blocks = stock_twin(subject.apt, full=True)
        length = timing.length_for(full)
        before = size_of(full, forward_products(full, blocks, 1, length), {})
        now, blocks = stock_twin(subject.apt, full=False)
        try:
            gone = removal(subject.stock, subject.blocks)
        except ValueError as error:
            notes.append(f"The model cannot be cut as its masks are, so its size after a cut is unknown: {first_line(error)}.")
        else:
            after = size_of(now, forward_products(now, blocks, 1, length), parameter_changes(now, gone.lanes))
    if (after or before or Size(0, 0, 0)).flops is None:
        notes.append("FLOPs are unknown: the model takes other inputs than token ids or images.")
    return {
        "before": None if before is None else asdict(before),
        "after": None if after is None else asdict(after),
        "flops_of": f"one forward pass of 1 x {length}",
    }


def _speed(subject: Subject, inputs: timing.Inputs | None, rounds: int, device: torch.device, notes: list[str]) -> dict[str, Any] | None:
    """What `timing.compared` measures; None, with a note that says why, where nothing was measured."""

    def without(reason: str) -> dict[str, Any] | None:
        notes.append(f"Speed and memory were not measured: {reason}.")
        return None

    if rounds == 0 or device.type == "meta":
        return without("rounds=0 was asked for" if rounds == 0 else "the model is on meta, without values")
    try:
        after = subject.stock if subject.apt is None else shrink(subject.apt, unfinished=True)
    except (RuntimeError, ValueError) as error:
        return without(f"shrink did not succeed ({first_line(error)})")
    given = inputs is not None
    try:
        inputs = timing.random_inputs(after, device) if inputs is None else inputs
        timing.try_pass(after, inputs)
    except Exception as error:  # of the model's own code
        said = f"{type(error).__name__}: {first_line(error)}"
        if given:
            raise ValueError(f"example: expected inputs that {type(after).__name__} takes, got {sorted(inputs or ())} ({said})") from error
        return without(f"{type(after).__name__} did not take random inputs by its config ({said}); give example=")
    try:
        models: dict[str, nn.Module] = {"after": after}
        if subject.apt is not None:
            models = {"before": stock_twin(subject.apt, full=True, device=device)[0], **models}
        return timing.compared(models, inputs, rounds, device)
    except RuntimeError as error:  # out of memory, with two models beside the one that was trained
        return without(first_line(error))


def first_line(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or ["without a word"])[0].rstrip(".")
