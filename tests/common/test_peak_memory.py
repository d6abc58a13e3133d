"""What this process says of its memory."""

import ctypes
from pathlib import Path

import pytest
import torch

from apt_ext.common import memory


def test_peak_memory_is_in_bytes():
    assert 50e6 < memory.peak_memory() < 1e12


def test_a_peak_that_is_over_does_not_count():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux can")
    memory.restart_peak()
    before = memory.peak_memory()
    high = torch.ones(50_000_000)
    assert memory.peak_memory() - before > 150e6 and memory.resident_memory() > 150e6
    del high
    memory.restart_peak()
    assert memory.peak_memory() - before < 50e6


def test_what_was_freed_and_is_still_held_does_not_count():
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("only glibc can")
    memory.restart_peak()
    before = memory.peak_memory()
    blocks = [bytearray(b"1") * 60_000 for _ in range(2_000)]  # too small to be mapped one by one
    last = blocks.pop()  # lies at the end of the heap and keeps it from shrinking
    blocks.clear()
    memory.restart_peak()
    assert last and memory.peak_memory() - before < 30e6
