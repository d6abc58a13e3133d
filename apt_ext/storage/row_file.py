"""The row of the table in a directory that `load_export` reads: names of modules in the place of expressions.

A process that loads the directory need not have registered the row, and no expression from a file is ever run.
"""

from __future__ import annotations

import re
from dataclasses import asdict, fields
from typing import Any, get_type_hints

from torch import nn

from ..pruning.architectures.lookup import ends_with, find_layers, owners
from ..pruning.architectures.types import Architecture, BlockRule, Layers, Side, Stream

_EXPRESSIONS = ("adds", "reads", "norms", "keeps", "apart", "last_norm")


def written(row: Architecture, model: nn.Module) -> dict[str, Any]:
    """The row as plain values for JSON, with the names that its expressions match in this model."""
    modules = dict(model.named_modules())
    stacks: dict[tuple[str, str, str], Layers] = {}
    for layer in find_layers(modules, row):
        stacks[layer.before, layer.after, layer.stack] = layer.layers
    found: dict[str, Any] = {
        "derives_head_size": row.derives_head_size,
        "layers": [
            {"before": before, "after": after, "prefix": stack, "blocks": [asdict(rule) for rule in layers.blocks]}
            for (before, after, stack), layers in stacks.items()
        ],
        "stream": None,
    }
    if row.stream is not None:
        names = [name for name, _ in owners(modules)]
        found["stream"] = asdict(row.stream) | {
            field: [name for name in names if ends_with(getattr(row.stream, field), name)] for field in _EXPRESSIONS
        }
    return found


def read(said: Any) -> Architecture:
    """The row that `written` wrote. ValueError for anything else."""
    said = _object("row", said, ("derives_head_size", "layers", "stream"))
    layers = []
    for one in _list("layers", said["layers"]):
        one = _object("layers", one, ("before", "after", "prefix", "blocks"))
        before, after = _text("before", one["before"]), _text("after", one["after"])
        rules = tuple(_rule(rule) for rule in _list("blocks", one["blocks"]))
        layers.append(Layers(rf"{re.escape(before)}(\d+){re.escape(after)}", rules, _text("prefix", one["prefix"])))
    stream = said["stream"]
    if stream is not None:
        stream = _object("stream", stream, [field.name for field in fields(Stream)])
        matched = {field: "|".join(re.escape(_text(field, name)) for name in _list(field, stream[field])) for field in _EXPRESSIONS}
        stream = _filled(Stream, {**stream, **matched})
    if not isinstance(said["derives_head_size"], bool):
        raise ValueError(f'expected "derives_head_size" to be true or false, got {said["derives_head_size"]!r:.100}')
    return Architecture((), tuple(layers), stream, derives_head_size=said["derives_head_size"])


def _rule(said: Any) -> BlockRule:
    said = _object("blocks", said, [field.name for field in fields(BlockRule)])
    sides = tuple(_filled(Side, _object("sides", side, [field.name for field in fields(Side)])) for side in _list("sides", said["sides"]))
    for side in sides:
        if side.side not in ("in", "out") or not 0 <= side.part < side.parts:
            raise ValueError(f'expected "sides" that are "in" or "out", each a part of its parts, got {side!r:.200}')
    names = {name: tuple(_text(name, each) for each in _list(name, said[name])) for name in ("counts", "totals")}
    rule: BlockRule = _filled(BlockRule, {**said, **names, "sides": sides})
    if rule.kind not in ("heads", "neurons") or not any(s.scales for s in sides) or not any(s.side == "in" for s in sides):
        raise ValueError(f'expected "blocks" of heads or neurons with a side that scales and an input, got {rule!r:.200}')
    return rule


def _filled(kind: Any, values: dict[str, Any]) -> Any:
    """A dataclass of plain values, each of the type that it declares."""
    for name, hint in get_type_hints(kind).items():
        wanted = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}.get(hint)
        if wanted is not None and type(values[name]) not in wanted:
            raise ValueError(f'expected "{name}" to be {hint.__name__}, got {values[name]!r:.100}')
    if not isinstance(values.get("name"), str | None):
        raise ValueError(f'expected "name" to be a text or null, got {values["name"]!r:.100}')
    return kind(**values)


def _object(what: str, value: Any, keys: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or sorted(value) != sorted(keys):
        raise ValueError(f'expected "{what}" with {", ".join(keys)}, got {value!r:.200}')
    return value


def _list(what: str, value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError(f'expected "{what}" to be a list, got {value!r:.100}')
    return list(value)


def _text(what: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f'expected "{what}" to be text, got {value!r:.100}')
    return value
