"""Which row of the table describes a model, and the blocks that it has by that row.

A block is what is removed whole: the heads of one attention, the neurons of one feed-forward layer, the dimensions of the residual stream.
Its mask acts on sides of modules: the output of the ones that produce the block's channels, the input of the ones that consume them.
Imports only torch. `register_architecture` adds rows.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from .origin import Origin
from .table import ARCHITECTURES, TASK_HEADS
from .types import Architecture, Block, BlockRule, Layers, Side, Stream

__all__ = ["ARCHITECTURES", "TASK_HEADS", "Architecture", "Block", "BlockRule", "Layers", "Side", "Stream"]


_OWN_ROWS = tuple(ARCHITECTURES)

ROLES = {"heads": ("q", "k", "v", "o"), "neurons": ("up", "down")}  # {kind of block: what a side may be to it}


def register_architecture(row: Architecture) -> None:
    """Add a row to the table, in front of the rows that are there: a later one for the same `model_type` counts.

    Raises TypeError (not an Architecture) and ValueError (a rule with no side that scales, an expression that is none, no layer number in a
    pattern, a side that is neither "in" nor "out"), naming the entry; the table is then as before.
    """
    if not isinstance(row, Architecture):
        raise TypeError(f"row: expected an Architecture, got {type(row).__name__}")
    if isinstance(row.model_types, str) or not all(isinstance(kind, str) for kind in row.model_types):
        raise TypeError(f"model_types: expected a tuple of names, got {row.model_types!r}")
    for layers in row.layers:
        if _compiled("pattern", layers.pattern).groups != 1:
            raise ValueError(f"pattern: expected one group, the layer's number, got {layers.pattern!r}")
        for rule in layers.blocks:
            if rule.kind not in ("heads", "neurons"):
                raise ValueError(f"kind: expected 'heads' or 'neurons', got {rule.kind!r}")
            for side in rule.sides:
                if side.side not in ("in", "out"):
                    raise ValueError(f"side: expected 'in' or 'out' for {side.module!r} of {rule.kind}, got {side.side!r}")
            odd = next((side for side in rule.sides if side.role not in ("", *ROLES[rule.kind])), None)
            if odd is not None:
                raise ValueError(f"role: expected one of {ROLES[rule.kind]} for {odd.module!r} of {rule.kind}, got {odd.role!r}")
            of = f"{rule.name or rule.kind} of {layers.pattern!r}"
            if not any(side.scales for side in rule.sides):
                raise ValueError(f"sides: expected one that scales for {of}, got none")
            if not any(side.side == "in" for side in rule.sides):
                raise ValueError(f"sides: expected an input that reads the channels for {of}, got none")
    if row.stream is not None:
        for field in ("adds", "reads", "norms", "keeps", "apart", "last_norm"):
            _compiled(field, getattr(row.stream, field))
    ARCHITECTURES.insert(0, row)


def _compiled(field: str, expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise ValueError(f"{field}: expected a regular expression, got {expression!r} ({error})") from None


def architecture_of(model: nn.Module) -> Architecture | None:
    """The row for this model, by its `config.model_type`; None for one that is not in the table."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return next((row for row in ARCHITECTURES if model_type in row.model_types), None)


class Blocks(dict[str, Block]):
    """The blocks of a model by name, in order.

    row     the row of the table that they were found by; None: there is none
    origin  what there was before the first cut; None: the model was not cut
    """

    def __init__(self, row: Architecture | None, blocks: Mapping[str, Block] | None = None, origin: Origin | None = None) -> None:
        super().__init__(blocks or {})
        self.row, self.origin = row, origin

    def __reduce__(self) -> tuple[type[Blocks], tuple[Architecture | None, dict[str, Block], Origin | None]]:
        return Blocks, (self.row, dict(self), self.origin)

    @property
    def full(self) -> dict[str, int]:
        """{block: how many there were before the first cut}."""
        before = {} if self.origin is None else self.origin.counts
        return {name: before.get(name, block.count) for name, block in self.items()}

    def of_kinds(self, kinds: Collection[str]) -> Blocks:
        """Return the blocks of these kinds."""
        return Blocks(self.row, {name: block for name, block in self.items() if block.kind in kinds}, self.origin)


def origin_of(model: nn.Module, blocks: Blocks) -> Origin:
    """Return what the blocks of this model were before the first cut: what they are, where there was none."""
    if blocks.origin is not None:
        return blocks.origin
    left = {name: torch.ones(block.count, dtype=torch.bool, device="cpu") for name, block in blocks.items()}
    sides = {(side.module, side.side) for block in blocks.values() for side in block.sides}
    return Origin(left, {(name, side): side_width(model.get_submodule(name), side) for name, side in sides})


