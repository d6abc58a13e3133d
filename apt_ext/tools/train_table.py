"""What a run of `apt-ext train` found, for people."""

from __future__ import annotations

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
    return "\n".join([*lines, *notes, f"Written: {', '.join(places)}."])


def _range(counts: Sequence[int]) -> str:
    least, most = min(counts), max(counts)
    return f"{most:,}" if least == most else f"{least:,}-{most:,}"
