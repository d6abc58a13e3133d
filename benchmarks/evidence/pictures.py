"""Draw the cells that are there: each task's scores, and what a user gains. Every bar and point has its range."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apt_ext.common.clock import spread
from apt_ext.reporting.figures import LIGHT, figure_class

from .cell import on_cpu
from .gathered import Cells
from .rows import Row, rows_of
from .store import Result

GAIN = "gain.png"

_GREY = ("#6b7686", "#99a3b3")  # what the method is compared with: trained whole, and pruned
_VARIANTS = ("#8ea6ec", "#57b0c4", "#7fbf9b", "#a68fe0", "#5f87a8")
_MARKERS = "o^sDvPX*<>h"


# -- scores ----------------------------------------------------------------------------------------------------


def draw_scores(cells: Cells, path: Path) -> str:
    """Draw test score against kept weights, and return what the picture shows.

    Where cells ran alone, draw validation against training time of their first seed, too. The method itself is drawn
    over all others; the bars of a point are the range over its seeds.
    """
    task, rows = cells.task, rows_of(cells.task)
    machine, timed = next(iter(cells.alone().items()), ("", {}))
    figure = figure_class()(figsize=(13.5 if timed else 8.6, 4.4), layout="constrained")
    left, *right = figure.subplots(1, 2 if timed else 1, squeeze=False)[0]
    for i, (name, row) in enumerate(rows.items()):
        style = _style(name, row, i)
        points = sorted(_points(cells, name))
        if points:
            kept, means, below, above = zip(*points, strict=True)
            left.errorbar(kept, means, yerr=(below, above), label=row.title, capsize=2.5, elinewidth=0.9, **style)
        density = task.densities[0] if row.pruned else None
        if (name, density) in timed:
            history = [(entry["seconds"], entry["validation"]) for entry in timed[name, density][0]["history"]]
            right[0].plot(*zip(*history, strict=True), label=None if points else row.title, **style)
    dense = list(cells.tests("lora").values())
    if dense:
        left.axhline(statistics.fmean(dense), color=_GREY[1], linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    score = "accuracy, %" if task.classes else "perplexity"
    left.set(title=task.title, xlabel="weights of the layers kept, %", ylabel=f"test {score}")
    for axes in right:
        axes.set(title=f"pruned to {100 * task.densities[0]:g} %\non {machine}", xlabel="training, s", ylabel=f"validation {score}")
    for axes in (left, *right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, axis="y", color=LIGHT.faint, linewidth=0.8)
        if not task.classes:
            axes.set_yscale("log")
            for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                formatted("{x:g}")  # no powers of ten
    figure.legend(loc="outside right center", fontsize=8.5, frameon=False)
    figure.savefig(path, dpi=110)
    return "score against kept weights" + (" and against time" if timed else "")


def _points(cells: Cells, name: str) -> list[tuple[float, float, float, float]]:
    """Return (kept weights in percent, mean score, how far the least lies below it, and the most above) of a row's densities."""
    points = []
    for density in {density for one, density in cells.found if one == name}:
        found, tests = cells.of(name, density), list(cells.tests(name, density).values())
        if found:
            kept, mean = statistics.fmean(result["kept"]["weights"] for result in found.values()), statistics.fmean(tests)
            points.append((100 * kept, mean, mean - min(tests), max(tests) - mean))
    return points


def _style(name: str, row: Row, i: int) -> dict[str, Any]:
    """The method in the accent's colour, its variants in lighter ones, the others grey."""
    shape = {"marker": _MARKERS[i % len(_MARKERS)]}
    if name == "apt":
        return {**shape, "color": LIGHT.accent, "linewidth": 2.8, "markersize": 7, "zorder": 5}
    if name.startswith("apt"):
        return {**shape, "color": _VARIANTS[i % len(_VARIANTS)], "linewidth": 1.3, "markersize": 5, "zorder": 3}
    return {**shape, "color": _GREY[row.pruned], "linewidth": 1.1, "markersize": 5, "zorder": 2}


# -- what a user gains -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A mean or median with the ends of its range."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Gain:
    """What is drawn: accuracy by task, kept weights, and times of a batch by machine, each {method: Bar}.

    Times are shares of the dense model's.
    """

    density: float
    accuracy: Mapping[str, Mapping[str, Bar]]
    kept: Mapping[str, Bar]
    times: Mapping[str, Mapping[str, Bar]]


_METHODS = ("full", "lora", "apt")
_WHISKERS = "whiskers: range over the seeds; of times, quartiles over the rounds"
_SHORT = {"movies": "movie reviews", "bbc": "BBC News", "glosses": "WordNet glosses"}


