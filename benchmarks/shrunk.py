"""The README's tables of kept runs of `apt-ext shrink`, as (head, lines of cells)."""

from __future__ import annotations

SIDES = ("before", "after")


def in_order(runs):
    """Runs of real models first, then those of random Parameters."""
    return sorted(runs, key=lambda run: run.get("random", False))


def quality(runs):
    """What a cut costs, and what it leaves on the disk."""
    lines = []
    for run in in_order(runs):
        if "quality" not in run:
            continue
        found, digits = run["quality"], {"accuracy": 3, "perplexity": 1}[run["quality"]["measure"]]
        before, cut, after = (f"{found[name]:.{digits}f}" for name in ("before", "masked", "after"))
        sizes = [" to ".join(f"{run[name][side] / 1e6:.1f}" for side in SIDES) for name in ("parameters", "bytes on disk")]
        recovered = after if run["settings"]["recover"] else ""
        lines.append([arguments(run), f"{found['measure']}, {found['on']}", before, cut, recovered, *sizes])
    return ["`apt-ext shrink ...`", "measured on", "before", "cut", "recovered", "parameters, M", "on disk, MB"], lines


def speed(runs):
    """What a cut saves while the model runs."""
    lines = []
    for run in in_order(runs):
        first = arguments(run)
        for device, found in run["devices"].items():
            where = f"{found['threads']} CPU threads, {found['dtype']}" if device == "cpu" else f"{found['device']}, {found['dtype']}"
            for name, unit, digits in (("tokens per second", 1, 0), ("generated tokens per second", 1, 1), ("peak memory", 1e6, 0)):
                if name not in found:
                    continue
                sides = [spread(found[name][side], unit, digits) for side in SIDES]
                ratio = spread(found[name]["ratio"], 1, 2) if "ratio" in found[name] else ""
                lines.append([first, where, name.replace("memory", "memory, MB"), *sides, ratio])
                first = where = ""
    return ["`apt-ext shrink ...`", "on", "", "before", "after", "ratio"], lines


def arguments(run):
    return f"`{run['command'].removeprefix('apt-ext shrink ')}`"


def spread(found, unit, digits):
    median, low, high = (f"{found[name] / unit:,.{digits}f}" for name in ("median", "low", "high"))
    return f"{median} ({low}-{high})"