def as_blocks(model: nn.Module, blocks: Mapping[str, Block]) -> Blocks:
    """These blocks of the model; of a mapping that says no row, with that of the table."""
    return blocks if isinstance(blocks, Blocks) else Blocks(architecture_of(model), blocks)


def is_registered(row: Architecture) -> bool:
    """Whether the row is one that `register_architecture` added, not one that this package brings and tests."""
    return all(row != own for own in _OWN_ROWS)


def task_heads(model: nn.Module) -> list[str]:
    """The names of the model's task heads."""
    return [name for name, _ in model.named_children() if name in TASK_HEADS]


def output_layer(model: nn.Module) -> str | None:
    """The name of the layer that turns hidden states into tokens, by transformers' own `get_output_embeddings`."""
    get = getattr(model, "get_output_embeddings", None)
    layer = get() if callable(get) else None
    return next((name for name, module in model.named_modules() if module is layer), None) if layer is not None else None


def find_blocks(model: nn.Module, row: Architecture | None = None) -> Blocks:
    """The blocks of a model: each layer's, in order, named "<stack><layer>.<part>", then "hidden".

    Empty for an architecture not in the table. "hidden" is there only where the row accounts for every module with
    Parameters: see `unknown_modules`. ValueError where the row finds two blocks of one name.

    row  None: that of the table
    """
    row = row or architecture_of(model)
    blocks = Blocks(row)
    if row is None:
        return blocks
    modules = dict(model.named_modules())
    for layer in find_layers(modules, row):
        for block in layer.blocks:
            name = f"{layer.stack}{layer.number}.{block.part}"
            if name in blocks:
                raise ValueError(
                    f"register_architecture: expected one block named {name!r}, got two, the second in {layer.name}; give "
                    "Layers of another stack another prefix, and two rules of one layer different names"
                )
            blocks[name] = replace(block, stack=layer.stack, layer=layer.number)
    hidden = _hidden(modules, row.stream)
    if hidden is not None:
        blocks["hidden"] = hidden
    return blocks


@dataclass(frozen=True)
class Layer:
    """A layer that a row finds in a model: its name, which is `before`, its number and `after`; its stack and blocks."""

    name: str
    before: str
    number: int
    after: str
    layers: Layers
    blocks: tuple[Block, ...]
    stack: str = ""


def find_layers(modules: dict[str, nn.Module], row: Architecture) -> list[Layer]:
    """The layers among these modules, those that have no block left out."""
    found = []
    for name in modules:
        for layers in row.layers:
            match = ends_with(layers.pattern, name)
            blocks = [_block(modules, name, rule) for rule in layers.blocks] if match else []
            if match is not None and any(block is not None for block in blocks):
                start, end = match.span(1)
                own = tuple(block for block in blocks if block is not None)
                found.append(Layer(name, name[:start], int(match[1]), name[end:], layers, own))
    stacks = _stacks({(layer.before, layer.after) for layer in found if not layer.layers.prefix})
    return [replace(layer, stack=layer.layers.prefix or stacks[layer.before, layer.after]) for layer in found]


def in_encoder(model: nn.Module, block: Block) -> bool:
    """True for a block of an encoder: its stack is "encoder.", or it lies outside an encoder-decoder's `get_decoder()`."""
    if block.stack in ("encoder.", "decoder.") or not is_encoder_decoder(model):
        return block.stack == "encoder."
    get = getattr(model, "get_decoder", None)
    inside = get() if callable(get) else model
    decoder = next((name for name, module in model.named_modules() if module is inside), "")
    return bool(decoder) and not block.reader.startswith(f"{decoder}.")


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model's config says so."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def unknown_modules(model: nn.Module, row: Architecture | None) -> list[str]:
    """The modules with Parameters that the residual stream of the model's row does not account for, or all of them without a row."""
    stream = None if row is None else row.stream
    return [name for name, _ in owners(dict(model.named_modules())) if stream is None or role(stream, name) is None]


def stored(module: nn.Module) -> nn.Module:
    """The stock module within a carrier of masks, or the module itself."""
    base = getattr(module, "base_layer", None)
    return base if isinstance(base, nn.Module) else module


