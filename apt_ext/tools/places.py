"""Where the commands write: asked before a run, which would otherwise be for nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..disk import made
from .data import Missing


@contextmanager
def directory_for(option: str, directory: Path) -> Iterator[None]:
    """`directory` is there, with its parents, and can be written in; those that were made go again, if empty, when the context raises.

    Missing in words, which name the option, where it cannot.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(made(directory))
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError as error:
            raise Missing(f"{option}: expected a directory to write in, got {str(directory)!r}: {error.strerror}") from error
        yield


@contextmanager
def directory_of(option: str, file: Path) -> Iterator[None]:
    """The same for the directory of a file, which must be none itself."""
    if file.is_dir():
        raise Missing(f"{option}: expected a file's name, got the directory {str(file)!r}")
    with directory_for(option, file.parent):
        yield
