"""The clock of calls that may run on a device, alone or in turn, and the spread of what it shows."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

_ROUND = 0.2  # seconds that a round lasts at least, for each call

Spread = dict[str, Any]


def seconds(call: Callable[[], object], synchronize: Callable[[], None], times: int = 1) -> float:
    """Return what one of `times` calls takes; `synchronize` waits for the device, before the first and after the last."""
    synchronize()
    started = time.perf_counter()
    for _ in range(times):
        call()
    synchronize()
    return (time.perf_counter() - started) / times


def waiting_for(device: torch.device) -> Callable[[], None]:
    """Return what waits until `device` is idle."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


def spread(values: Sequence[float]) -> Spread:
    """{"median", "low" and "high": the quartiles, "rounds": the values as they came}."""
    ordered = sorted(values)
    low, middle, high = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    return {"median": middle, "low": low, "high": high, "rounds": list(values)}


def in_turn(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    synchronize: Callable[[], None] = lambda: None,
    least: float | None = None,
) -> dict[str, list[float]]:
    """Seconds of one call, a value a round, of each; the calls take turns, and who begins changes, so that all meet the same machine.

    A round makes as many calls as take `least` seconds, None: a moment; the device is idle before and after.
    """
    least = _ROUND if least is None else least
    inner = {name: 1 for name in calls}

    for name, call in calls.items():
        seconds(call, synchronize)  # the first call allocates and chooses kernels
        inner[name] = max(math.ceil(least / max(seconds(call, synchronize), 1e-6)), 1)
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in tqdm(range(rounds), desc="clock", unit="round", leave=False):
        for name in calls if turn % 2 == 0 else reversed(list(calls)):
            found[name].append(seconds(calls[name], synchronize, inner[name]))
    return found
