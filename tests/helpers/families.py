"""One tiny random model for each architecture in the table, and one input for each: what every structure test runs over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from apt_ext import APTConfig, APTModel, adapters, get_apt_model

transformers = pytest.importorskip("transformers")

_LLAMA = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_BERT = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 32,
    "num_labels": 3,
}
_DISTILBERT = {"vocab_size": 50, "dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 20, "max_position_embeddings": 32, "num_labels": 3}
_GPT2 = {"vocab_size": 50, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 32, "bos_token_id": 1, "eos_token_id": None}
_T5 = {
    "vocab_size": 50,
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 20,
    "num_layers": 2,
    "num_heads": 3,
    "decoder_start_token_id": 0,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class Family:
    """A stock class, its config, and what tests have to know about it.

    decoder  it generates
    stacks   beginnings of the names of its layers' blocks
    alike    layers keep the same heads
    """

    kind: str
    config: str
    sizes: dict[str, Any] = field(default_factory=dict)
    decoder: bool = False
    stacks: tuple[str, ...] = ("",)
    alike: bool = False

    def model(self, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Any:
        torch.manual_seed(seed)
        model = getattr(transformers, self.kind)(getattr(transformers, self.config)(**{**self.sizes, **changes}))
        with torch.no_grad():  # as after training: biases and norms are not zeros and ones, and logits are not all alike
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                elif "embed" not in name and "shared" not in name and "wte" not in name:
                    parameter.mul_(3)
        return model.to(dtype).eval()

    def inputs(self, seed: int = 1, length: int = 7) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(2, 50, (3, length), generator=generator)
        mask = torch.ones_like(tokens)
        mask[0, : 0 if self.decoder else length] = 1
        if not self.decoder or self.alike:
            mask[0, length - 2 :] = 0
        found = {"input_ids": tokens, "attention_mask": mask}
        if self.alike:
            found["decoder_input_ids"] = torch.randint(2, 50, (3, 5), generator=generator)
        return found


def _decoder(name: str, **changes: Any) -> Family:
    return Family(f"{name}ForCausalLM", f"{name}Config", {**_LLAMA, **changes}, decoder=True)


def _t5(kind: str = "T5ForConditionalGeneration", **changes: Any) -> Family:
    return Family(kind, "T5Config", {**_T5, **changes}, decoder=True, stacks=("encoder.", "decoder."), alike=True)


FAMILIES = {
    "bert": Family("BertForSequenceClassification", "BertConfig", _BERT),
    "bert-mlm": Family("BertForMaskedLM", "BertConfig", _BERT),
    "bert-decoder": Family("BertLMHeadModel", "BertConfig", {**_BERT, "is_decoder": True, "bos_token_id": 1}, decoder=True),
    "roberta": Family("RobertaForSequenceClassification", "RobertaConfig", _BERT),
    "roberta-mlm": Family("RobertaForMaskedLM", "RobertaConfig", _BERT),
    "distilbert": Family("DistilBertForSequenceClassification", "DistilBertConfig", _DISTILBERT),
    "distilbert-mlm": Family("DistilBertForMaskedLM", "DistilBertConfig", _DISTILBERT),
    "llama": _decoder("Llama"),
    "llama-tied": _decoder("Llama", tie_word_embeddings=True, num_key_value_heads=6),
    "llama-bias": _decoder("Llama", attention_bias=True, mlp_bias=True, num_key_value_heads=1),
    "mistral": _decoder("Mistral", sliding_window=4),
    "qwen2": _decoder("Qwen2"),
    "qwen2-sliding": _decoder("Qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": _decoder("Qwen3", head_dim=8, tie_word_embeddings=True),
    "gemma": _decoder("Gemma", head_dim=8),
    "gpt2": Family("GPT2LMHeadModel", "GPT2Config", _GPT2, decoder=True),
    "t5": _t5(feed_forward_proj="relu"),
    "t5-gated": _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
}
ONE_EACH = ("bert", "llama", "gpt2", "t5")  # an encoder, two decoders, and an encoder with its decoder
EVERY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
EMPTY_HEADS = pytest.mark.skipif(torch.__version__ < "2.12", reason="the attention of torch 2.11 needs a head")
GENERATING = [name for name, family in FAMILIES.items() if family.decoder]
DECODERS = pytest.mark.parametrize("family", [FAMILIES[name] for name in GENERATING], ids=GENERATING)


def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The logits."""
    with torch.no_grad():
        return [model(**inputs).logits]


