"""What a run of `apt-ext train` found, for people."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from .train_checks import MODEL


def table(report: dict[str, Any]) -> str:
    """What came of a run, for people."""
    before, after = report["before"], report["after"]
    rows = [("", "before", "after")]
    for name, value in after["scores"].items():
        first = before["scores"].get(name)
        rows.append((f"{name} (validation)", "" if first is None else f"{first:,.4g}", f"{value:,.4g}"))
    rows.append(("parameters", f"{before['parameters']:,}", f"{after['parameters']:,}"))
    rows.append(("bytes of weights", f"{before['bytes']:,}", f"{after['bytes']:,}"))
    for kind, found in report["kept"].items():
        old, new = (_range(found[side]) for side in ("before", "after"))
        if old != new:
            rows.append((f"{kind} of a layer" if kind != "hidden" else kind, old, new))
    if report["speed"]:
        speed = report["speed"]["tokens per second"]
        old, new = (speed[side] for side in ("before", "after"))
        rows.append(("tokens a second, median", f"{old['median']:,.0f}", f"{new['median']:,.0f}"))
        rows.append(("  quartiles", f"{old['low']:,.0f}-{old['high']:,.0f}", f"{new['low']:,.0f}-{new['high']:,.0f}"))
    lines = [f"{name:28}{old:>20}{new:>20}" for name, old, new in rows]
    notes = [f"Trained in {report['seconds']:.0f} s. Before: as loaded, with a new head where the task needs one."]
    if report["speed"]:
        on = report["speed"]
        threads = f", {on['threads']} thread{'s' * (on['threads'] != 1)}" if on["device"].startswith("CPU") else ""
        notes.append(f"Speed: {on['device']}{threads}, {on['dtype']}, the two models in turn.")
    places = [f"{report['output']}/{MODEL} (loaded by {report['loaded by']})"]
    places += [report["report"]] if report["report"] else []
    bad = _worse(report)
    warning = [f"Warning: {bad}; begin anew with a smaller --learning-rate, more steps or a higher --density."] if bad else []
    return "\n".join([*lines, *notes, f"Written: {', '.join(places)}.", *warning])


def _worse(report: dict[str, Any]) -> str | None:
    """What tells that the run has failed, in words; None where nothing does.

    Of a language model the score is not compared: it knew much before, and what is pruned costs some of it.
    """
    before, after, measure = report["before"]["scores"], report["after"]["scores"], report["measure"]
    losses = [entry["loss"] for entry in report["losses"] if "loss" in entry]
    if not all(map(math.isfinite, (*losses, after.get("loss", 0.0)))):
        return "the loss is not finite, so the model has learned nothing"
    if losses and (end := statistics.fmean(losses[-3:])) > 1.05 * losses[0]:
        return f"the training loss rose from {losses[0]:.4g} to {end:.4g}"
    old, new = before.get(measure), after.get(measure)
    if measure != "perplexity" and old is not None and new is not None and (new > old if measure == "rmse" else new < old):
        return f"the {measure} is worse than before training"
    return None


def _range(counts: Sequence[int]) -> str:
    least, most = min(counts), max(counts)
    return f"{most:,}" if least == most else f"{least:,}-{most:,}"
