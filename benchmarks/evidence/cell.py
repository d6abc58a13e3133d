"""Train and measure one cell, and write it as one line.

A cell is one task, one row, one seed and, where the row is pruned, one density. A trial is a cell on one learning
rate that reads validation alone. The best of a row's trials says the rate of all its cells.
"""

from __future__ import annotations

import gc
import json
import math
import platform
import statistics
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import apt_ext
from apt_ext.common.clock import in_turn
from apt_ext.common.memory import peak_memory, restart_peak
from apt_ext.tools.data import Missing
from apt_ext.tools.measuring import around_events
from apt_ext.tools.models import transformers_offline
from apt_ext.tools.places import replace_json

from .rows import Row, rows_of
from .store import FORMAT, Cell, read, write
from .tasks import Data, Task, load_data, load_model
from .training import (
    ALPHA,
    DISTILLED,
    RANK,
    Trained,
    adapter_config,
    attention_without_plans,
    autocast,
    precision,
    train,
    wait,
)

TRIAL_SEED = 1000


@dataclass(frozen=True)
class Place:
    """Say where cells come from and go to, and how they are run.

    alone  no other cell runs beside: only then times mean something
    commit what is measured: a git commit, or the package's version
    """

    pack: Path
    output: Path
    device: str
    commit: str
    alone: bool = True
    quick: bool = False

    def task(self, cell: Cell) -> Task:
        task = cell.of()[0]
        return task.quick() if self.quick else task


def run_cell(place: Place, cell: Cell) -> dict[str, Any]:
    """Train and measure one cell, write its line and return what is in it. Missing in words."""
    started = time.perf_counter()
    with attention_without_plans():
        result, small = _trained_and_scored(place, cell)
    if place.alone and cell.of()[1].pruned and cell.rate is None:
        result["inference"] = _inference(place, place.task(cell), small, torch.device(place.device))
    result["seconds"]["total"] = time.perf_counter() - started
    write(place.output, cell, result)
    return result


def train_alone(place: Place, cell: Cell, task: Task) -> Trained:
    """Train one cell as `task` says, for its time alone; nothing is scored beside the validation of its clock, or written."""
    device = torch.device(place.device)
    try:
        rate = chosen_rate(place, cell)
    except Missing:  # no trial
        rate = cell.of()[1].rates(task)[0]
    data = load_data(place.pack, task, device, place.quick)
    with attention_without_plans():
        teacher = _teacher(place, Cell(cell.task, "lora", cell.seed), data)[0] if cell.of()[1].teacher == "lora" else None
        _warm_up(place, cell, rate, data, teacher)
        torch.manual_seed(cell.seed)
        return train(task, cell.of()[1], load_model(place.pack, task, device), data, cell.density or 1.0, rate, cell.seed, teacher)


def _trained_and_scored(place: Place, cell: Cell) -> tuple[dict[str, Any], Any]:
    """Return what the cell's line holds, but for the inference's times, and the cut model."""
    task, row, device = place.task(cell), cell.of()[1], torch.device(place.device)
    rate = cell.rate if cell.rate is not None else chosen_rate(place, cell)
    data = load_data(place.pack, task, device, place.quick)
    teacher, teacher_seconds = None, 0.0
    if row.teacher == "lora":
        lora = Cell(cell.task, "lora", cell.seed)
        teacher, teacher_seconds = _teacher(place, lora, data)
    warmed = place.alone and cell.rate is None
    if warmed:
        _warm_up(place, cell, rate, data, teacher)
    torch.manual_seed(cell.seed)
    stock = load_model(place.pack, task, device)
    dense = layer_weights(stock)
    before = _forget_peak(device)
    trained = train(task, row, stock, data, cell.density or 1.0, rate, cell.seed, teacher)
    peak = _peak(device)
    if cell.row == "lora":
        _keep_teacher(place, cell, rate, trained)
    with torch.no_grad(), autocast(device):
        masked = data.score(trained.model, "validation")
    small = trained.model if row.whole else apt_ext.shrink(trained.model)
    small.eval()
    scores = {"validation": data.score(small, "validation"), "masked validation": masked}
    if cell.rate is None:
        scores["test"] = data.score(small, "test")  # once
    result: dict[str, Any] = {
        "format": FORMAT,
        "task": cell.task,
        "row": cell.row,
        "seed": cell.seed,
        "density": cell.density,
        "trial": cell.rate is not None,
        "quick": place.quick,
        "commit": place.commit,
        "versions": {"apt_ext": apt_ext.__version__, "torch": torch.__version__, "transformers": transformers_offline().__version__},
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.machine() + f", {torch.get_num_threads()} threads",
        "precision": precision(device),
        "alone": place.alone,
        "warmed": warmed,
        "cudnn_attention": False,
        "graphs": device.type == "cuda",
        "config": _config(task, row, cell, rate),
        "steps": task.steps,
        "measure": task.measure,
        "scores": scores,
        "kept": {"weights": layer_weights(small) / dense, **trained.kept},
        "ranks": trained.ranks,
        "adapter_parameters": list(trained.adapter_parameters),
        "history": trained.clock.history,
        "seconds": {"training": trained.clock.seconds, "teacher": teacher_seconds},
        "step_seconds": around_events(trained.clock.step_seconds, trained.events),
        "peak_memory_bytes": peak,
        "memory_before_bytes": before,
    }
    return result, small


