"""Whether a row of the table speaks of everything in a model that a cut would have to change.

A width tells nothing by itself: a norm over the residual stream is often as wide as what Q puts out. So a model of a registered row,
and one with Parameters of a cut width that the row does not name, is cut to half of its blocks on meta and run there.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import nn

from ..common.checks import listed
from .architectures.lookup import (
    Architecture,
    Block,
    Blocks,
    find_blocks,
    find_layers,
    is_registered,
    owners,
    role,
    side_width,
)
from .cut import lanes_for, parameter_changes, replace_parameters, tell_blocks, tell_modules
from .on_meta import inputs_for, on_meta


def check_row(model: nn.Module, found: Blocks) -> None:
    """ValueError naming the Parameters, with their shapes, that the row of a stock model has to name and does not.

    The model is not changed. Where it cannot be run on meta, those count that lie in the module of the attention and are
    as wide as one of its sides.
    """
    row = found.row
    if row is None:
        return
    blocks = {name: block for name, block in found.items() if block.kind != "hidden" and block.count}
    for name, block in blocks.items():
        for side in block.sides:
            width = side_width(model.get_submodule(side.module), side.side)
            if width % (block.count * side.parts):
                raise ValueError(
                    f"register_architecture: expected sides of {name!r} to have a multiple of {block.count * side.parts} channels, got "
                    f"{width} on the {side.side!r} side of {side.module}"
                )
    unnamed = dict(_unnamed(model, row, blocks))
    if not unnamed and not is_registered(row):
        return
    error = _error_of_a_cut(model, row)
    if error is None:
        unnamed = {name: block for name, block in unnamed.items() if _is_certain(model, name, blocks[block])}
        error = "each is as wide as what a cut makes narrower" if unnamed else ""
    likely = {name: block for name, block in unnamed.items() if _is_likely(model, name, blocks[block])}
    if error:
        raise ValueError(_message(model, row, likely or unnamed, error))


def _message(model: nn.Module, row: Architecture, found: dict[str, str], error: str) -> str:
    kind = getattr(model.config, "model_type", row.model_types[0])
    shapes = {name: f"{name} {list(model.get_parameter(name).shape)} (block {block!r})" for name, block in found.items()}
    shown = listed(shapes.values(), 4)
    if not found:
        return (
            f"model: expected the row of {kind!r} to describe all that a cut changes, but with half of its blocks this "
            f"{type(model).__name__} does not run: {error}; compare the row's sides, counts and totals with the class"
        )
    return (
        f"model: expected the row of {kind!r} to name every Parameter that is cut with a block, but it does not name {shown}: {error}; "
        "add a Side for each linear, embedding or norm to the rule of its block (what lies in no such module cannot be cut)"
    )


def _unnamed(model: nn.Module, row: Architecture, blocks: dict[str, Block]) -> Iterator[tuple[str, str]]:
    """(Parameter, block): those that no side names, with a dimension as long as a side of the block, or as it has heads."""
    modules = dict(model.named_modules())
    named = {side.module for block in blocks.values() for side in block.sides}
    inside = {f"{layer.name}.": f"{layer.stack}{layer.number}." for layer in find_layers(modules, row)}
    widths = {name: set(_cut_widths(model, block)) for name, block in blocks.items()}
    for name, module in owners(modules):
        if name in named or (row.stream is not None and role(row.stream, name) not in (None, "apart")):
            continue
        layer = next((names for path, names in inside.items() if name.startswith(path)), None)
        for entry, parameter in module.named_parameters(recurse=False):
            for block, cut in widths.items():
                if layer is not None:
                    fits = f"{blocks[block].stack}{blocks[block].layer}." == layer and bool(cut & set(parameter.shape))
                else:  # a table that all layers share
                    fits = blocks[block].kind == "heads" and bool(_heads(model, blocks[block]) & set(parameter.shape))
                if fits:
                    yield f"{name}.{entry}" if name else entry, block
                    break


def _heads(model: nn.Module, block: Block) -> set[int]:
    return {block.count, side_width(model.get_submodule(block.reader), "in") // block.size} - {1}


def _cut_widths(model: nn.Module, block: Block) -> Iterator[int]:
    yield from (side_width(model.get_submodule(side.module), side.side) // side.parts for side in block.sides)
    if block.kind == "heads":
        yield from _heads(model, block)


def _is_likely(model: nn.Module, name: str, block: Block) -> bool:
    """Whether a Parameter lies in the owner of the block, or is as long as there are heads."""
    inside = bool(block.owner) and name.startswith(f"{block.owner}.")
    return inside or (block.kind == "heads" and bool(_heads(model, block) & set(model.get_parameter(name).shape)))


def _is_certain(model: nn.Module, name: str, block: Block) -> bool:
    """Whether a Parameter lies in the owner of the block and is one row as long as a side: such as a norm over all heads."""
    shape = model.get_parameter(name).shape
    return bool(block.owner) and name.startswith(f"{block.owner}.") and len(shape) == 1 and shape[0] in set(_cut_widths(model, block))


def _error_of_a_cut(model: nn.Module, row: Architecture) -> str | None:
    """What the model says when it is run with half of its heads and neurons; "" where it runs, None where it does not run uncut either."""
    try:
        twin, inputs = on_meta(model), inputs_for(model)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twin(**inputs)
    except Exception:  # any model's own code, which may need values that meta has not
        return None
    blocks = find_blocks(twin, row)
    kept = {
        name: torch.arange(block.count, device="cpu") < (block.count if block.kind == "hidden" else -(-block.count // 2))
        for name, block in blocks.items()
    }
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lanes = lanes_for(twin, blocks, kept)
            replace_parameters(twin, parameter_changes(twin, lanes))
            tell_modules(twin, lanes)
            tell_blocks(twin, row)
            twin(**inputs)
    except Exception as error:  # the same
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return ""
