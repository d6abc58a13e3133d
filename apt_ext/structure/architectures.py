"""The architectures that can be pruned, as a table of names: a new one is a row, and nothing else changes.

A block is what is removed whole, such as the neurons of one feed-forward layer. Its mask acts on sides of linears: the output of the ones
that produce the block's channels, the input of the ones that consume them. Imports only torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from torch import nn


@dataclass(frozen=True)
class Side:
    """One side of a linear on which a block's mask acts.

    linear  its name: within the layer in the table, within the model in a Block
    side    "in" (columns of the weight) or "out" (its rows, and the bias)
    scales  a fractional value of the mask acts on this side, the only one of the block; every other side gets the exact zeros alone
    """

    linear: str
    side: str
    scales: bool = False


@dataclass(frozen=True)
class BlockRule:
    """How one kind of block looks in each layer; `width_field` is the entry of the model's config that says its width."""

    kind: str
    width_field: str
    sides: tuple[Side, ...]


@dataclass(frozen=True)
class Architecture:
    """One row of the table. `layers` matches the name of a layer from the root of any stock class; its group is the layer's number."""

    model_type: str
    layer_class: str
    layers: str
    blocks: tuple[BlockRule, ...]


ARCHITECTURES = (
    Architecture(
        model_type="bert",
        layer_class="BertLayer",
        layers=r"(?:bert\.)?encoder\.layer\.(\d+)",
        blocks=(BlockRule("neurons", "intermediate_size", (Side("intermediate.dense", "out"), Side("output.dense", "in", scales=True))),),
    ),
)

# What stock classes call a head that training starts from scratch: children of the model itself, which train whole unless told otherwise.
TASK_HEADS = ("classifier", "score", "qa_outputs")


@dataclass(frozen=True)
class Block:
    """One block of one model.

    kind         "neurons"
    count        how many there are: the length of the block's mask
    sides        where the mask acts, with the linears' names in the model
    width_field  the entry of the model's config that says `count`, one for all layers
    """

    kind: str
    count: int
    sides: tuple[Side, ...]
    width_field: str

    @property
    def linears(self) -> tuple[str, ...]:
        """The names of the linears that the block touches, as before wrapping."""
        return tuple(dict.fromkeys(side.linear for side in self.sides))

    @property
    def scaling_side(self) -> Side:
        """The side that carries the whole mask, fractions included."""
        return next(side for side in self.sides if side.scales)


def architecture_of(model: nn.Module) -> Architecture | None:
    """The row for this model, by its `config.model_type`; None for one that is not in the table."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return next((row for row in ARCHITECTURES if row.model_type == model_type), None)


def task_heads(model: nn.Module) -> list[str]:
    """The names of the model's task heads."""
    return [name for name, _ in model.named_children() if name in TASK_HEADS]


def output_layer(model: nn.Module) -> str | None:
    """The name of the layer that turns hidden states into tokens, by transformers' own `get_output_embeddings`."""
    get = getattr(model, "get_output_embeddings", None)
    layer = get() if callable(get) else None
    return next((name for name, module in model.named_modules() if module is layer), None) if layer is not None else None


def find_blocks(model: nn.Module) -> dict[str, Block]:
    """The blocks of a model, in order of its layers, named "<layer>.<kind>"; empty for an architecture that is not in the table."""
    row = architecture_of(model)
    blocks: dict[str, Block] = {}
    if row is None:
        return blocks
    for name, layer in model.named_modules():
        found = re.fullmatch(row.layers, name)
        if found is None or type(layer).__name__ != row.layer_class:
            continue
        for rule in row.blocks:
            sides = tuple(replace(side, linear=f"{name}.{side.linear}") for side in rule.sides)
            block = Block(rule.kind, 0, sides, rule.width_field)
            blocks[f"{found[1]}.{rule.kind}"] = replace(block, count=_count(model, block.scaling_side))
    return blocks


def widths(model: nn.Module) -> dict[str, dict[str, int]]:
    """{entry of the config: {block: its width in this model}}: a stock config can say it only where all widths of an entry are equal."""
    found: dict[str, dict[str, int]] = {}
    for name, block in find_blocks(model).items():
        found.setdefault(block.width_field, {})[name] = block.count
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer in the sense of `APTAdapter.from_linear`, or a quantised one, which that refuses by name."""
    return isinstance(module, nn.Linear) or _stores_transposed(module)


def weight_dim(linear: nn.Module, side: str) -> int:
    """The dimension of `linear.weight` that runs along its "in" or "out" side."""
    return int((side == "in") != _stores_transposed(linear))


def _stores_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def _count(model: nn.Module, side: Side) -> int:
    linear = model.get_submodule(side.linear)
    weight = linear.weight
    return int(weight.shape[weight_dim(linear, side.side)]) if isinstance(weight, nn.Parameter) else 0
