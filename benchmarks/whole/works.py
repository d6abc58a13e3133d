"""The models whose steps are timed, as sizes alone: weights and data are random."""

from __future__ import annotations

from dataclasses import dataclass, replace

LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROBERTA_LINEARS = [
    "query",
    "key",
    "value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
]


@dataclass(frozen=True)
class Work:
    """Describe what trains, and how long it is looked at.

    config    the class of the model's config in transformers, and `auto` the one that makes models of it
    sizes     of that config
    targets   ends of the names of the linears that get an adapter
    batch     sequences and their length
    multiple  half of a layer's neurons is rounded down to such a multiple
    warm      steps before any that counts
    rounds    of the clock, in which the contenders take turns
    least     seconds that a round of one contender lasts at least
    """

    name: str
    config: str
    auto: str
    sizes: dict
    targets: list[str]
    batch: tuple[int, int]
    multiple: int = 64
    warm: int = 5
    rounds: int = 5
    least: float = 0.2

    def smoke(self):
        """Return the same at a size for a CPU, looked at for a moment."""
        small = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 96}
        small |= {"num_attention_heads": 4}
        small |= {"num_key_value_heads": 4 if self.sizes.get("num_key_value_heads", 4) > 4 else 2}
        sizes = {name: small.get(name, value) for name, value in self.sizes.items()}
        return replace(self, sizes=sizes, batch=(2, 8), multiple=8, warm=2, rounds=2, least=0.0)


def llama(name, batch, rounds, least, **sizes):
    """Return a LLaMA of these sizes as a Work."""
    sizes = {**sizes, "vocab_size": 32000, "use_cache": False}
    return Work(
        name,
        "LlamaConfig",
        "AutoModelForCausalLM",
        sizes,
        LLAMA_LINEARS,
        batch,
        rounds=rounds,
        least=least,
    )


WORKS = {
    "roberta": Work(
        "RoBERTa-base",
        "RobertaConfig",
        "AutoModelForSequenceClassification",
        {
            "num_hidden_layers": 12,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "vocab_size": 50265,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
            "num_labels": 3,
        },
        ROBERTA_LINEARS,
        (32, 128),
    ),
    "llama": llama(
        "LLaMA-1.1B",
        (8, 2048),
        rounds=5,
        least=0.5,
        num_hidden_layers=22,
        hidden_size=2048,
        intermediate_size=5632,
        num_attention_heads=32,
        num_key_value_heads=4,
    ),
    "7b": llama(
        "LLaMA-2-7B",
        (4, 2048),
        rounds=5,
        least=0.8,
        num_hidden_layers=32,
        hidden_size=4096,
        intermediate_size=11008,
        num_attention_heads=32,
        num_key_value_heads=32,
    ),
}
