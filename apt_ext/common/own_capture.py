"""Whether the CUDA graph that is being captured is one whose owner captures it anew once what the host knows of a model changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_recordings = 0


def is_recording() -> bool:
    """Return True within `recording`, in whatever thread: a recomputation runs in the backward's."""
    return _recordings > 0


@contextmanager
def recording() -> Iterator[None]:
    """Capture with what the host knows now. The caller throws the graph away when that changes."""
    global _recordings
    _recordings += 1
    try:
        yield
    finally:
        _recordings -= 1
