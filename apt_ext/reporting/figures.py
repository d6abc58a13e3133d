"""The pictures of a report, drawn by matplotlib without a display, each once for a light and once for a dark page."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..common.extras import lacking

_WIDTH = 5.6  # inches of every picture: 560 pixels on the page, of which a telephone shows two thirds
_DPI = 200
_COLOURS = 128
_CURVE, _EMPTY = 2.9, 1.1  # inches of a curve, and where there is nothing to draw
_MOST_LABELS = 40  # rows of a heat map with a number in each cell


@dataclass(frozen=True)
class Theme:
    """Colours: of what lies behind, text, faint lines, the accent, what was before, targets; of heat maps."""

    name: str
    page: str
    text: str
    faint: str
    accent: str
    before: str
    target: str
    low: str
    middle: str
    high: str


LIGHT = Theme("light", "#ffffff", "#1f2937", "#dde2ea", "#3b5bdb", "#b4bdcc", "#d9480f", "#f1f4fb", "#8ea6ec", "#27409f")
DARK = Theme("dark", "#171c26", "#e6e9ef", "#333b4a", "#8ea6ff", "#5b6679", "#ff9f5a", "#222a3a", "#4a63bd", "#b9c8ff")
THEMES = (LIGHT, DARK)


def figure_class() -> Any:
    """matplotlib's Figure. ImportError in words where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(lacking("a picture", "matplotlib", error)) from error
    return Figure


