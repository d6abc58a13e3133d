"""How errors are worded across layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def naming(name: str, kind: type[Exception] | None = None) -> Iterator[None]:
    """Worded errors within this context begin with `name`; with `kind` they become that, whatever they were."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        if kind is None and type(error) not in (ValueError, TypeError, RuntimeError):
            raise
        raise (kind or type(error))(f"{name}: {error}") from error
