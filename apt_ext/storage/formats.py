"""What a directory for a cut model can look like, and in words why it cannot: shared by the plan before training and the export after.

stock        the model's own class of transformers
retyped      another class that computes the same from the same tensors and whose config says more (LLaMA as Mistral)
per layer    the stock class with widths of their own in every layer, which only `apt_ext.load_export` reads

The constraints that the row of the table knows are here; `trials` finds those that it does not know.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..common.checks import listed
from ..pruning.architectures.lookup import Architecture
from ..pruning.sizes import Sizes
from .shaped import unknown_entries
from .trials import per_layer_trial, stock_trial


def stock_failures(config: Any, sizes: Sizes) -> list[str]:
    """Which constraints keep the config of the model's own class from saying these sizes, with a width that would pass."""
    return [] if sizes.blocks.row is None else list(_failures(sizes.blocks.row, config, sizes))


def _failures(row: Architecture, config: Any, sizes: Sizes) -> Iterator[str]:
    name, (entry, hidden) = type(config).__name__, sizes.hidden
    yield from _for_any(name, sizes)
    for field, size in sizes.heads.items():
        heads = sizes.common(field)
        if not heads or hidden is None:
            continue
        if row.derives_head_size and heads * size != hidden:
            fitting = [f"{entry} {heads * size} with these heads"]
            if hidden % size == 0:
                fitting.insert(0, f"{hidden // size} heads in every layer")
            yield (
                f"{name} makes heads of {entry} / {field} channels, got {heads} heads of {size} channels in a {entry} of {hidden}; "
                f"{' or '.join(fitting)} would pass"
            )
        elif row.heads_divide and hidden % heads:
            step = sizes.shared(field)
            fewer = next((n for n in range(heads, 0, -1) if n % step == 0 and hidden % n == 0), None)
            passing = f"; {fewer} heads would pass" if fewer else ""
            yield f"{field} of {name} must divide {entry}, got {heads} and {hidden}{passing}"


def allowed(model: nn.Module, sizes: Sizes) -> dict[str, list[str]]:
    """{"stock", "retyped" or "per layer": what stands against it, in words; nothing where it can be written}.

    sizes  those of the model, or those that it will have
    """
    row, config, kind = sizes.blocks.row, getattr(model, "config", None), type(model)
    if kind.__module__.partition(".")[0] != "transformers":
        other = [f"{kind.__module__}.{kind.__name__} is no class of transformers, which others can load"]
        return {name: other for name in ("stock", "per layer")}
    found = {"stock": stock_refusals(model, sizes)}
    if row is not None and row.retype is not None:
        found["retyped"] = retype_failures(config, sizes)
    found["per layer"] = per_layer_refusals(model, sizes)
    return found


def stock_refusals(model: nn.Module, sizes: Sizes) -> list[str]:
    """What keeps a stock directory of the model's own class from saying these sizes, found by the row or by trial."""
    config: Any = getattr(model, "config", None)
    found = stock_failures(config, sizes) or stock_trial(model, sizes)
    return [*unknown_entries(config, sizes), *found] if found else []


def per_layer_refusals(model: nn.Module, sizes: Sizes) -> list[str]:
    """The same of a directory whose layers have widths of their own."""
    if sizes.blocks.row is None:
        return ["the architecture is not in the table"]
    return unknown_entries(getattr(model, "config", None), sizes) or per_layer_trial(model, sizes)


def retype_failures(config: Any, sizes: Sizes) -> list[str]:
    """Which constraints keep the row's other class from saying these sizes."""
    row = sizes.blocks.row
    if row is None or row.retype is None:
        return ["no other class of transformers computes the same"]
    kind, forbidden = row.retype
    found = [f"{kind} models have no {field.removesuffix('_bias')} bias" for field in forbidden if getattr(config, field, False)]
    return found + list(_for_any(f"{kind.capitalize()}Config", sizes))


def _for_any(name: str, sizes: Sizes) -> Iterator[str]:
    """What no config can say; `name` is that of the config's class."""
    for field, found in sizes.widths.items():
        if len(set(found.values())) > 1:
            shown = listed([f"{name}: {width}" for name, width in found.items()], 8)
            yield (
                f"one width for all layers is all that {field} of {name} can say of them, got {shown}; "
                f"{max(min(found.values()), 1)} in every layer would pass"
            )
    for field in sizes.heads:
        if sizes.common(field) == 0:
            yield f"{field} of {name} cannot be 0; one head in every layer would pass"
