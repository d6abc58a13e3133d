"""The architectures that can be pruned, as a table of names: a new one is a row, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .types import Architecture, BlockRule, Layers, Side, Stream


def _neurons(field: str, up: tuple[str, ...], down: str) -> BlockRule:
    sides = (*(Side(name, "out", role="up") for name in up), Side(down, "in", scales=True, role="down"))
    return BlockRule("neurons", field, sides)


def _heads(*qkvo: str, **rest: Any) -> BlockRule:
    """Scales where V comes out: a head without scores would still attend everywhere alike, so Q and K alone would not remove it."""
    q, k, v, o = qkvo
    read = (Side(v, "out", scales=True, role="v"), Side(q, "out", role="q"), Side(k, "out", role="k"))
    return BlockRule("heads", "num_attention_heads", (*read, Side(o, "in", role="o")), **rest)


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
        *(f"{path}.{part}" for part in "qkvo"),
        owner=path,
        size="key_value_proj_dim",
        size_field="d_kv",
        counts=("n_heads",),
        totals=("inner_dim",),
        **rest,
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
                            *(Side("attn.c_attn", "out", scales=part == 2, part=part, parts=3, role="qkv"[part]) for part in (2, 0, 1)),
                            Side("attn.c_proj", "in", role="o"),
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