def is_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer in the sense of `APTAdapter.from_linear`, or a quantised one, which that refuses by name."""
    return isinstance(module, nn.Linear) or _stores_transposed(module)


def weight_dim(linear: nn.Module, side: str) -> int:
    """The dimension of `linear.weight` that runs along its "in" or "out" side; an embedding's "out" is its columns."""
    if isinstance(linear, nn.Embedding):
        return 1
    return int((side == "in") != _stores_transposed(linear))


def side_width(module: nn.Module, side: str) -> int:
    """The channels on one side of a linear, an embedding or a norm; 0 where the weight is no plain Parameter."""
    weight = stored(module).weight
    if not isinstance(weight, nn.Parameter):
        return 0
    return int(weight.shape[weight_dim(stored(module), side) if weight.dim() == 2 else 0])


def _stores_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def ends_with(pattern: str, name: str) -> re.Match[str] | None:
    return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) if pattern else None


def _stacks(paths: Collection[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """{what stands before and after the number in names of a stack's layers: the beginning of its blocks' names}.

    "" for the only stack, else what the names differ in.
    """
    parts = {path: ".".join(path).strip(".").split(".") for path in paths}
    for end in (0, -1):
        while len(parts) > 1 and all(parts.values()) and len({names[end] for names in parts.values()}) == 1:
            for names in parts.values():
                names.pop(end)
    return {path: "" if len(parts) == 1 else "".join(f"{name}." for name in names) for path, names in parts.items()}


def _roles(rule: BlockRule) -> Iterator[Side]:
    """The sides of a rule, with the role of each that acts. The only place that takes an order for a meaning."""
    given = {side.role for side in rule.sides}
    free = iter(role for role in ("q", "k") if role not in given)
    for side in rule.sides:
        if side.role or not side.acts:
            yield side
        elif rule.kind == "neurons":
            yield replace(side, role="up" if side.side == "out" else "down")
        elif side.side == "in":
            yield replace(side, role="o")
        else:
            yield replace(side, role="v" if side.scales else next(free, ""))


def _block(modules: dict[str, nn.Module], layer: str, rule: BlockRule) -> Block | None:
    sides = []
    for side in _roles(rule):
        name = f"{layer}.{side.module}"
        if name in modules:
            inner = stored(modules[name])
            of = "embedding" if isinstance(inner, nn.Embedding) else "linear" if is_linear(inner) else "norm"
            sides.append(replace(side, module=name, of=of))
    if not any(side.scales for side in sides):
        return None
    owner = f"{layer}.{rule.owner}" if rule.owner else ""
    size = getattr(modules.get(owner), rule.size, None) if rule.size else 1
    if type(size) is not int or size < 1:
        raise ValueError(
            f"size: expected the owner of {rule.name or rule.kind} to have a number of channels as {rule.size!r}, got {size!r} of {owner!r}"
        )
    block = Block(rule.kind, 0, tuple(sides), rule.width_field, size, owner, rule, part=rule.name or rule.kind)
    scaling = block.scaling_side
    return replace(block, count=side_width(modules[scaling.module], scaling.side) // (scaling.parts * size))


def owners(modules: dict[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    """(name as before wrapping, stock module) of each module with Parameters of its own."""
    found = []
    for name, module in modules.items():
        inner = stored(module)
        if name.endswith(".base_layer") or next(inner.parameters(recurse=False), None) is None:
            continue
        found.append((name, inner))
    return found


def role(stream: Stream, name: str) -> str | None:
    """What a module is to the residual stream: the field of Stream whose expression matches its name, or None."""
    return next((field for field in ("apart", "keeps", "norms", "adds", "reads") if ends_with(getattr(stream, field), name)), None)


def _hidden(modules: dict[str, nn.Module], stream: Stream | None) -> Block | None:
    if stream is None:
        return None
    sides: list[Side] = []
    for name, module in owners(modules):
        touches = role(stream, name)
        if touches is None:
            return None
        of = "embedding" if isinstance(module, nn.Embedding) else "linear"
        if touches == "norms":
            sides.append(Side(name, "out", of="norm"))
        elif touches == "adds":
            sides.append(Side(name, "out", scales=True, of=of))
        elif touches in ("reads", "keeps"):
            sides.append(Side(name, "in"))
            if touches == "keeps":
                sides.append(Side(name, "out"))
    embedding = next((side for side in sides if side.scales and side.of == "embedding"), None)
    if embedding is None:
        return None
    count = side_width(modules[embedding.module], "out")
    wrong = [side for side in sides if side_width(modules[side.module], side.side) != count]
    return None if wrong else Block("hidden", count, tuple(sides), stream.width_field, part="hidden")
