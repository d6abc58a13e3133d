"""Where the commands write, which is asked before a run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..exporting.directories import check_target
from ..storage.atomic_dir import made
from ..storage.atomic_file import replace_file
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


def check_export(option: str, directory: Path) -> None:
    """Missing where `export` will refuse to write `directory`."""
    try:
        check_target(directory.absolute())
    except ValueError as error:
        raise Missing(f"{option}: {str(error).removeprefix('path: ')}") from error


def read_json(option: str, file: Path) -> dict[str, Any]:
    """The object in a file; Missing in words, which name the option, where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Missing(f"{option}: expected JSON in {file}, got {error}") from error
    if not isinstance(found, dict):
        raise Missing(f"{option}: expected an object in {file}, got {type(found).__name__}")
    return found


def replace_json(path: Path, value: Any, indent: int = 1) -> None:
    """Write a value as JSON, as `replace_file` does."""
    replace_file(path, (json.dumps(value, indent=indent) + "\n").encode())