def as_png(draw: Callable[[Theme], Any], theme: Theme) -> bytes:
    """A picture that `draw` makes, as a PNG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image  # which matplotlib needs

    style: dict[Any, Any] = {
        "font.family": "sans-serif",
        "font.size": 9.5,
        "figure.facecolor": theme.page,
        "savefig.facecolor": theme.page,
        "axes.facecolor": theme.page,
        "text.color": theme.text,
        "axes.labelcolor": theme.text,
        "axes.edgecolor": theme.faint,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "xtick.color": theme.text,
        "ytick.color": theme.text,
        "axes.grid.axis": "y",
        "grid.color": theme.faint,
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "legend.frameon": False,
    }
    with rc_context(style):
        canvas: Any = FigureCanvasAgg(draw(theme))
        canvas.draw()
        image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")
    stream = io.BytesIO()
    image.quantize(_COLOURS).save(stream, format="png", optimize=True)  # a third of the bytes, and looks the same
    return stream.getvalue()


def _figure(height: float) -> Any:
    return figure_class()(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")


def _only(text: str) -> Any:
    """A figure that says why there is nothing to draw."""
    figure = _figure(_EMPTY)
    axes = figure.subplots()
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, wrap=True, alpha=0.75)
    return figure


# -- before and after --------------------------------------------------------------------------------------------------


def before_and_after(rows: Sequence[dict[str, Any]]) -> Callable[[Theme], Any]:
    """Bars of what is left of each measure, with quartiles where it was measured.

    rows  {"title", "share": after over before, "low", "high": of the share or None, "text"}
    """

    def draw(theme: Theme) -> Any:
        if not rows:
            return _only("Nothing to compare: what was before is not known.")
        figure = _figure(0.45 + 0.62 * len(rows))
        axes = figure.subplots()
        places = range(len(rows))
        most = max([1.0, *(row["high"] or row["share"] for row in rows)])
        axes.barh(places, [1.0] * len(rows), 0.36, color=theme.faint)
        axes.barh(places, [row["share"] for row in rows], 0.36, color=theme.accent)
        for place, row in zip(places, rows, strict=True):
            axes.plot([1.0, 1.0], [place - 0.18, place + 0.18], color=theme.before, linewidth=1.5)
            axes.text(0, place - 0.29, row["title"], ha="left", va="bottom", fontweight="bold")
            axes.text(most, place - 0.29, row["text"], ha="right", va="bottom")
            if row["low"] is not None:
                axes.plot([row["low"], row["high"]], [place, place], color=theme.text, linewidth=1.6, solid_capstyle="butt")
                for end in (row["low"], row["high"]):
                    axes.plot([end, end], [place - 0.11, place + 0.11], color=theme.text, linewidth=1.6)
        axes.set(xlim=(0, most), ylim=(len(rows) - 0.6, -0.75))
        axes.set_xticks([0, 0.25, 0.5, 1.0], ["0", "25 %", "50 %", "100 % = before"])
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.tick_params(length=0)
        axes.get_xticklabels()[-1].set_ha("right")
        return figure

    return draw


# -- heat maps ---------------------------------------------------------------------------------------------------------


def kept_map(kept: dict[str, Any]) -> Callable[[Theme], Any]:
    """What each layer keeps, a colour for its share, and the residual stream below."""

    def draw(theme: Theme) -> Any:
        empty = "This model has no blocks that could be pruned."
        return _heat_maps(theme, kept["panels"], kept_cell, (0.0, 1.0), empty, kept["hidden"])

    return draw


def rank_map(ranks: dict[str, Any]) -> Callable[[Theme], Any]:
    """The rank of each adapter."""

    def draw(theme: Theme) -> Any:
        empty = "No adapters lie in the layers of this model."
        return _heat_maps(theme, ranks["panels"], rank_cell, rank_limits(ranks["panels"]), empty, None)

    return draw


def kept_cell(cell: dict[str, int]) -> tuple[float, str]:
    """(share, text) of what a block keeps."""
    return (cell["kept"] / cell["of"] if cell["of"] else 1.0), f"{cell['kept']:,} / {cell['of']:,}"


def rank_cell(rank: int) -> tuple[float, str]:
    """(value, text) of a rank."""
    return float(rank), str(rank)


def rank_limits(panels: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """From 0 to the highest rank."""
    ranks = [cell for panel in panels for row in panel["cells"] for cell in row if cell is not None]
    return 0.0, float(max([*ranks, 1]))


def _heat_maps(
    theme: Theme,
    panels: Sequence[dict[str, Any]],
    of: Callable[[Any], tuple[float, str]],
    limits: tuple[float, float],
    empty: str,
    hidden: dict[str, int] | None,
) -> Any:
    """A heat map for each panel, one below the other; `of` says (value, text) of a cell."""
    if not panels and hidden is None:
        return _only(empty)
    strip, most = 0.55 if hidden is not None else 0.0, max((len(panel["layers"]) for panel in panels), default=0)
    step = 0.30 if most <= 16 else 0.215 if most <= _MOST_LABELS else 0.215 * _MOST_LABELS / most
    heights = [step * len(panel["layers"]) + (1.15 if _are_long(panel["columns"]) else 0.62) for panel in panels]
    figure = _figure(max(sum(heights) + strip, _EMPTY))
    ratios = [*heights, *([strip] if hidden is not None else [])]
    every = figure.subplots(len(ratios), 1, squeeze=False, gridspec_kw={"height_ratios": ratios})[:, 0]
    for axes, panel in zip(every, panels, strict=False):
        draw_panel(axes, theme, panel, of, limits)
    if hidden is not None:
        _draw_strip(every[-1], theme, hidden)
    return figure


def draw_panel(axes: Any, theme: Theme, panel: dict[str, Any], of: Callable[[Any], tuple[float, str]], limits: tuple[float, float]) -> None:
    """One heat map: layers down, columns across."""
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    colours, scale = LinearSegmentedColormap.from_list("apt", [theme.low, theme.middle, theme.high]), Normalize(*limits)
    cells = [[None if cell is None else of(cell) for cell in row] for row in panel["cells"]]
    values = [[float("nan") if cell is None else cell[0] for cell in row] for row in cells]
    axes.pcolormesh(values, cmap=colours, norm=scale)
    layers, columns = len(cells), len(panel["columns"])
    for place in range(1, layers):  # gaps between the cells, of the page's own colour
        axes.axhline(place, color=theme.page, linewidth=1.5)
    for place in range(1, columns):
        axes.axvline(place, color=theme.page, linewidth=1.5)
    small = 8.5 if layers <= 16 else 7.5
    for y, row in enumerate(cells if layers <= _MOST_LABELS else []):
        for x, cell in enumerate(row):
            if cell is not None:
                axes.text(x + 0.5, y + 0.5, cell[1], ha="center", va="center_baseline", fontsize=small, color=_on(colours(scale(cell[0]))))
    axes.set(xlim=(0, columns), ylim=(layers, 0))
    every = max(1, -(-layers // _MOST_LABELS))
    axes.set_yticks([y + 0.5 for y in range(0, layers, every)], [str(layer) for layer in panel["layers"][::every]], fontsize=small)
    turned = {"rotation": 24 if columns < 7 else 45, "ha": "left", "rotation_mode": "anchor"} if _are_long(panel["columns"]) else {}
    axes.xaxis.tick_top()
    axes.set_xticks([x + 0.5 for x in range(columns)], panel["columns"], fontsize=9, **turned)
    axes.tick_params(length=0)
    axes.set_ylabel(f"{panel['stack']} layer".strip())
    for spine in axes.spines.values():
        spine.set_visible(False)


def _are_long(columns: Sequence[str]) -> bool:
    """Whether titles do not fit beside each other."""
    return len(columns) > 1 and sum(map(len, columns)) > 52


def _draw_strip(axes: Any, theme: Theme, hidden: dict[str, int]) -> None:
    share = hidden["kept"] / max(hidden["of"], 1)
    axes.barh([0], [1.0], 0.5, color=theme.faint)
    axes.barh([0], [share], 0.5, color=theme.accent)
    axes.set(xlim=(0, 1), ylim=(-0.5, 1.0))
    axes.text(0, 0.42, "hidden dimensions", va="bottom", fontweight="bold")
    axes.text(1, 0.42, f"{hidden['kept']:,} of {hidden['of']:,}", va="bottom", ha="right")
    axes.set_axis_off()


def _on(colour: tuple[float, ...]) -> str:
    """Dark or light text, whichever stands out on a colour."""
    red, green, blue = colour[:3]
    return "#10151f" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "#ffffff"


# -- curves ------------------------------------------------------------------------------------------------------------


def density_curve(density: dict[str, Any], why_not: str) -> Callable[[Theme], Any]:
    """The density after each event, with the target; `why_not` where there is no event."""
    events = density["events"]

    def draw(theme: Theme) -> Any:
        if not events:
            return _only(why_not)
        figure = _figure(_CURVE)
        axes = figure.subplots()
        steps, values = [0, *(event["step"] for event in events)], [density["initial"], *(event["density"] for event in events)]
        end = max(density["total_steps"] or 0, steps[-1])
        axes.step([*steps, end], [*values, values[-1]], where="post", color=theme.accent, linewidth=2.2, zorder=3)
        axes.plot(steps[1:], values[1:], "o", color=theme.accent, markersize=6, zorder=4, label="event")
        if density["target"] is not None:
            axes.axhline(density["target"], color=theme.target, linewidth=1.3, linestyle=(0, (4, 3)), label=f"target {density['target']:g}")
        axes.set(xlabel="optimizer step", ylabel=f"kept, share of {density['budget']}", xlim=(0, end * 1.02 or 1), ylim=(0, 1.05))
        axes.grid(True)
        _legend_outside(figure, axes)
        return figure

    return draw


def loss_curve(curves: dict[str, Any], events: Iterable[int], why_not: str) -> Callable[[Theme], Any]:
    """The losses, with a faint line at each event; a loss that is not finite is a gap."""

    def draw(theme: Theme) -> Any:
        if all(loss is None for curve in curves.values() for _, loss in curve):
            return _only(why_not)
        figure = _figure(_CURVE)
        axes = figure.subplots()
        for i, step in enumerate(events):
            axes.axvline(step, color=theme.before, linewidth=1, linestyle=(0, (2, 3)), label="event" if i == 0 else None)
        for name, curve in curves.items():
            colour = theme.target if name == "evaluation" else theme.accent
            values = [float("nan") if loss is None else loss for _, loss in curve]
            few = sum(loss is not None for _, loss in curve) <= 60
            style = {"marker": "o", "markersize": 3.5} if few else {}
            noisy = len(values) > 200
            axes.plot([step for step, _ in curve], values, color=colour, linewidth=1 if noisy else 1.8, label=name, zorder=3, **style)
        axes.set(xlabel="optimizer step", ylabel="loss")
        axes.grid(True)
        _legend_outside(figure, axes)
        return figure

    return draw


def _legend_outside(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=max(len(labels), 1), fontsize=9)
