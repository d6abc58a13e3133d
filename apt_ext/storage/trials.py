"""What no row of the table knows of a class of transformers, found by making it on meta with the sizes that are left.

The rows that this package brings are tested for every class. A row that was registered is tried, and so are sizes of 0.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..common.checks import listed
from ..pruning.architectures.lookup import is_registered
from ..pruning.cut import lanes_for, left, parameter_changes, tell_config
from ..pruning.sizes import Sizes
from .shaped import shaped, widest


def stock_trial(model: nn.Module, sizes: Sizes) -> list[str]:
    """What the model's own class makes otherwise than it is needed where its config says `sizes`, in words; nothing: it fits."""
    if not _wanted(sizes):
        return []

    def made() -> nn.Module:
        config = copy.deepcopy(model.config)
        tell_config(config, sizes.blocks.row, sizes.blocks, sizes.widths)
        kind: Any = type(model)
        twin: nn.Module = kind(config)
        return twin

    return list(_differences(model, sizes, made))


def per_layer_trial(model: nn.Module, sizes: Sizes) -> list[str]:
    """The same of what `load_export` makes."""
    row = sizes.blocks.row
    if row is None or not _wanted(sizes):
        return []

    def made() -> nn.Module:
        config = copy.deepcopy(model.config)
        for field, width in widest(row, sizes).items():
            setattr(config, field, width)
        twin: nn.Module = shaped(type(model), config, row, sizes.counts, {})
        return twin

    return list(_differences(model, sizes, made))


def _wanted(sizes: Sizes) -> bool:
    row = sizes.blocks.row
    empty = any(width == 0 for found in sizes.widths.values() for width in found.values())
    return row is not None and (is_registered(row) or empty)


def _differences(model: nn.Module, sizes: Sizes, made: Any) -> Iterator[str]:
    kind = type(model).__name__
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the class says of its sizes is said when it is made for good
            twin = made()
            for module in twin.modules() if hasattr(twin, "_init_weights") else ():
                twin._init_weights(module)  # stock loading calls it, and T5's divides by its widths
    except (ValueError, ArithmeticError, AssertionError) as error:
        yield f"{kind} cannot be made with these sizes: {type(error).__name__}: {error}"
        return
    except Exception:  # a class's own code, which may need values that meta has not: the export will show it
        return
    blocks = sizes.blocks
    kept = {name: torch.arange(block.count, device="cpu") < sizes.counts[name] for name, block in blocks.items()}
    changes = parameter_changes(model, lanes_for(model, blocks, kept))
    theirs = dict(twin.named_parameters(remove_duplicate=False))
    wrong = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = theirs.get(name.replace(".base_layer.", "."))
        if other is not None and list(other.shape) != left(parameter, changes):
            wrong.append(f"{name} {list(other.shape)} instead of {left(parameter, changes)}")
    if wrong:
        yield f"{kind} makes of these sizes {listed(wrong, 4)}; the row of the table may lack what its config says"
