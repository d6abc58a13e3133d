"""`report`: collect, draw and write."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from ..common.checks import checked_int, checked_path
from ..method.controller import Controller
from ..storage.atomic_dir import made
from ..storage.atomic_file import replace_files
from . import figures, page
from .losses import Curve, curves_of
from .numbers import collected
from .subject import Subject, checked_metrics, exported_in

PAGE, NUMBERS = "report.html", "report.json"  # in a directory


def report(
    model: nn.Module | str | os.PathLike[str],
    controller: Controller | None,
    path: str | os.PathLike[str],
    *,
    losses: Any = None,
    example: Any = None,
    rounds: int = 9,
    exported: str | os.PathLike[str] | None = None,
    metrics: Any = None,
    title: str | None = None,
) -> str:
    """Write one page that shows what a run has made of a model, and return its path.

    It shows parameters, bytes, FLOPs, speed and memory before and after, what each layer keeps, the ranks, the
    budget and the loss over the steps, and what was exported. It needs no file beside itself. The element with the
    id "numbers" holds its numbers as JSON. Before is before the first cut. After is what `shrink` makes. `model` is
    untouched.

    model       an APTModel or what holds one; a model without adapters, such as `shrink` returns, or the directory
                of an export, of which only what is left is known
    controller  the one that pruned `model`; None: the page shows what the model alone knows
    path        ends in ".html": the page. Else a directory, made if it is missing, with report.html, report.json
                and a PNG of each picture; other files there stay
    losses      (step, loss) pairs, or Trainer's `state.log_history`; None: `controller.losses`, if it has any
    example     inputs of the model, a dict of tensors, for speed and memory; None: random ones by its config
    rounds      of the clock, in each of which both models take their turn; 0: speed and memory are left out
    exported    the directory that `export` wrote; None: that of `model`, if it is one
    metrics     {name: number or text} to show beside, such as an accuracy
    title       None: the model's class and its density

    Speed and memory are measured on the device of `model`, where there must be room for two more models.

    All files are complete on the disk before the first takes its place. Nothing was written when this raises
    TypeError or ValueError naming the argument (`model` of another type, a controller of another model, a path in
    whose place something else is, losses that are none), RuntimeError (a model whose masks have no values) or
    ImportError (matplotlib or jinja2 is missing; it says what to install). OSError leaves what was there.
    """
    figures.figure_class()
    target = _checked_target(path)
    checked_int("rounds", rounds, 0)
    if title is not None and not isinstance(title, str):
        raise TypeError(f"title: expected a str or None, got {type(title).__name__}")
    checked = checked_metrics(metrics)
    curves = curves_of(getattr(controller, "losses", None) if losses is None else losses)
    written = exported_in("exported", exported) if exported is not None else None
    subject = Subject.of(model, controller)
    if written is None and not isinstance(model, nn.Module):
        written = exported_in("model", model)
    numbers = collected(subject, curves=curves, example=example, rounds=rounds, exported=written, metrics=checked, title=title)
    drawings = _drawings(numbers, curves)
    pictures = {name: {theme.name: figures.as_png(draw, theme) for theme in figures.THEMES} for name, draw in drawings.items()}
    text = page.html(numbers, pictures).encode()
    if target.suffix.lower() == ".html":
        files = {target: text}
    else:
        files = {target / f"{name}.png": images["light"] for name, images in pictures.items()}
        files |= {target / NUMBERS: (json.dumps(numbers, indent=1, allow_nan=False) + "\n").encode(), target / PAGE: text}
    with made(next(iter(files)).parent):
        replace_files(files)
    return str(target if target.suffix.lower() == ".html" else target / PAGE)


def _checked_target(path: Any) -> Path:
    """ValueError where something is in the way."""
    target = checked_path(path)
    if target.suffix.lower() == ".html":
        if target.is_dir():
            raise ValueError(f"path: expected a file's name where it ends in .html, got the directory {str(target)!r}")
    elif target.exists() and not target.is_dir():
        raise ValueError(f"path: expected a name that ends in .html, or a directory, got the file {str(target)!r}")
    above = next(one for one in target.absolute().parents if one.exists())
    if not above.is_dir():
        raise ValueError(f"path: expected directories above it, got the file {str(above)!r}")
    return target


def _drawings(numbers: dict[str, Any], curves: dict[str, Curve]) -> dict[str, Any]:
    """{name: what draws the picture}."""
    events = [event["step"] for event in numbers["density"]["events"]]
    return {
        "before-after": figures.before_and_after(page.picture_rows(numbers)),
        "density": figures.density_curve(numbers["density"], page.why_no_events(numbers)),
        "loss": figures.loss_curve(curves, events, page.why_no_losses(numbers)),
        "kept": figures.kept_map(numbers["kept"]),
        "ranks": figures.rank_map(numbers["ranks"]),
    }
