"""How errors are worded across layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import islice


def listed(names: Collection[str], most: int, between: str = ", ") -> str:
    """The first `most` names and how many more there are; "" for none."""
    more = len(names) - most
    return between.join(islice(names, most)) + (f" and {more} more" if more > 0 else "")


@contextmanager
def naming(name: str, kind: type[Exception] | None = None) -> Iterator[None]:
    """Worded errors within this context begin with `name`; with `kind` they become that, whatever they were."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        if kind is None and type(error) not in (ValueError, TypeError, RuntimeError):
            raise
        raise (kind or type(error))(f"{name}: {error}") from error
