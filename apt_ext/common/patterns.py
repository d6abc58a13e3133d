"""Match names against regular expressions that may come from files of others, within bounded time.

A file can hold an expression such as (a|aa)+$, over which Python's own `re` would sit for years with the GIL held. What
is more than a name goes to the package `regex`, which transformers brings, because its matcher takes a time limit.
Without it `re` is what there is: then read no LoraConfig that you do not trust.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

SECONDS = 1.0  # for one expression and one name; real ones take microseconds
_NAMES = re.compile(r"\^?(?:[\w.-]|\\[.-])*")  # expressions over which nothing can take long


def checked_regex(name: str, value: str) -> str:
    """The expression, if it is one; ValueError naming it otherwise."""
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{name}: expected a regular expression, got {value!r:.200} ({error})") from None
    if not value:
        raise ValueError(f"{name}: expected a regular expression, got an empty string")
    return value


def matches(pattern: str, name: str) -> bool:
    """Whether the regular expression matches the whole name; ValueError where it takes too long to say."""
    return _matcher(pattern, pattern)(name)


def ends_with(pattern: str, name: str) -> bool:
    """Whether it matches the whole name or its end behind a dot (PEFT's rule for rank_pattern); ValueError likewise."""
    return _matcher(rf"(.*\.)?({pattern})$", pattern)(name)


@cache
def _matcher(expression: str, pattern: str) -> Callable[[str], bool]:
    """Whether `expression`, made of `pattern`, matches a name."""
    plain = re.compile(expression)
    if _NAMES.fullmatch(pattern) is not None:
        return lambda name: plain.fullmatch(name) is not None
    try:
        import regex
    except ImportError:
        return lambda name: plain.fullmatch(name) is not None
    bounded = regex.compile(expression)

    def found(name: str) -> bool:
        try:
            return bounded.fullmatch(name, timeout=SECONDS) is not None
        except TimeoutError:
            raise ValueError(
                f"expected a regular expression that is tried on a name within {SECONDS:g} seconds, got {pattern!r:.200}, "
                f"which was not done with {name!r:.100}; write it without repeats of what can be read in several ways, or "
                "list the names"
            ) from None

    return found
