"""Which number belongs to which layer: what blocks keep, and the ranks of adapters, as panels with a row for each layer.

A panel is plain values: {"stack": "" or "encoder", "layers": [number], "columns": [title], "cells": [row]}, a cell
None where the layer has no such thing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..pruning.architectures.lookup import Blocks, find_layers
from ..pruning.sizes import Sizes

Panel = dict[str, Any]


def kept_panels(model: nn.Module, blocks: Blocks, kept: Mapping[str, int]) -> list[Panel]:
    """What the blocks of each layer keep: cells are {"kept": number, "of": number before the first cut}."""
    full, panels = blocks.full, _Panels()
    shared = share_keys(model, blocks)
    for name, block in blocks.items():
        if block.layer >= 0:
            title = block.part.replace("_", " ")
            column = f"{title} (KV groups)" if shared and block.kind == "heads" else title
            panels.put(block.stack, block.layer, column, {"kept": kept[name], "of": full[name]})
    return panels.filled()


def share_keys(model: nn.Module, blocks: Blocks) -> bool:
    """Whether several query heads share keys, so that a block of heads counts groups of them."""
    sizes = Sizes.of(model, blocks)
    return any(sizes.shared(field) > 1 for field in sizes.groups)


def rank_panels(model: nn.Module, blocks: Blocks, ranks: Mapping[str, int]) -> tuple[list[Panel], dict[str, int]]:
    """The ranks of the adapters in layers, cells are ranks; and {name: rank} of those that lie in none."""
    layers = find_layers(dict(model.named_modules()), blocks.row) if blocks.row is not None else []
    panels, outside = _Panels(), {}
    for name, rank in ranks.items():
        layer = next((layer for layer in layers if name.startswith(f"{layer.name}.")), None)
        if layer is None:
            outside[name] = rank
        else:
            panels.put(layer.stack, layer.number, name.removeprefix(f"{layer.name}."), rank)
    found = panels.filled()
    for panel in found:
        panel["columns"] = short_names(panel["columns"])
    return found, outside


def short_names(names: list[str]) -> list[str]:
    """The shortest ends of dotted names that tell each from the others: "query", "output.dense"."""
    short = []
    for name in names:
        parts = name.split(".")
        ends = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        others = [other for other in names if other != name]
        short.append(next((end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)), name))
    return short


class _Panels:
    """Cells as they come, by stack, column and layer."""

    def __init__(self) -> None:
        self._stacks: dict[str, dict[str, dict[int, Any]]] = {}

    def put(self, stack: str, layer: int, column: str, cell: Any) -> None:
        self._stacks.setdefault(stack.strip("."), {}).setdefault(column, {})[layer] = cell

    def filled(self) -> list[Panel]:
        panels = []
        for stack, columns in self._stacks.items():
            layers = sorted({layer for cells in columns.values() for layer in cells})
            cells = [[column.get(layer) for column in columns.values()] for layer in layers]
            panels.append({"stack": stack, "layers": layers, "columns": list(columns), "cells": cells})
        return panels
