"""How fast GPUs are, as numbers that a step is predicted from: a table that says where each is from, or a user's own."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ...common.checks import checked_number

TABLE = Path(__file__).with_name("rates.json")
_WHOLE = "gpus_per_node"  # the one rate that is a count
_LIKE = "like"  # the entry of a user's table that names the GPU from which it takes what it does not say


@dataclass(frozen=True)
class Rates:
    """One GPU, and how several of them are joined.

    memory               bytes of it that a process may allocate
    workspace            bytes that the library of products holds for itself
    matmul               operations a second of large products of 16-bit matrices
    attention_forward    operations a second of a fused attention (causal: half of the pairs count)
    attention_backward   and of its backward
    dropped_forward      the same of an attention with dropout
    dropped_backward     and of its backward
    bandwidth            bytes a second, read and written, of a kernel that torch vectorises
    unvectorised         entries a second of a kernel that torch does not vectorise
    low_rank             bytes a second of the passes that read x and write y of an adapter
    token_sums           bytes a second of the passes that make its factors' gradients
    kernel               seconds that a kernel takes beside its work: its start, filling and draining
    launch               seconds of the host for each kernel of an eager step
    recompute            seconds of the host for each layer that checkpointing computes again, beside its kernels
    gpus_per_node        GPUs that are joined within a machine
    link                 bytes a second that a GPU receives from others of its machine
    network              bytes a second that a machine receives from others
    """

    name: str
    memory: float
    workspace: float
    matmul: float
    attention_forward: float
    attention_backward: float
    dropped_forward: float
    dropped_backward: float
    bandwidth: float
    unvectorised: float
    low_rank: float
    token_sums: float
    kernel: float
    launch: float
    recompute: float
    gpus_per_node: float
    link: float
    network: float
    sources: dict[str, str] = field(default_factory=dict)


KEYS = tuple(one.name for one in fields(Rates) if one.name not in ("name", "sources"))


def known() -> dict[str, dict[str, dict[str, Any]]]:
    """The table that comes with the package: {GPU: {rate: {"value", "from"}}}."""
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(TABLE.read_text())
    return found


def rates_of(given: str | os.PathLike[str] | Mapping[str, Any] | None) -> Rates:
    """The rates of a GPU by its name (None: H200), of a JSON file, or of a mapping.

    A file or mapping holds {rate: number, or {"value": number, "from": where it comes from}} and may name the GPU that
    it is "like": the rest is taken from there (H200 where it names none). TypeError for what is none of these;
    ValueError for a name, rate or number that is none, and a file that cannot be read.
    """
    table = known()
    if given is None:
        given = next(iter(table))
    if isinstance(given, str | os.PathLike):
        text = os.fspath(given)
        name = next((one for one in table if one.lower() == text.lower()), None)
        if name is not None:
            return _made(name, table[name])
        given, called = _read(text, tuple(table)), Path(text).name
    elif isinstance(given, Mapping):
        called = "own rates"
    else:
        raise TypeError(f"rates: expected the name of a GPU, a JSON file or a mapping, got {type(given).__name__}")
    like = given.get(_LIKE, next(iter(table)))
    if not isinstance(like, str) or like not in table:
        raise ValueError(f"rates: expected {_LIKE} to be one of {', '.join(table)}, got {like!r}")
    own = {key: _entry(key, value) for key, value in given.items() if key != _LIKE}
    return _made(called, {**table[like], **own})


def _read(text: str, names: tuple[str, ...]) -> Mapping[str, Any]:
    path = Path(text)
    if not path.is_file():
        raise ValueError(f"rates: expected {', '.join(names)} or a JSON file, got {text!r}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"rates: expected a JSON file, got {text!r} ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"rates: expected an object of rates in {text!r}, got {type(found).__name__}")
    return found


def _entry(key: Any, value: Any) -> dict[str, Any]:
    if key not in KEYS:
        near = get_close_matches(str(key), KEYS, 1) or KEYS
        raise ValueError(f"rates: expected names of {', '.join(KEYS)}, got {key!r}; the nearest is {near[0]}")
    entry = dict(value) if isinstance(value, Mapping) else {"value": value}
    if "value" not in entry or entry.keys() - {"value", "from"}:
        raise ValueError(f"rates[{key!r}]: expected a number, or value and from, got {value!r}")
    number = checked_number(f"rates[{key!r}]", entry["value"], 0)
    if number <= 0:
        raise ValueError(f"rates[{key!r}]: expected a number above 0, got {number:g}")
    if key == _WHOLE and not number.is_integer():
        raise ValueError(f"rates[{key!r}]: expected a whole number of at least 1, got {number:g}")
    return {"value": number, "from": str(entry.get("from", "given"))}


def _made(name: str, table: Mapping[str, Mapping[str, Any]]) -> Rates:
    return Rates(name, **{key: float(table[key]["value"]) for key in KEYS}, sources={key: str(table[key]["from"]) for key in KEYS})
