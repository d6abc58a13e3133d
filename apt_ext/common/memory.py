"""How much memory this process has."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path

_COUNTER = Path("/proc/self/clear_refs")


def peak_memory() -> int:
    """The most resident memory this process has had, in bytes: torch and transformers themselves included."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage counts on Linux what the parent held when it started this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def restart_peak() -> None:
    """`peak_memory` counts from what is in use now; only Linux can.

    What was freed and glibc still holds is given back, so that it is not taken for what comes next.
    """
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    if peak_can_restart():
        _COUNTER.write_text("5")


def peak_can_restart() -> bool:
    """Whether the system lets this process count its peak anew."""
    return _COUNTER.is_file() and os.access(_COUNTER, os.W_OK)


def resident_memory() -> int:
    """Resident memory of this process now, in bytes; 0 where only the peak is known."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * resource.getpagesize() if status.is_file() else 0
