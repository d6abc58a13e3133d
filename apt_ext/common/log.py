"""Advice that is given once in a process."""

from __future__ import annotations

import logging

logger = logging.getLogger("apt_ext")
_given: set[str] = set()


def advise(about: str, text: str, *values: object) -> None:
    """Log `text` as a warning, and what comes later `about` the same on the level INFO: it tells the user nothing new."""
    logger.log(logging.INFO if about in _given else logging.WARNING, text, *values)
    _given.add(about)


def forget(about: str) -> None:
    """The next one is a warning again."""
    _given.discard(about)
