"""How the page writes numbers."""

from __future__ import annotations

from collections.abc import Sequence

NONE = "–"
_POWERS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def count(value: float | None) -> str:
    """Write 22_713_216 as "22.7 M"; "–" for None."""
    return _with_unit(value, "", giga="B")


def size(value: float | None) -> str:
    """Write bytes in powers of ten: "45.4 MB"."""
    return _with_unit(value, "B")


def flops(value: float | None) -> str:
    """Write floating-point operations: "2.72 GFLOP"."""
    return _with_unit(value, "FLOP")


def seconds(value: float | None) -> str:
    """Write a duration: "6.71 ms"."""
    if value is None:
        return NONE
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= scale:
            return f"{_short(value / scale)} {unit}"
    return f"{_short(value * 1e6)} µs"


def percent(share: float | None) -> str:
    """Write 0.4 as "40 %", 0.4321 as "43.2 %"."""
    return NONE if share is None else f"{100 * share:.3g} %"


def change(before: float | None, after: float | None) -> str:
    """Write how far `after` is from `before`: "−51 %"; "" where one is unknown or `before` is 0."""
    if not before or after is None:
        return ""
    moved = 100 * (after - before) / before
    if abs(moved) < 0.05:
        return "unchanged"
    return f"{'−' if moved < 0 else '+'}{abs(moved):.3g} %"


def span(numbers: Sequence[int]) -> str:
    """Write the least and the most of some numbers: "8–32", or "8" where all are alike."""
    if not numbers:
        return "none"
    least, most = min(numbers), max(numbers)
    return f"{least:,}" if least == most else f"{least:,}–{most:,}"


def _with_unit(value: float | None, unit: str, giga: str = "G") -> str:
    if value is None:
        return NONE
    for power, sign in _POWERS:
        if abs(value) >= power:
            return f"{_short(value / power)} {giga if sign == 'G' else sign}{unit}"
    return f"{value:,.0f} {unit}".rstrip()


def _short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
