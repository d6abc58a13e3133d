"""What a run will take, before it begins: a few steps of the real model on the real data are timed, and nothing of it stays."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

import apt_ext

from ..common.clock import spread, waiting_for
from ..common.memory import peak_memory
from .data import Batch

_TIMED = 3  # after one that is not counted


def timed_steps(model: apt_ext.APTModel, batches: Sequence[Batch], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """{"step": spread of the seconds of a forward and backward pass, "evaluation": of a forward pass alone, "memory": peak bytes}.

    The model is full-size, on its device and in training mode; neither weights, gradients nor random states are left changed.
    dtype  of autocast; None: without
    """
    device = model.device
    wait = waiting_for(device)
    inputs = [{name: value.to(device) for name, value in batch.items()} for batch in batches]
    was_training = model.training
    seconds: dict[str, list[float]] = {"step": [], "evaluation": []}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for number in range(_TIMED + 1):
            batch = inputs[number % len(inputs)]
            for name in seconds:
                model.train(name == "step")
                wait()
                started = time.perf_counter()
                with torch.autocast(device.type, dtype) if dtype is not None else nullcontext(), torch.set_grad_enabled(name == "step"):
                    loss = model(**batch).loss
                if name == "step":
                    loss.backward()
                wait()
                if number:
                    seconds[name].append(time.perf_counter() - started)
            model.zero_grad(set_to_none=True)
    model.train(was_training)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
    return {name: spread(values) for name, values in seconds.items()} | {"memory": peak}


def forecast(
    model: apt_ext.APTModel, timed: Mapping[str, Any], *, steps: int, accumulation: int, evaluations: float, growth: float, teacher: int
) -> dict[str, Any]:
    """What the run will take at most: seconds and bytes.

    evaluations  batches of all evaluations
    growth       adapter parameters at the end over those at the start
    teacher      optimizer steps of a dense LoRA before it; its weights are held beside the model's
    """
    step = timed["step"]["median"] * accumulation
    trainable = sum(parameter.numel() * parameter.element_size() for parameter in apt_ext.adapter_parameters(model))
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {
        "steps": steps,
        "seconds a step": step,
        "seconds": step * (steps + teacher) + timed["evaluation"]["median"] * evaluations,
        # gradients were there when it was measured; AdamW has two moments, and growth makes all of it larger
        "memory": int(timed["memory"] + 2 * trainable + 4 * trainable * (growth - 1.0) + (weights if teacher else 0)),
        "memory counted": "GPU memory" if model.device.type == "cuda" else "memory of the process, libraries included",
        "timed": timed,
    }


def told(found: Mapping[str, Any]) -> str:
    """The forecast in a sentence, with what it is based on."""
    low, high = (found["timed"]["step"][name] for name in ("low", "high"))
    return (
        f"forecast: at most about {duration(found['seconds'])} and {found['memory'] / 2**20:,.0f} MiB ({found['memory counted']}): "
        f"{found['steps']} steps of {found['seconds a step']:.3g} s, evaluations included; from {_TIMED} timed forward and backward passes "
        f"({low:.3g} to {high:.3g} s) of the full-size model on this data, plus the optimizer's state; steps get shorter once it is cut"
    )


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
