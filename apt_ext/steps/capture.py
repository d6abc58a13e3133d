"""Capture launches into a CUDA graph, and leave nothing behind where that fails.

Where the device ends a capture, torch does not end it for its allocator and its random generators: the memory of the capture would
never be given back, and the next random number would be refused.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

_HELD = "legacy stream"  # in CUDA's words where a node of an earlier forward joins the capture
_ENDS = ("_cuda_endAllocateToPool", "_cuda_releasePool")  # of torch._C


class CaptureFailed(Exception):
    """Why, in words. The pool that it used is not to be used again.

    passing  what was in the way may be gone at the next try
    """

    def __init__(self, words: str) -> None:
        self.passing = _HELD in words
        if self.passing:
            words += "; a loss or outputs of an earlier forward still hold its graph of autograd: detach them, or let go of them"
        super().__init__(words)


def capture(graph: torch.cuda.CUDAGraph, run: Callable[[], None], pool: Any, device: torch.device) -> None:
    """Capture what `run` launches on `device` into `graph`, with memory of `pool`. CaptureFailed, or what is no Exception, of `run`."""
    said: list[str] = []  # words alone: an exception holds frames, and with them what was captured
    interrupt: BaseException | None = None
    with torch.cuda.device(device):
        gc.collect()  # a cycle may hold the graph of autograd of an earlier forward
        try:
            # Other threads may allocate meanwhile: a DataLoader pins memory.
            with torch.cuda.graph(graph, pool=pool, stream=_stream(), capture_error_mode="thread_local"):
                try:
                    run()
                except Exception as error:
                    said.append(_words(error))
                    raise
            return
        except Exception as error:
            said.append(_words(error))
        except BaseException as error:
            interrupt = error
        _leave(graph, pool)
    if interrupt is not None:
        raise interrupt
    raise CaptureFailed(f"capturing it failed with {said[0]}")


def _stream() -> Any:
    """A stream of the present device; torch's own for captures stays on the device of its first use."""
    return torch.cuda.Stream() if torch.cuda.device_count() > 1 else None  # type: ignore[no-untyped-call]


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _leave(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """End for torch what has failed, and give its memory back."""
    if not _has_ended(graph):
        for name in _ENDS:
            with suppress(AttributeError, RuntimeError):
                getattr(torch._C, name)(torch.cuda.current_device(), pool)
    graph.reset()
    other, place = torch.cuda.CUDAGraph(), torch.zeros(1, device="cuda")
    # torch's generators leave a capture at the end of one
    with torch.cuda.graph(other, stream=_stream(), capture_error_mode="thread_local"):
        place.add_(1)
    del other
    gc.collect()
    torch.cuda.empty_cache()


def _has_ended(graph: torch.cuda.CUDAGraph) -> bool:
    """Whether torch has ended the capture itself: then it gives the memory back with the graph."""
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True
