"""What the demo prints and writes: a table, and a picture of what layers keep and of ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..reporting.figures import LIGHT, Theme, as_png, draw_panel, figure_class, kept_cell, rank_cell, rank_limits
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


def check_pictures() -> None:
    """Missing in words where pictures cannot be drawn."""
    try:
        figure_class()
    except ImportError as error:
        raise Missing(str(error)) from error


def write_plot(report: dict[str, Any], path: Path) -> None:
    """Kept neurons and adapter ranks of each layer after APT, as a PNG."""
    kept, ranks = (report["methods"]["apt"]["panels"][name] for name in ("kept", "ranks"))

    def draw(theme: Theme) -> Any:
        figure = figure_class()(figsize=(11, 3.4), dpi=150, layout="constrained")
        left, right = figure.subplots(1, 2)
        draw_panel(left, theme, kept[0], kept_cell, (0.0, 1.0))
        draw_panel(right, theme, ranks[0], rank_cell, rank_limits(ranks))
        left.set_title("what each layer keeps", fontweight="bold", pad=10)
        right.set_title("adapter ranks", fontweight="bold", pad=10)
        return figure

    path.write_bytes(as_png(draw, LIGHT))