def gained(every: Mapping[str, Cells]) -> Gain | None:
    """Return full fine-tuning, LoRA and the method at the first density of the tasks with classes; None where one has no cells."""
    accuracy: dict[str, dict[str, Bar]] = {}
    kept: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}
    density = None
    for name, cells in every.items():
        task = cells.task
        lines = {method: (method, task.densities[0] if method == "apt" else None) for method in _METHODS}
        if not task.classes or not all(cells.of(*line) for line in lines.values()):
            continue
        density = task.densities[0]
        accuracy[_SHORT.get(name, name)] = {method: _of(list(cells.tests(*line).values())) for method, line in lines.items()}
        for method, line in lines.items():
            kept.setdefault(method, []).extend(100 * result["kept"]["weights"] for result in cells.of(*line).values())
        for result in cells.of(*lines["apt"]).values():
            if "inference" in result and result["alone"]:
                seconds = result["inference"]["seconds"]
                rounds = zip(seconds["small"], seconds["dense"], strict=True)
                shares.setdefault(_where(result), []).extend(100 * small / dense for small, dense in rounds)
    if density is None:
        return None
    dense = Bar(100, 100, 100)  # full fine-tuning and LoRA leave a model of the same size
    times = {where: {"full": dense, "lora": dense, "apt": _middle(found)} for where, found in shares.items()}
    return Gain(density, accuracy, {method: _of(values) for method, values in kept.items()}, times)


def _of(values: Sequence[float]) -> Bar:
    return Bar(statistics.fmean(values), min(values), max(values))


def _where(result: Result) -> str:
    inference = result["inference"]
    kind, *more = result["device"].split(", ")
    where = ", ".join([f"{kind} CPU" if on_cpu(result) else kind, *more])
    return f"{where}; {inference['dtype']}, {inference['batch']} x {inference['length']}"


def _middle(values: Sequence[float]) -> Bar:
    found = spread(values)
    return Bar(found["median"], found["low"], found["high"])


def draw_gain(gain: Gain, path: Path) -> str:
    """Draw accuracy, kept weights and time of a batch side by side, and return what the picture shows."""
    figure = figure_class()(figsize=(12, 4.1), layout="constrained")
    ratios = [max(len(gain.accuracy), 1), 0.9, *([max(len(gain.times), 1)] if gain.times else [])]
    panels = figure.subplots(1, len(ratios), squeeze=False, width_ratios=ratios)[0]
    _draw_bars(panels[0], gain.accuracy, "Accuracy", "on the test part, %", "{:.1f}")
    _draw_bars(panels[1], {"": gain.kept}, "Weights kept", "of the layers, %", "{:.0f}")
    if gain.times:
        _draw_bars(panels[2], gain.times, "Time of a batch", "of the dense model's, %", "{:.0f}")
    names = {"full": "full fine-tuning", "lora": "LoRA", "apt": f"APT, {100 * gain.density:g} % kept"}
    small = {"frameon": False, "fontsize": 11, "title_fontsize": 8.5}
    handles, _ = panels[0].get_legend_handles_labels()
    figure.legend(handles, list(names.values()), loc="outside lower center", ncols=3, title=_WHISKERS, **small)
    figure.savefig(path, dpi=140)
    parts = [f"{task} {_said(bars, '{:.1f}')}" for task, bars in gain.accuracy.items()]
    text = f"accuracy of {', '.join(names.values())} in percent: {'; '.join(parts)}. Weights of the layers: {_said(gain.kept, '{:.0f}')}"
    times = "; ".join(f"{machine.replace('; ', ', ')}: {_said(bars, '{:.0f}')}" for machine, bars in gain.times.items())
    return text + (f". Time of a batch: {times}" if times else "")


def _said(bars: Mapping[str, Bar], form: str) -> str:
    return ", ".join(form.format(bars[method].value) for method in _METHODS)


def _draw_bars(axes: Any, groups: Mapping[str, Mapping[str, Bar]], title: str, label: str, form: str) -> None:
    """Draw a group of bars for each entry, one a method, with whiskers and the value above."""
    width = 0.29
    colours = dict(zip(_METHODS, ("#c3cad6", "#8892a3", LIGHT.accent), strict=True))
    for place, method in enumerate(_METHODS):
        bars = [group[method] for group in groups.values()]
        at = [i + (place - 1) * width for i in range(len(bars))]
        ranges = [[bar.value - bar.low for bar in bars], [bar.high - bar.value for bar in bars]]
        values = [bar.value for bar in bars]
        axes.bar(at, values, width * 0.92, color=colours[method], label=method)
        axes.errorbar(at, values, yerr=ranges, fmt="none", ecolor=LIGHT.text, elinewidth=1.1, capsize=3)
        bold = {"fontweight": "bold", "color": LIGHT.accent} if method == "apt" else {"color": LIGHT.text}
        for x, bar in zip(at, bars, strict=True):
            axes.annotate(form.format(bar.value), (x, bar.high), (0, 4), textcoords="offset points", ha="center", fontsize=9, **bold)
    axes.set_xticks(range(len(groups)), [name.replace("; ", "\n") for name in groups], fontsize=9.5)
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=12.5, fontweight="bold", loc="left", pad=10)
    axes.set_ylim(0, 109)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="y", color=LIGHT.faint, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", length=0)
