"""A tiny BERT with trained adapters, masks for it, and what an error must not change."""

import pytest
import torch

from apt_ext import APTConfig
from apt_ext.model import adapters, get_apt_model

transformers = pytest.importorskip("transformers")
QUERY_VALUE = APTConfig(r=4, target_modules=["query", "value"])
QUERY = "bert.encoder.layer.0.attention.self.query"
UP, DOWN = "bert.encoder.layer.1.intermediate.dense", "bert.encoder.layer.1.output.dense"


def tiny_bert(kind="BertForSequenceClassification", dtype=torch.float64, seed=0, **config):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.BertConfig(**{**sizes, "max_position_embeddings": 16, "num_labels": 3, **config})
    model = getattr(transformers, kind)(config)
    # as after training: biases and norms are not zeros and ones
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "LayerNorm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()


def batch(seed=1):
    tokens = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": torch.tensor([0, 1, 2])}


def trained(model, config=QUERY_VALUE, seed=2):
    """An APTModel whose factors are not at their start."""
    apt = get_apt_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, adapter in adapters(apt):
            adapter.lora_B[:, : adapter.rank].copy_(torch.randn(adapter.out_features, adapter.rank, generator=generator) * 0.1)
    return apt


def snapshot(model):
    """What must be the same after an error."""
    return (
        [(name, id(module)) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        {name: value.clone() for name, value in model.state_dict().items()},
    )


def assert_same(before, after):
    assert before[0] == after[0] and before[1] == after[1] and before[2].keys() == after[2].keys()
    assert all(torch.equal(value, after[2][name]) for name, value in before[2].items())


def half(count=48):
    return (torch.arange(count) % 2).double()


ALL = APTConfig(r=4)


def masked(masks, dtype=torch.float64, config=ALL, **bert):
    apt = trained(tiny_bert(dtype=dtype, **bert), config)
    for name, mask in masks.items():
        apt.set_block_mask(name, mask)
    return apt


def first(kept, count=48, value=1.0):
    return (torch.arange(count) < kept).float() * value


MASKS = {
    "none": {},
    "half": {"0.neurons": half(), "1.neurons": half()},
    "fractions": {"0.neurons": half() * 0.37, "1.neurons": torch.linspace(0, 1, 48)},
    "one survivor": {"0.neurons": first(1), "1.neurons": first(1)},
    "empty": {"0.neurons": first(0), "1.neurons": first(0)},
    "one layer empty": {"1.neurons": first(0)},
    "different widths": {"0.neurons": first(17), "1.neurons": first(40, value=0.5)},
}
