"""What a directory for a cut model can look like, and in words why it cannot: shared by the plan before training and the export after.

stock        the model's own class of transformers
retyped      another class that computes the same from the same tensors and whose config says more (LLaMA as Mistral)
per layer    the stock class with widths of their own in every layer, which only `apt_ext.load_export` reads
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .architectures import Architecture, architecture_of, find_blocks
from .cutting import widths

Widths = dict[str, dict[str, int]]  # see `cutting.widths`


@dataclass(frozen=True)
class Sizes:
    """What a config has to say: the widths of every block by its entry, and how many channels a head has (0: no heads)."""

    widths: Widths
    head_size: int

    @classmethod
    def of(cls, model: nn.Module) -> Sizes:
        """Those of a model as it is."""
        return cls(widths(model), next((block.size for block in find_blocks(model).values() if block.kind == "heads"), 0))


def stock_failures(row: Architecture | None, config: Any, sizes: Sizes) -> list[str]:
    """Which constraints keep the config of the model's own class from saying these sizes, with a width that would pass."""
    return [] if row is None else list(_failures(row, config, sizes))


def _failures(row: Architecture, config: Any, sizes: Sizes) -> Iterator[str]:
    name = type(config).__name__
    yield from _for_any(name, sizes)
    heads, hidden = _common(sizes, "num_attention_heads"), _common(sizes, "hidden_size")
    hidden = getattr(config, "hidden_size", None) if hidden is None else hidden
    if not heads or hidden is None or not sizes.head_size:
        return
    groups = _common(sizes, "num_key_value_heads")
    step = heads // groups if groups else 1
    if row.derives_head_size and heads * sizes.head_size != hidden:
        fitting = [f"hidden_size {heads * sizes.head_size} with these heads"]
        if hidden % sizes.head_size == 0:
            fitting.insert(0, f"{hidden // sizes.head_size} heads in every layer")
        yield (
            f"{name} makes heads of hidden_size / num_attention_heads channels, got {heads} heads of {sizes.head_size} channels in a "
            f"hidden_size of {hidden}; {' or '.join(fitting)} would pass"
        )
    elif row.heads_divide and hidden % heads:
        fewer = next((n for n in range(heads, 0, -1) if n % step == 0 and hidden % n == 0), None)
        passing = f"; {fewer} heads would pass" if fewer else ""
        yield f"num_attention_heads of {name} must divide hidden_size, got {heads} and {hidden}{passing}"


def retype_failures(row: Architecture | None, config: Any, sizes: Sizes) -> list[str]:
    """Which constraints keep the row's other class from saying these sizes."""
    if row is None or row.retype is None:
        return ["no other class of transformers computes the same"]
    kind, forbidden = row.retype
    found = [f"{kind} models have no {field.removesuffix('_bias')} bias" for field in forbidden if getattr(config, field, False)]
    return found + list(_for_any(f"{kind.capitalize()}Config", sizes))


def _for_any(name: str, sizes: Sizes) -> Iterator[str]:
    """What no config can say; `name` is that of the config's class."""
    for field, found in sizes.widths.items():
        if len(set(found.values())) > 1:
            yield (
                f"one width for all layers is all that {field} of {name} can say of them, got {_listed(found)}; "
                f"{max(min(found.values()), 1)} in every layer would pass"
            )
    if _common(sizes, "num_attention_heads") == 0:
        yield f"num_attention_heads of {name} cannot be 0; one head in every layer would pass"


def allowed(model: nn.Module, sizes: Sizes) -> dict[str, list[str]]:
    """{"stock", "retyped" or "per layer": what stands against it, in words; nothing where it can be written}."""
    row, config = architecture_of(model), getattr(model, "config", None)
    found = {"stock": stock_failures(row, config, sizes)}
    if row is not None and row.retype is not None:
        found["retyped"] = retype_failures(row, config, sizes)
    found["per layer"] = [] if row is not None else ["the architecture is not in the table"]
    return found


def _common(sizes: Sizes, field: str) -> int | None:
    """The width that all blocks of an entry have, or None."""
    found = set(sizes.widths.get(field, {}).values())
    return found.pop() if len(found) == 1 else None


def _listed(found: dict[str, int]) -> str:
    shown = [f"{name}: {width}" for name, width in found.items()]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
