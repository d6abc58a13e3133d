"""A state of nested dicts and lists, of tensors and plain values, as a directory: the tensors as safetensors, the rest as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..common.checks import checked_path, error_prefix
from . import atomic_dir, tensor_file

VALUES_FILE = "controller.json"
TENSORS_FILE = "controller.safetensors"
MANIFEST_FILE = "controller_manifest.json"
_FORMAT = 1
_TENSOR = "tensor"  # {this: name} stands in the JSON where a tensor does in the state
_MOST_TEXT = 1 << 26  # bytes of the JSON: it has a history
_MOST_TENSORS = 1 << 30  # bytes


def save(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write `state` into the directory `path`, which is made if it is missing; other files there stay. ValueError where it is a file."""
    from safetensors.torch import save as serialize

    directory = checked_path(path)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"path: expected a directory or a missing one, got a file: {directory}")
    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().contiguous().clone()
            return {_TENSOR: name}
        if isinstance(value, Mapping):
            return {"dict": [[key, plain(one)] for key, one in value.items()]}
        return [plain(one) for one in value] if isinstance(value, list | tuple) else value

    text = json.dumps({"format": _FORMAT, "state": plain(state)}) + "\n"
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
            state = _state(found.get("state"), tensors)
            if not isinstance(state, dict):
                raise ValueError(f'expected "state" to be a dict, got {type(state).__name__}')
            take(state)


def _state(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_state(one, tensors) for one in value]
    if not isinstance(value, dict):
        return value
    if isinstance(name := value.get(_TENSOR), str) and name in tensors and len(value) == 1:
        return tensors[name]
    entries = value.get("dict")
    if (
        len(value) != 1
        or not isinstance(entries, list)
        or any(not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str) for entry in entries)
    ):
        raise ValueError(f"expected a dict or the name of a tensor, got {str(value)[:80]}")
    return {key: _state(one, tensors) for key, one in entries}
