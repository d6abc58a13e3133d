"""What the commands say on stderr: lines of their own, and warnings of the library."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches

from tqdm import tqdm

_PROGRAM = "apt-ext"
LIKELY_PERCENT = 5.0  # from here on a number where a share is expected is one of per cents
logger = logging.getLogger("apt_ext")


def say(text: str) -> None:
    """Print `text` in one line on stderr; nothing where stderr is closed."""
    with suppress(OSError):
        print(f"{_PROGRAM}: {' '.join(text.split())}", file=sys.stderr, flush=True)


def meant(word: str, names: Iterable[str]) -> str:
    """Ask whether the nearest of these names was meant; nothing where none is near."""
    near = get_close_matches(word, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def meant_share(percent: float, least: float = 0.0) -> str:
    """Ask whether the share of so many per cent was meant; nothing where there is none, or below `least`, from which on it is likely."""
    return f"; did you mean {percent / 100:g}?" if percent > 0.0 and least <= percent <= 100.0 else ""


class _Lines(logging.Handler):
    """Each record in one line on stderr, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
            tqdm.write(f"{_PROGRAM}: {level}{' '.join(record.getMessage().split())}", file=sys.stderr)
        except Exception:  # as all handlers of logging do
            self.handleError(record)


def log_to_stderr() -> logging.Handler:
    """Show the warnings of the logger "apt_ext" on stderr from now on; returns what shows them."""
    handler = _Lines(logging.WARNING)
    logger.addHandler(handler)
    return handler


@contextmanager
def steps_on_stderr() -> Iterator[None]:
    """Within this context, and where `warnings_on_stderr` is at work, what a run says of its steps (level INFO) is shown too."""
    shown = [handler for handler in logger.handlers if isinstance(handler, _Lines)]
    before = logger.level
    logger.setLevel(logging.INFO)
    for handler in shown:
        handler.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(before)
        for handler in shown:
            handler.setLevel(logging.WARNING)


@contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """The same within this context."""
    handler = log_to_stderr()
    try:
        yield
    finally:
        logger.removeHandler(handler)
