"""A state of nested dicts and lists, of tensors and plain values, as a directory: the tensors as safetensors, the rest as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from ..common.checks import checked_path, error_prefix
from . import atomic_dir, nested, tensor_file

VALUES_FILE = "controller.json"
TENSORS_FILE = "controller.safetensors"
MANIFEST_FILE = "controller_manifest.json"
_FORMAT = 1
_MOST_TEXT = 1 << 26  # bytes of the JSON: it has a history
_MOST_TENSORS = 1 << 30  # bytes


def save(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write `state` into the directory `path`, which is made if it is missing; other files there stay. ValueError where it is a file."""
    from safetensors.torch import save as serialize

    directory = checked_path(path)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"path: expected a directory or a missing one, got a file: {directory}")
    plain, tensors = nested.split(state)
    text = json.dumps({"format": _FORMAT, "state": plain}) + "\n"
    with atomic_dir.made(directory), atomic_dir.stage(directory, MANIFEST_FILE) as new:
        (new / TENSORS_FILE).write_bytes(serialize(tensors, {"format": "pt"}))
        (new / VALUES_FILE).write_text(text, encoding="utf-8")
        atomic_dir.seal(new, MANIFEST_FILE)
        atomic_dir.commit(new, directory, MANIFEST_FILE, (VALUES_FILE, TENSORS_FILE))


def load(path: str | os.PathLike[str], take: Callable[[dict[str, Any]], None]) -> None:
    """Call `take` with the state that `save` wrote.

    ValueError naming the file that is missing or damaged, or whose values `take` refuses.
    """
    directory = checked_path(path)
    with atomic_dir.opened(directory, MANIFEST_FILE, (VALUES_FILE, TENSORS_FILE)) as files:
        values, stored = files[VALUES_FILE], files[TENSORS_FILE]
        with error_prefix(str(stored.path), ValueError):
            if stored.size > _MOST_TENSORS:
                raise ValueError(f"expected at most {_MOST_TENSORS} bytes, got {stored.size}")
            tensors = tensor_file.read(stored, {"": stored.size})
        with error_prefix(str(values.path), ValueError):
            found = values.json(_MOST_TEXT)
            if found.get("format") != _FORMAT:
                raise ValueError(f'expected "format": {_FORMAT}, which this version of apt_ext reads, got {found.get("format")!r}')
            take(nested.joined(found.get("state"), tensors))
