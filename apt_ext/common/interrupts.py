"""Interrupts that wait while several things are changed together."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def held() -> Iterator[None]:
    """Within this context a signal that would raise in the main thread (Ctrl+C: KeyboardInterrupt) waits for the end of it.

    Only handlers written in Python wait, which are those that can raise. In another thread, where none raises, nothing changes.
    """
    if current_thread() is not main_thread():
        yield
        return
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = {number: handler for number in _ENDING if callable(handler := signal.getsignal(number))}
    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for asked in dict.fromkeys(came):
            signal.raise_signal(asked)
