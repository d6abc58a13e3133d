"""The architectures that can be pruned, as a table of names: a new one is a row, and nothing else changes.

A block is what is removed whole: the heads of one attention, the neurons of one feed-forward layer, the dimensions of the residual stream.
Its mask acts on sides of modules: the output of the ones that produce the block's channels, the input of the ones that consume them.
Imports only torch. `register_architecture` adds rows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Side:
    """One side of a module on which a block's mask acts.

    module  its name: within the layer in the table (where it may be missing), within the model in a Block
    side    "in" (columns of the weight) or "out" (its rows, and the bias)
    scales  a fractional value of the mask acts on this side; every other side of the block gets the exact zeros alone
    part    which of `parts` equal, adjacent stretches of the side it is, where one linear holds several (GPT-2's query, key and value)
    acts    whether the mask acts there; a side where it does not is only cut (a table of position biases, one column a head)
    of      "linear", "embedding" or "norm"; filled in for a Block
    """

    module: str
    side: str
    scales: bool = False
    part: int = 0
    parts: int = 1
    acts: bool = True
    of: str = "linear"


@dataclass(frozen=True)
class BlockRule:
    """How one kind of block looks in each layer.

    kind         "heads" or "neurons"
    width_field  the entry of the model's config that says how many there are
    sides        where its mask acts; those that the model lacks are passed over, the one that scales must be there
    name         the last part of the block's name, None: the kind
    owner        the module that holds the attributes below, within the layer
    size         its attribute that says how many adjacent channels one of the block is (a head's size); "" for one
    counts       its attributes that a cut sets to the number of query heads
    totals       and to that number times the size
    """

    kind: str
    width_field: str
    sides: tuple[Side, ...]
    name: str | None = None
    owner: str = ""
    size: str = ""
    counts: tuple[str, ...] = ()
    totals: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layers:
    """Layers of one kind. `pattern` matches the end of a layer's name, its group is the number; `prefix` begins the names of its blocks."""

    pattern: str
    blocks: tuple[BlockRule, ...]
    prefix: str = ""


@dataclass(frozen=True)
class Stream:
    """The residual stream: regular expressions for the ends of the names of every module with Parameters of its own.

    adds         modules whose output is added to the stream: there a fractional value acts
    reads        linears that read it
    norms        norms over it, whose statistics are those of the kept dimensions
    keeps        linears outside it that stock configs tie to its width on both sides, such as a pooler
    apart        modules that do not touch it
    last_norm    the norm whose output a tied output layer reads: it takes back what scales the embedding
    norm_offset  a norm multiplies by norm_offset + weight
    """

    adds: str
    reads: str
    norms: str
    keeps: str = ""
    apart: str = ""
    last_norm: str = ""
    norm_offset: float = 0.0


@dataclass(frozen=True)
class Architecture:
    """One row of the table: the values of `config.model_type` that it is for, the layers, and the residual stream (None: never cut).

    decoder      whether stock classes read the length of a cache from layer 0, which then has to keep a head: always, never, or None as
                 `config.is_decoder` says
    never_empty  whether stock modules cannot run with nothing left of a block
    derives_head_size  whether the stock config can only say heads of hidden_size / heads channels
    alike        whether the layers of a stack must keep the same heads (T5 shares one position bias)
    heads_divide whether the stock config refuses a number of heads that does not divide hidden_size
    retype       (model_type, entries of the config that must be false) of a class that computes the same and says more; None: there is none
    """

    model_types: tuple[str, ...]
    layers: tuple[Layers, ...]
    stream: Stream | None = None
    decoder: bool | None = False
    never_empty: bool = False
    derives_head_size: bool = False
    alike: bool = False
    heads_divide: bool = False
    retype: tuple[str, tuple[str, ...]] | None = None


def _neurons(field: str, up: tuple[str, ...], down: str) -> BlockRule:
    return BlockRule("neurons", field, (*(Side(name, "out") for name in up), Side(down, "in", scales=True)))


def _heads(*qkvo: str, **rest: Any) -> BlockRule:
    """Scales where V comes out: a head without scores would still attend everywhere alike, so Q and K alone would not remove it."""
    q, k, v, o = qkvo
    return BlockRule("heads", "num_attention_heads", (Side(v, "out", scales=True), Side(q, "out"), Side(k, "out"), Side(o, "in")), **rest)


_BERT_HEADS = _heads(
    *(f"attention.self.{name}" for name in ("query", "key", "value")),
    "attention.output.dense",
    owner="attention.self",
    size="attention_head_size",
    counts=("num_attention_heads",),
    totals=("all_head_size",),
)
_BERT_LAYERS = (Layers(r"encoder\.layer\.(\d+)", (_BERT_HEADS, _neurons("intermediate_size", ("intermediate.dense",), "output.dense"))),)
_BERT_STREAM = Stream(
    adds=r"embeddings\.\w+_embeddings|attention\.output\.dense|layer\.\d+\.output\.dense",
    reads=r"attention\.self\.(query|key|value)|intermediate\.dense|classifier|qa_outputs|cls\.seq_relationship|cls\.predictions\.decoder",
    norms=r"LayerNorm",
    keeps=r"pooler\.dense|cls\.predictions\.transform\.dense",
    apart=r"cls\.predictions",
    last_norm=r"cls\.predictions\.transform\.LayerNorm",
)

_LLAMA_HEADS = _heads(
    *(f"self_attn.{name}_proj" for name in "qkvo"), owner="self_attn", size="head_dim"
)  # a block is a KV head with the adjacent query heads that share it
_LLAMA_LAYERS = (
    Layers(r"layers\.(\d+)", (_LLAMA_HEADS, _neurons("intermediate_size", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"))),
)
_LLAMA_STREAM = Stream(
    adds=r"embed_tokens|o_proj|down_proj",
    reads=r"[qkv]_proj|gate_proj|up_proj|lm_head|score|classifier|qa_outputs",
    norms=r"input_layernorm|post_attention_layernorm|norm",
    apart=r"q_norm|k_norm",
    last_norm=r"norm",
)


def _t5_heads(layer: int, attention: str, **rest: Any) -> BlockRule:
    path = f"layer.{layer}.{attention}"
    rule = _heads(
        *(f"{path}.{part}" for part in "qkvo"), owner=path, size="key_value_proj_dim", counts=("n_heads",), totals=("inner_dim",), **rest
    )
    return replace(rule, sides=(*rule.sides, Side(f"{path}.relative_attention_bias", "out", acts=False)))


def _t5_neurons(layer: int) -> BlockRule:
    path = f"layer.{layer}.DenseReluDense"
    return _neurons("d_ff", tuple(f"{path}.{name}" for name in ("wi", "wi_0", "wi_1")), f"{path}.wo")


ARCHITECTURES: list[Architecture] = [
    Architecture(("bert",), _BERT_LAYERS, _BERT_STREAM, decoder=None, derives_head_size=True),
    Architecture(
        ("roberta", "xlm-roberta"),
        _BERT_LAYERS,
        replace(
            _BERT_STREAM,
            reads=r"attention\.self\.(query|key|value)|intermediate\.dense|classifier|out_proj|qa_outputs|lm_head\.decoder",
            norms=r"LayerNorm|lm_head\.layer_norm",
            keeps=r"pooler\.dense|classifier\.dense|lm_head\.dense",
            apart=r"lm_head",
            last_norm=r"lm_head\.layer_norm",
        ),
        decoder=None,
        derives_head_size=True,
    ),
    Architecture(
        ("distilbert",),
        (
            Layers(
                r"transformer\.layer\.(\d+)",
                (
                    _heads(
                        *(f"attention.{name}_lin" for name in ("q", "k", "v", "out")),
                        owner="attention",
                        size="attention_head_size",
                        counts=("n_heads",),
                    ),
                    _neurons("hidden_dim", ("ffn.lin1",), "ffn.lin2"),
                ),
            ),
        ),
        Stream(
            adds=r"(word|position)_embeddings|out_lin|ffn\.lin2",
            reads=r"[qkv]_lin|ffn\.lin1|classifier|qa_outputs|vocab_projector",
            norms=r"LayerNorm|sa_layer_norm|output_layer_norm|vocab_layer_norm",
            keeps=r"pre_classifier|vocab_transform",
            last_norm=r"vocab_layer_norm",
        ),
        derives_head_size=True,
    ),
    Architecture(
        ("llama",), _LLAMA_LAYERS, _LLAMA_STREAM, decoder=True, heads_divide=True, retype=("mistral", ("attention_bias", "mlp_bias"))
    ),
    Architecture(("mistral", "qwen2", "qwen3"), _LLAMA_LAYERS, _LLAMA_STREAM, decoder=True),
    Architecture(("gemma",), _LLAMA_LAYERS, replace(_LLAMA_STREAM, norm_offset=1.0), decoder=True),
    Architecture(
        ("gpt2",),
        (
            Layers(
                r"h\.(\d+)",
                (
                    BlockRule(
                        "heads",
                        "num_attention_heads",
                        (
                            *(Side("attn.c_attn", "out", scales=part == 2, part=part, parts=3) for part in (2, 0, 1)),
                            Side("attn.c_proj", "in"),
                        ),
                        owner="attn",
                        size="head_dim",
                        counts=("num_heads",),
                        totals=("split_size",),
                    ),
                    _neurons("n_inner", ("mlp.c_fc",), "mlp.c_proj"),
                ),
            ),
        ),
        Stream(
            adds=r"wte|wpe|attn\.c_proj|mlp\.c_proj",
            reads=r"attn\.c_attn|mlp\.c_fc|lm_head|score|classifier|qa_outputs",
            norms=r"ln_1|ln_2|ln_f",
            last_norm=r"ln_f",
        ),
        decoder=True,
        never_empty=True,
        derives_head_size=True,
    ),
    Architecture(
        ("t5",),
        (
            Layers(r"encoder\.block\.(\d+)", (_t5_heads(0, "SelfAttention"), _t5_neurons(1)), "encoder."),
            Layers(
                r"decoder\.block\.(\d+)",
                (_t5_heads(0, "SelfAttention"), _t5_heads(1, "EncDecAttention", name="cross_heads"), _t5_neurons(2)),
                "decoder.",
            ),
        ),
        Stream(
            adds=r"shared|embed_tokens|o|wo",
            reads=r"q|k|v|wi|wi_0|wi_1|lm_head|classification_head\.out_proj|classifier|qa_outputs",
            norms=r"layer_norm|final_layer_norm",
            keeps=r"classification_head\.dense",
            apart=r"relative_attention_bias",
            last_norm=r"decoder\.final_layer_norm",
        ),
        decoder=True,
        alike=True,
    ),
]

# What stock classes call a head that training starts from scratch: children of the model itself, which train whole unless told otherwise.
TASK_HEADS = ("classifier", "pre_classifier", "classification_head", "multiple_choice_head", "score", "qa_outputs")


def register_architecture(row: Architecture) -> None:
    """Add a row to the table, in front of the rows that are there: a later one for the same `model_type` counts.

    Raises TypeError (not an Architecture) and ValueError (a rule with no side that scales, an expression that is none, no layer number in a
    pattern), naming the entry; the table is then as before.
    """
    if not isinstance(row, Architecture):
        raise TypeError(f"row: expected an Architecture, got {type(row).__name__}")
    for layers in row.layers:
        if _compiled("pattern", layers.pattern).groups != 1:
            raise ValueError(f"pattern: expected one group, the layer's number, got {layers.pattern!r}")
        for rule in layers.blocks:
            if rule.kind not in ("heads", "neurons"):
                raise ValueError(f"kind: expected 'heads' or 'neurons', got {rule.kind!r}")
            if not any(side.scales for side in rule.sides):
                raise ValueError(f"sides: expected one that scales for {rule.name or rule.kind} of {layers.pattern!r}, got none")
    if row.stream is not None:
        for field in ("adds", "reads", "norms", "keeps", "apart", "last_norm"):
            _compiled(field, getattr(row.stream, field))
    ARCHITECTURES.insert(0, row)


def _compiled(field: str, expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise ValueError(f"{field}: expected a regular expression, got {expression!r} ({error})") from None


@dataclass(frozen=True)
class Block:
    """One block of one model.

    kind         "heads" (KV groups where query heads share keys), "neurons" or "hidden"
    count        how many there are: the length of the block's mask
    sides        where the mask acts, with the modules' names in the model
    width_field  the entry of the model's config that says `count`, one for all layers
    size         how many adjacent channels one of them is where it scales: a head's size, else 1
    owner        the module that the rule's attributes belong to; "" for none
    rule         the table's rule; None for "hidden"
    """

    kind: str
    count: int
    sides: tuple[Side, ...]
    width_field: str
    size: int = 1
    owner: str = ""
    rule: BlockRule | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """The names of the linears that the block touches, as before wrapping."""
        return tuple(dict.fromkeys(side.module for side in self.sides if side.of == "linear"))

    @property
    def scaling_side(self) -> Side:
        """A side that carries the whole mask, fractions included."""
        return next(side for side in self.sides if side.scales)

    @property
    def reader(self) -> str:
        """The linear that reads the channels of heads or neurons: its input is what the block hands on."""
        return next(side.module for side in self.sides if side.side == "in")


def architecture_of(model: nn.Module) -> Architecture | None:
    """The row for this model, by its `config.model_type`; None for one that is not in the table."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return next((row for row in ARCHITECTURES if model_type in row.model_types), None)


def task_heads(model: nn.Module) -> list[str]:
    """The names of the model's task heads."""
    return [name for name, _ in model.named_children() if name in TASK_HEADS]


def output_layer(model: nn.Module) -> str | None:
    """The name of the layer that turns hidden states into tokens, by transformers' own `get_output_embeddings`."""
    get = getattr(model, "get_output_embeddings", None)
    layer = get() if callable(get) else None
    return next((name for name, module in model.named_modules() if module is layer), None) if layer is not None else None


def find_blocks(model: nn.Module) -> dict[str, Block]:
    """The blocks of a model: each layer's, in order, named "<layer>.<kind>", then "hidden"; empty for an architecture not in the table.

    "hidden" is there only where the table accounts for every module with Parameters: see `unknown_modules`.
    """
    row = architecture_of(model)
    blocks: dict[str, Block] = {}
    if row is None:
        return blocks
    modules = dict(model.named_modules())
    for name in modules:
        for layers in row.layers:
            found = ends_with(layers.pattern, name)
            for rule in layers.blocks if found else ():
                block = _block(modules, name, rule)
                if found is not None and block is not None:
                    blocks[f"{layers.prefix}{found[1]}.{rule.name or rule.kind}"] = block
    hidden = _hidden(modules, row.stream)
    if hidden is not None:
        blocks["hidden"] = hidden
    return blocks


def unknown_modules(model: nn.Module) -> list[str]:
    """The modules with Parameters that the residual stream of the model's row does not account for, or all of them without a row."""
    row = architecture_of(model)
    stream = None if row is None else row.stream
    return [name for name, _ in owners(dict(model.named_modules())) if stream is None or _role(stream, name) is None]


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


def _block(modules: dict[str, nn.Module], layer: str, rule: BlockRule) -> Block | None:
    sides = []
    for side in rule.sides:
        name = f"{layer}.{side.module}"
        if name in modules:
            of = "embedding" if isinstance(stored(modules[name]), nn.Embedding) else "linear"
            sides.append(replace(side, module=name, of=of))
    if not any(side.scales for side in sides):
        return None
    owner = f"{layer}.{rule.owner}" if rule.owner else ""
    size = int(getattr(modules[owner], rule.size)) if rule.size else 1
    block = Block(rule.kind, 0, tuple(sides), rule.width_field, size, owner, rule)
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


def _role(stream: Stream, name: str) -> str | None:
    return next((role for role in ("apart", "keeps", "norms", "adds", "reads") if ends_with(getattr(stream, role), name)), None)


def _hidden(modules: dict[str, nn.Module], stream: Stream | None) -> Block | None:
    sides: list[Side] = []
    for name, module in owners(modules) if stream is not None else ():
        role = _role(stream, name)  # type: ignore[arg-type]  # it is not None here
        if role is None:
            return None
        of = "embedding" if isinstance(module, nn.Embedding) else "linear"
        if role == "norms":
            sides.append(Side(name, "out", of="norm"))
        elif role == "adds":
            sides.append(Side(name, "out", scales=True, of=of))
        elif role in ("reads", "keeps"):
            sides.append(Side(name, "in"))
            if role == "keeps":
                sides.append(Side(name, "out"))
    embedding = next((side for side in sides if side.scales and side.of == "embedding"), None)
    if embedding is None:
        return None
    count = side_width(modules[embedding.module], "out")
    wrong = [side for side in sides if side_width(modules[side.module], side.side) != count]
    return None if wrong else Block("hidden", count, tuple(sides), "hidden_size")