def chosen_rate(place: Place, cell: Cell) -> float:
    """Return the learning rate of the row's best trial, or its only rate. Missing where a trial is."""
    task, row = place.task(cell), cell.of()[1]
    rates, best = row.rates(task), None
    if len(rates) == 1:
        return rates[0]
    for trial in trials(task, cell.row):
        found = read(place.output, trial)
        if found is None:
            raise Missing(f"{trial.name}: this trial has to come before {cell.name}")
        score = found["scores"]["validation"]
        if best is None or task.better(score, best[0]) or math.isnan(best[0]):
            best = score, trial.rate
    assert best is not None and best[1] is not None
    return best[1]


def trials(task: Task, row: str) -> list[Cell]:
    """Return a row's trials, one for each of its rates, at the task's first density."""
    found = rows_of(task)[row]
    density = task.densities[0] if found.pruned else None
    rates = found.rates(task)
    return [Cell(task.name, row, TRIAL_SEED, density, rate) for rate in rates] if len(rates) > 1 else []


def on_cpu(result: dict[str, Any]) -> bool:
    """Return whether a cell ran on a CPU, whose device says the threads."""
    return bool(result["device"].endswith(" threads"))


def layer_weights(model: Any) -> int:
    """Count the entries of all Parameters within a stock model's layers: no embeddings, pooler or head."""
    layers = next(module for name, module in model.named_modules() if name.rpartition(".")[2] in ("layer", "layers"))
    return sum(parameter.numel() for parameter in layers.parameters())


def _config(task: Task, row: Row, cell: Cell, rate: float) -> dict[str, Any]:
    apt = adapter_config(task, cell.density or 1.0)
    return {
        "rate": rate,
        "rates": list(row.rates(task)),
        "batch": task.batch,
        "rank": None if row.whole else RANK,
        "alpha": None if row.whole else ALPHA,
        "targets": list(task.targets),
        "row": {key: value for key, value in vars(row).items() if key not in ("title", "extra")},
        "schedule": vars(apt.schedule) if row.gradual or row.growth > 1 else None,
        "round_to": apt.round_to,
        "uniform": apt.uniform,
        "distilled share": DISTILLED if row.teacher else None,
        "scored": task.scored if row.once == "salience" else None,
    }


# -- a dense LoRA as teacher ---------------------------------------------------------------------------------


def _teacher(place: Place, lora: Cell, data: Data) -> tuple[Any, float]:
    """Return the finished dense LoRA of this seed and the seconds of its training.

    It is what the cell or trial left, or else trained now.
    """
    task, row = place.task(lora), lora.of()[1]
    rate = chosen_rate(place, lora)
    directory = _teacher_directory(place, lora, rate)
    seconds = _teacher_seconds(directory)
    if place.alone and seconds is None:
        _warm_up(place, lora, rate, data)
    torch.manual_seed(lora.seed)
    stock = load_model(place.pack, task, data.on)
    if seconds is not None:
        return apt_ext.APTModel.from_pretrained(stock, directory).eval().requires_grad_(False), seconds
    trained = train(task, row, stock, data, 1.0, rate, lora.seed)
    _keep_teacher(place, lora, rate, trained)
    return trained.model.eval().requires_grad_(False), trained.clock.seconds


def _teacher_directory(place: Place, lora: Cell, rate: float) -> Path:
    return place.output / "teachers" / f"{lora.task}.seed-{lora.seed}.rate-{rate:g}{'.quick' * place.quick}"


def _teacher_seconds(directory: Path) -> float | None:
    """Return what _keep_teacher wrote last, or None where there is no whole teacher."""
    try:
        return float(json.loads((directory / "seconds.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _keep_teacher(place: Place, lora: Cell, rate: float, trained: Trained) -> None:
    directory = _teacher_directory(place, lora, rate)
    trained.model.save_pretrained(directory)
    replace_json(directory / "seconds.json", trained.clock.seconds)


# -- time and memory -----------------------------------------------------------------------------------------


def _warm_up(place: Place, cell: Cell, rate: float, data: Data, teacher: Any = None) -> None:
    """Train a few steps on a model that is thrown away: no row's time holds the first use of a kernel.

    Whatever random state it leaves, the caller sets its own afterwards.
    """
    task = place.task(cell)
    few = replace(task, steps=task.quick().steps)  # in batches of the task's size, which choose the kernels
    held = {"validation": data.parts["validation"][: task.batch]}
    less = replace(data, task=few, parts={**data.parts, **held})
    train(few, cell.of()[1], load_model(place.pack, few, data.on), less, cell.density or 1.0, rate, cell.seed, teacher)
    gc.collect()  # its hooks are cycles, and its memory would count as the cell's


def _inference(place: Place, task: Task, small: Any, device: torch.device) -> dict[str, Any]:
    """Time the small model and the dense stock one in turn. Every token counts."""
    torch.manual_seed(0)
    dense = load_model(place.pack, task, device)
    batch, length = (1024, 64) if device.type == "cuda" else (32, 64)
    if not task.classes:
        batch //= 16
    if place.quick:
        batch, length = 2, 16
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    small, dense = small.to(dtype), dense.to(dtype)  # the cell is done with both
    ids = torch.randint(1, small.config.vocab_size, (batch, length)).to(device)
    calls = {name: partial(model, input_ids=ids) for name, model in (("small", small), ("dense", dense))}
    with torch.no_grad():
        times = in_turn(calls, 3 if place.quick else 10, lambda: wait(device))
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {
        "batch": batch,
        "length": length,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": times,
        "speedup": medians["dense"] / medians["small"],
    }


def _forget_peak(device: torch.device) -> int:
    """Let the peak count anew, and return the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    restart_peak()
    return peak_memory()


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
