"""What the demo prints and writes: a table and a picture of widths and ranks."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .data import Missing

_ROWS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("validation accuracy", lambda m: f"{100 * m['validation_accuracy']:.1f} %"),
    ("test accuracy", lambda m: f"{100 * m['test_accuracy']:.1f} %"),
    ("encoder parameters", lambda m: f"{m['encoder_parameters'] / 1e6:.2f} M"),
    ("on disk", lambda m: f"{m['disk_bytes'] / 1e6:.1f} MB"),
    ("sentences/s, median", lambda m: f"{m['sentences_per_second']['median']:.0f}"),
    ("sentences/s, min-max", lambda m: "{min:.0f}-{max:.0f}".format(**m["sentences_per_second"])),
    ("training time", lambda m: f"{m['training_seconds']:.0f} s"),
    ("ms a step, before pruning", lambda m: _milliseconds(m["step_seconds"]["before"])),
    ("ms a step, after the last event", lambda m: _milliseconds(m["step_seconds"]["after"])),
    ("peak memory, training", lambda m: f"{m['peak_memory_bytes'] / 1e6:.0f} MB"),
    ("adapter parameters", lambda m: "{:,d} -> {:,d}".format(*m["adapter_parameters"])),
)
# of a legend: beside the bars, not on them
_BELOW: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15), "ncols": 2, "frameon": False}


def _milliseconds(found: dict[str, Any] | None) -> str:
    """Write the median and the quartiles of steps, if there were any."""
    if found is None:
        return "no such step"
    median, low, high = (f"{1e3 * found[name]:.1f}" for name in ("median", "low", "high"))
    return f"{median} ({low}-{high})"


def table(report: dict[str, Any]) -> str:
    """The comparison as text, one column a method, with what one has to know to read it."""
    methods = list(report["methods"].values())
    rows = [["", *(method["name"] for method in methods)]]
    rows += [[title, *(cell(method) for method in methods)] for title, cell in _ROWS]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [" | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    lines.insert(1, "-+-".join("-" * width for width in widths))
    recipe = report["recipe"]
    notes = f"{recipe['steps']} optimizer steps each, seed {recipe['seed']}, {report['threads']} threads, {report['seconds']:.0f} s."
    said = "Speed: the exported models in turn. Memory: resident high-water mark of each training's own process, libraries included."
    steps = "A step: median (quartiles), for both methods of the steps before APT's first event and after its last."
    quick = ["Quick run: its accuracies mean nothing."] if report["quick"] else []
    return "\n".join(["", *lines, "", notes, said, steps, *quick])


def figure_class() -> Any:
    """matplotlib's Figure, which draws without a display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Missing('pictures need matplotlib; run: python -m pip install "apt_ext[demo]"') from error
    return Figure


def write_plot(report: dict[str, Any], path: Path) -> None:
    """Kept neurons and adapter ranks of each layer after APT, as a PNG."""
    apt = report["methods"]["apt"]
    figure = figure_class()(figsize=(10, 4), layout="constrained")
    neurons, ranks = figure.subplots(1, 2)
    layers = [name.partition(".")[0] for name in apt["counts"]]
    neurons.bar(layers, apt["counts"].values(), color="0.88", label="before")
    neurons.bar(layers, apt["kept"].values(), label="kept")
    neurons.set(title="FFN neurons", xlabel="layer")
    neurons.legend(**_BELOW)
    by_linear = ranks_by_linear(apt["ranks"])
    width = 0.8 / max(len(by_linear), 1)
    for i, (linear, values) in enumerate(by_linear.items()):
        ranks.bar([layer + (i - (len(by_linear) - 1) / 2) * width for layer in values], values.values(), width, label=linear)
    ranks.axhline(report["recipe"]["rank"], color="0.6", linewidth=0.8)
    ranks.set(title="adapter ranks (line: at the start)", xlabel="layer")
    ranks.legend(**_BELOW)
    figure.savefig(path, dpi=150)


def ranks_by_linear(ranks: dict[str, int]) -> dict[str, dict[int, int]]:
    """{linear within its layer: {layer: rank}} from the adapters' full names."""
    found: dict[str, dict[int, int]] = {}
    for name, rank in ranks.items():
        match = re.fullmatch(r".*?\.(\d+)\.(.+)", name)
        if match:
            found.setdefault(match[2], {})[int(match[1])] = rank
    return found