def streams(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The residual stream before every layer and behind the last, of an encoder and then of its decoder."""
    with torch.no_grad():
        found = model(**inputs, output_hidden_states=True)
    names = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
    return [state for name in names for state in getattr(found, name, None) or ()]


def generated(model: Any, inputs: dict[str, torch.Tensor], use_cache: bool) -> list[torch.Tensor]:
    """The logits of each of five greedy steps."""
    given = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    found = model.generate(
        **given, use_cache=use_cache, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return list(found.logits)


def adapted(family: Family, config: APTConfig | None = None, dtype: torch.dtype = torch.float64, **changes: Any) -> APTModel:
    """An APTModel whose factors are not at their start, in evaluation mode."""
    apt = get_apt_model(family.model(dtype, **changes), config or APTConfig(r=2)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, adapter in adapters(apt):
            adapter.Wb.copy_(torch.randn(adapter.Wb.shape, generator=generator) * 0.2)  # what max_rank reserves is zero
    return apt


def some(family: Family, blocks: dict[str, Any], kinds: tuple[str, ...], how: str, seed: int = 3) -> dict[str, torch.Tensor]:
    """{block: mask} for the blocks of these kinds.

    how  "hard" (half, the first always kept), "soft" (the same with fractions), "empty", "one" (the last survives), "none" (all ones)
    """
    generator = torch.Generator().manual_seed(seed)
    masks: dict[str, torch.Tensor] = {}
    drawn: dict[str, torch.Tensor] = {}
    for name, block in blocks.items():
        if block.kind not in kinds:
            continue
        stack = name.split(".")[0] + name.rpartition(".")[2] if family.alike and block.kind == "heads" else name
        if stack not in drawn:
            mask = (torch.rand(block.count, generator=generator) > 0.4).float()
            mask[0], mask[1 if block.count > 1 else 0] = 1, 0 if block.count > 1 else 1
            fractions = torch.rand(block.count, generator=generator) * 0.9 + 0.1
            last = (torch.arange(block.count) == block.count - 1).float()
            drawn[stack] = {"hard": mask, "soft": mask * fractions, "empty": mask * 0, "one": last, "none": mask * 0 + 1}[how]
        masks[name] = drawn[stack].clone()
    return masks


def mask_all(apt: APTModel, masks: dict[str, torch.Tensor]) -> APTModel:
    for name, mask in masks.items():
        apt.set_block_mask(name, mask)
    return apt


def tolerance(family: Family, kinds: tuple[str, ...]) -> float:
    """Gemma's norm computes in float32, and takes over what its embedding's scale loses with the hidden size."""
    return 1e-6 if family.kind.startswith("Gemma") and "hidden" in kinds else 1e-10


def close(ours: list[torch.Tensor], theirs: list[torch.Tensor], within: float = 1e-10) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and bool(((a - b).abs() <= within).all()), (a - b).abs().max()


def keep_first(apt: APTModel, **counts: int) -> APTModel:
    """Keep the first so many of each kind."""
    for name, block in apt.blocks.items():
        if block.kind in counts:
            apt.set_block_mask(name, (torch.arange(block.count) < counts[block.kind]).float())
    return apt


def with_loss(family, apt, seeds=(1, 2)):
    """Batches with labels, for whatever head the model has."""
    for seed in seeds:
        inputs = family.inputs(seed)
        if "SequenceClassification" in family.kind:
            yield {**inputs, "labels": torch.tensor([0, 1, 2])}
        elif family.alike:
            yield {**inputs, "labels": inputs["decoder_input_ids"]}
        else:
            yield {**inputs, "labels": inputs["input_ids"]}
