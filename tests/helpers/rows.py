"""Rows of architectures that the table does not bring, and tiny models for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from apt_ext import Architecture, BlockRule, Layers, Side, register_architecture
from apt_ext.pruning.architectures import lookup

transformers = pytest.importorskip("transformers")

BERT_SIZES = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
T5_SIZES = {
    "vocab_size": 50,
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 20,
    "num_layers": 2,
    "num_heads": 3,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": None,
}


@pytest.fixture
def table(monkeypatch):
    """Rows that a test registers are gone after it."""
    monkeypatch.setattr(lookup, "ARCHITECTURES", list(lookup.ARCHITECTURES))


def forget(monkeypatch) -> None:
    """As in a process that has registered nothing."""
    own = [row for row in lookup.ARCHITECTURES if not lookup.is_registered(row)]
    monkeypatch.setattr(lookup, "ARCHITECTURES", own)


def heads(path: str, names: tuple[str, str, str, str], field: str = "num_attention_heads", more: tuple[Side, ...] = (), **rest: Any):
    """A rule of V, Q, K, O below `path`."""
    v, q, k, o = (f"{path}.{name}" for name in names)
    return BlockRule("heads", field, (Side(v, "out", scales=True), Side(q, "out"), Side(k, "out"), Side(o, "in"), *more), **rest)


def neurons(field: str, up: tuple[str, ...], down: str) -> BlockRule:
    return BlockRule("neurons", field, (*(Side(name, "out") for name in up), Side(down, "in", scales=True)))


def electra(**flags: Any) -> Any:
    """An encoder without a stream."""
    at = "attention.self"
    sides = (Side(f"{at}.value", "out", scales=True), Side(f"{at}.query", "out"), Side(f"{at}.key", "out"))
    rule = BlockRule(
        "heads",
        "num_attention_heads",
        (*sides, Side("attention.output.dense", "in")),
        owner=at,
        size="attention_head_size",
        counts=("num_attention_heads",),
        totals=("all_head_size",),
    )
    layers = Layers(r"encoder\.layer\.(\d+)", (rule, neurons("intermediate_size", ("intermediate.dense",), "output.dense")))
    register_architecture(Architecture(("electra",), (layers,), **{"derives_head_size": True, **flags}))
    torch.manual_seed(0)
    config = transformers.ElectraConfig(**BERT_SIZES, embedding_size=16, max_position_embeddings=32)
    return transformers.ElectraForSequenceClassification(config).double().eval()


def bart() -> Any:
    """Two stacks whose heads and neurons have entries of their own in the config."""

    def attention(field: str, at: str, **rest: Any) -> BlockRule:
        names = ("v_proj", "q_proj", "k_proj", "out_proj")
        return heads(at, names, field, owner=at, size="head_dim", counts=("num_heads",), totals=("embed_dim",), **rest)

    encoder = (attention("encoder_attention_heads", "self_attn"), neurons("encoder_ffn_dim", ("fc1",), "fc2"))
    cross = attention("decoder_attention_heads", "encoder_attn", name="cross_heads")
    decoder = (attention("decoder_attention_heads", "self_attn"), cross, neurons("decoder_ffn_dim", ("fc1",), "fc2"))
    stacks = (Layers(r"encoder\.layers\.(\d+)", encoder, "encoder."), Layers(r"decoder\.layers\.(\d+)", decoder, "decoder."))
    register_architecture(Architecture(("bart",), stacks, decoder=True, derives_head_size=True))
    torch.manual_seed(0)
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 2) | dict.fromkeys(
        ("encoder_attention_heads", "decoder_attention_heads"), 3
    )
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = transformers.BartConfig(vocab_size=50, d_model=24, encoder_ffn_dim=20, decoder_ffn_dim=20, **sizes, **tokens)
    return transformers.BartForConditionalGeneration(config).double().eval()


def mt5(model: str = "MT5ForConditionalGeneration", tables: bool = True) -> Any:
    """T5's layers as a row with no prefixes, and with or without the tables of position biases."""

    def attention(layer: int, kind: str, **rest: Any) -> BlockRule:
        at = f"layer.{layer}.{kind}"
        table = (Side(f"{at}.relative_attention_bias", "out", acts=False),) if tables else ()
        more = {"owner": at, "size": "key_value_proj_dim", "size_field": "d_kv", "counts": ("n_heads",), "totals": ("inner_dim",)}
        return heads(at, ("v", "q", "k", "o"), more=table, **more, **rest)

    def dense(layer: int) -> BlockRule:
        at = f"layer.{layer}.DenseReluDense"
        return neurons("d_ff", (f"{at}.wi_0", f"{at}.wi_1"), f"{at}.wo")

    encoder = Layers(r"encoder\.block\.(\d+)", (attention(0, "SelfAttention"), dense(1)))
    cross = attention(1, "EncDecAttention", name="cross_heads")
    decoder = Layers(r"decoder\.block\.(\d+)", (attention(0, "SelfAttention"), cross, dense(2)))
    register_architecture(Architecture(("mt5",), (encoder, decoder), decoder=True, alike=True))
    torch.manual_seed(0)
    return getattr(transformers, model)(transformers.MT5Config(**T5_SIZES)).double().eval()


def olmo2(norms: bool = True, **sizes: Any) -> Any:
    """Norms over all heads of Q and of K."""
    more = (Side("self_attn.q_norm", "out"), Side("self_attn.k_norm", "out")) if norms else ()
    rule = heads("self_attn", ("v_proj", "q_proj", "k_proj", "o_proj"), more=more, owner="self_attn", size="head_dim")
    dense = neurons("intermediate_size", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
    register_architecture(Architecture(("olmo2",), (Layers(r"layers\.(\d+)", (rule, dense)),), decoder=True))
    torch.manual_seed(0)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    model = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**{**BERT_SIZES, **sizes}, **tokens)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tokens_for(model: Any) -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens} | ({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})
