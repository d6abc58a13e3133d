"""What the layers of known families keep for the backward, and what their kernels move, a token.

Two forms of a layer: the decoder of LLaMA and its kin (norms before, gated, rotary, causal) and the encoder of BERT
and its kin (norms behind, dropout, all positions). Each is read off transformers' code and torch's formulas of
derivatives; Liger's kernels in the place of transformers' off Liger's. Another family is unknown, and nothing is
guessed of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...pruning.architectures.lookup import Block, Blocks, find_layers, is_linear, stored, weight_dim
from ...pruning.cut import Changes, decodes, left

FLOAT = 4  # bytes of what stock norms and losses compute in
_ACTIVATIONS = ("gelu", "silu", "swish", "relu", "gelu_pytorch_tanh")  # of one kernel, which keeps one tensor


@dataclass(frozen=True)
class Linear:
    """Widths of a linear as it will be, and the rank of its adapter (0: none)."""

    out: int
    into: int
    rank: int


@dataclass(frozen=True)
class Widths:
    """Channels of one layer as it will be.

    hidden   of the residual stream
    queries  of all query heads, keys of all KV heads
    heads    how many query heads there are, head: channels of one
    normed   channels of norms over heads (Qwen 3's); 0: there are none
    drops    dropouts that keep a mask
    size     bytes of the weights
    """

    hidden: int
    queries: int
    keys: int
    heads: int
    head: int
    neurons: int
    normed: int
    drops: int
    linears: tuple[Linear, ...]
    size: int


@dataclass(frozen=True)
class Passes:
    """What kernels beside products and attention move.

    bytes     a token, in kernels that torch vectorises (or Liger writes), at the speed of a copy
    elements  a token, in kernels that torch does not vectorise: an operand is broadcast, strided or cast to float32
    kernels   how many there are
    """

    bytes: float = 0.0
    elements: float = 0.0
    kernels: int = 0

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.bytes + other.bytes, self.elements + other.elements, self.kernels + other.kernels)


@dataclass(frozen=True)
class Work:
    """One layer: bytes a token that it keeps, and that its backward holds beside them at most; its passes."""

    kept: float
    temporary: float
    forward: Passes
    backward: Passes


def _norm(width: int, e: int) -> tuple[float, Passes, Passes]:
    """RMSNorm in float32 as transformers writes it: bytes kept, forward, backward. `e`: bytes of an entry."""
    # up, x rsqrt, weight x; x^2, mean, down, and two kernels a token
    forward = Passes((8 + 4 + FLOAT + e) * width, 3 * width, 8)
    # weight x, up, g rsqrt, mean's; g x (12), its sum (4), x^1 (8), 2 x (8), times g (12), both added (12), down
    backward = Passes((12 + 4 + 8 + 8 + 12 + 12 + FLOAT + e) * width, 4 * width, 14)
    return FLOAT * width, forward, backward


def _attention(widths: Widths, e: int) -> tuple[float, Passes, Passes]:
    """What a fused attention keeps (q, k, v, its output, a logsumexp a head), and what its backward moves beside products.

    That is g o a token, dq collected in float32 (filled, read, written in e), and where query heads share keys dk and
    dv of each query head, summed.
    """
    kept = e * (2 * widths.queries + 2 * widths.keys) + FLOAT * widths.heads
    shared = widths.keys < widths.queries
    moved = (2 * e + 2 * FLOAT + e) * widths.queries + shared * 2 * e * (2 * widths.queries + widths.keys)
    return kept, Passes(), Passes(moved, 0, 2 + 2 * shared)


def _sums(widths: Widths, e: int, up: int) -> tuple[Passes, Passes]:
    """Additions to the residual stream; backward of its gradient, and of x's from q, k, v and from `up` linears."""
    added = 2 + 2 + up - 1
    return Passes(2 * 3 * e * widths.hidden, 0, 2), Passes(added * 3 * e * widths.hidden, 0, added)


def _decoder(widths: Widths, e: int, liger: bool) -> Work:
    hidden, turned, neurons = widths.hidden, widths.queries + widths.keys, widths.neurons
    kept, forward, backward = _attention(widths, e)
    forward, backward = (one + two for one, two in zip((forward, backward), _sums(widths, e, 2), strict=True))
    kept += FLOAT * (2 + widths.normed // widths.head)  # what each norm divides by
    if liger:
        # norms keep x and write dx over dy; q and k are turned in place; gate and up become their gradients
        norms = 2 * (hidden + widths.normed)
        kept += e * (norms + 2 * hidden + 3 * neurons)
        forward += Passes(e * (2 * norms + 2 * turned + 3 * neurons), 0, 4)
        backward += Passes(e * (3 * norms + 2 * turned + 5 * neurons), 0, 6)
        return Work(kept, e * (neurons + 2 * hidden), forward, backward)
    kept += e * (2 * hidden + 4 * neurons)
    for width in (hidden, hidden, *([widths.normed] if widths.normed else [])):
        saved, there, back = _norm(width, e)
        kept, forward, backward = kept + saved, forward + there, backward + back
    # q cos, q' sin, their sum; q' negates half and joins; backward the halves are put into zeros and added
    forward += Passes(3 * e * turned, 3 * turned, 10) + Passes(5 * e * neurons, 0, 2)
    backward += Passes(6 * e * turned, 4 * turned, 20) + Passes(9 * e * neurons, 0, 3)
    temporary = max(e * (3 * neurons + 2 * hidden), 4 * FLOAT * hidden)
    return Work(kept, temporary, forward, backward)


def _encoder(widths: Widths, e: int, liger: bool) -> Work:
    hidden, neurons, drops = widths.hidden, widths.neurons, widths.drops
    kept, forward, backward = _attention(widths, e)
    forward, backward = (one + two for one, two in zip((forward, backward), _sums(widths, e, 1), strict=True))
    # inputs of q, k, v, of up and of both norms; before and behind the activation; a byte an entry of a dropout's mask
    kept += e * (4 * hidden + 2 * neurons) + drops * hidden + 2 * 2 * FLOAT  # means and deviations
    forward += Passes(drops * (2 * e + 1) * hidden + 2 * 2 * e * hidden + 2 * e * neurons, 0, drops + 3)
    backward += Passes(drops * (2 * e + 1) * hidden + 2 * 3 * e * hidden + 3 * e * neurons, 0, drops + 3)
    return Work(kept, e * (2 * neurons + 2 * hidden), forward, backward)


@dataclass(frozen=True)
class Family:
    """How the layers of some model types are predicted; `liger`: whether Liger has kernels for them."""

    work: Callable[[Widths, int, bool], Work]
    liger: bool


_DECODER, _ENCODER = Family(_decoder, True), Family(_encoder, False)
FAMILIES = {kind: _DECODER for kind in ("llama", "mistral", "qwen2", "qwen3", "gemma")} | {
    kind: _ENCODER for kind in ("bert", "roberta", "xlm-roberta", "distilbert")
}


def family_of(model: nn.Module, blocks: Blocks) -> Family | str:
    """The family of this model, or in words why nothing is known of its layers."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    family = FAMILIES.get(str(kind))
    if family is None or blocks.row is None:
        return f"nothing is known of what layers of {kind or type(model).__name__} keep; known are {', '.join(FAMILIES)}"
    action = getattr(config, "hidden_act", getattr(config, "activation", "gelu"))
    if action not in _ACTIVATIONS:
        return f"nothing is known of what the activation {action} keeps; known are {', '.join(_ACTIVATIONS)}"
    if getattr(config, "_attn_implementation", None) == "eager":
        return "eager attention keeps its weights, and is not predicted; known is a fused one (attn_implementation='sdpa')"
    for layer in find_layers(dict(model.named_modules()), blocks.row):
        covered = {name for block in layer.blocks for name in block.linears}
        inside = model.get_submodule(layer.name).named_modules(prefix=layer.name)
        odd = next((name for name, module in inside if is_linear(module) and name not in covered), None)
        if odd is not None or [block.kind for block in layer.blocks] != ["heads", "neurons"]:
            return f"nothing is known of what {odd or layer.name} keeps: a layer has heads and neurons alone"
    return family


def is_causal(model: nn.Module, blocks: Blocks) -> bool:
    """Whether a position attends to those before it alone."""
    return blocks.row is not None and decodes(blocks.row, model)


def drops_attention(model: nn.Module) -> bool:
    """Whether the model's attention has dropout in training, by its config."""
    config = getattr(model, "config", None)
    return any(getattr(config, name, 0.0) > 0 for name in ("attention_probs_dropout_prob", "attention_dropout"))


def widths_of(model: nn.Module, blocks: Blocks, ranks: Mapping[str, int], changes: Changes) -> list[Widths]:
    """The layers of a model of a known family once `changes` are made; `ranks` {linear: its adapter's rank}."""
    assert blocks.row is not None
    modules = dict(model.named_modules())

    def width(name: str, side: str) -> int:
        base = stored(modules[name])
        weight: Any = base.weight
        return left(weight, changes)[weight_dim(base, side)]

    found = []
    for layer in find_layers(modules, blocks.row):
        heads, neurons = layer.blocks
        linears = [Linear(width(name, "out"), width(name, "in"), ranks.get(name, 0)) for name in _linears(layer.blocks)]
        queries, keys = width(heads.reader, "in"), width(heads.linear("k"), "out")
        inner = modules[layer.name]
        normed = any(name.endswith("q_norm") for name, _ in inner.named_modules())
        size = 0
        for parameter in inner.parameters():
            entries = 1
            for count in left(parameter, changes):
                entries *= count
            size += entries * parameter.element_size()
        found.append(
            Widths(
                hidden=width(heads.linear("q"), "in"),
                queries=queries,
                keys=keys,
                heads=queries // heads.size,
                head=heads.size,
                neurons=width(neurons.reader, "in"),
                normed=queries + keys if normed else 0,
                drops=_dropouts(model),
                linears=tuple(linears),
                size=size,
            )
        )
    return found


def _linears(blocks: tuple[Block, ...]) -> list[str]:
    return list(dict.fromkeys(name for block in blocks for name in block.linears))


def _dropouts(model: nn.Module) -> int:
    """Dropouts of a layer on the residual stream above 0: two in BERT, one in DistilBERT, none in decoders."""
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) == "distilbert":
        return int(getattr(config, "dropout", 0.0) > 0)
    return 2 * int(getattr(config, "hidden_dropout_prob", 0.0) > 0)
