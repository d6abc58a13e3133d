"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Write a file aside, have it on the disk, and put it in its place in one step."""
    replace_files({path: content})


def replace_files(contents: Mapping[Path, bytes]) -> None:
    """The same for several: all are on the disk before the first takes its place, in their order."""
    aside = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in contents}
    try:
        for path, content in contents.items():
            with aside[path].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, written in aside.items():
            written.replace(path)
    except BaseException:
        for written in aside.values():
            written.unlink(missing_ok=True)
        raise
