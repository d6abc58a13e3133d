"""The clock of calls that may run on a device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


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
