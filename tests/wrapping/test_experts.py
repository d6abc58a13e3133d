"""Mixtures of experts: linears narrower than r, and Parameters of experts that are no linears."""

import pytest
import torch

from apt_ext import APTConfig, APTModel, adapters, get_apt_model, plan

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
TOKENS = torch.arange(2, 12).view(2, 5)
KINDS = {
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 12, "decoder_sparse_step": 1},
    "Mixtral": {"num_local_experts": 4},
    "Olmoe": {"num_experts": 4},
}
EXPERTS = "model.layers.*.mlp.experts.gate_up_proj, model.layers.*.mlp.experts.down_proj: "


def model(kind):
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SIZES, **KINDS[kind])).eval()


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "apt_ext"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_defaults_take_it_and_say_what_is_left_out(kind, caplog, tmp_path):
    base = model(kind)
    layers = {name: p for name, p in base.model.layers.named_parameters() if p.dim() > 1}
    share = sum(p.numel() for name, p in layers.items() if "experts." in name) / sum(p.numel() for p in layers.values())
    expected = base(input_ids=TOKENS).logits
    dry = plan(base, APTConfig())
    apt = get_apt_model(base, APTConfig())
    ranks = {name: adapter.rank for name, adapter in adapters(apt)}
    assert dry.adapters == ranks and set(dry.notes) >= set(said(caplog))
    (about_experts,) = [text for text in said(caplog) if "experts" in text and "3-D" in text]
    assert about_experts.startswith(EXPERTS) and f"{100 * share:.0f} % of the weights" in about_experts
    gates = [f"model.layers.{i}.mlp.shared_expert_gate" for i in range(2)] if kind == "Qwen2Moe" else []
    assert {name: rank for name, rank in ranks.items() if rank != 8} == dict.fromkeys(gates, 1)
    narrow = [text for text in said(caplog) if text.startswith("r: 8 is more than")]
    assert len(narrow) == bool(gates) and all(f"{name} (1)" in narrow[0] for name in gates)
    assert all(adapter.scaling == 2.0 for _, adapter in adapters(apt))
    assert torch.allclose(apt(input_ids=TOKENS).logits, expected, atol=1e-5)
    apt.save_pretrained(tmp_path)
    assert {name: adapter.rank for name, adapter in adapters(APTModel.from_pretrained(model(kind), tmp_path))} == ranks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "targets", [["gate_up_proj"], ["q_proj", "experts.gate_up_proj"], ["experts"], r".*experts\.gate_up_proj"], ids=str
)
def test_experts_named_as_targets_are_refused_in_words(kind, targets):
    base = model(kind)
    near = "gate_proj" if kind == "Qwen2Moe" and "experts" not in str(targets) else "nearest: "
    with pytest.raises(
        ValueError, match=rf"target_modules: .*matches only model\.layers\.0\.mlp\.experts.* 3-D Parameters of experts.*{near}"
    ):
        get_apt_model(base, APTConfig(target_modules=targets))
    assert not list(adapters(base))


def test_a_rank_that_was_asked_for_by_name_or_that_nothing_can_hold_stays_an_error():
    gate = r"model.layers.0.mlp.shared_expert_gate: rank must be at most min\(out_features, in_features\) = 1, got 2"
    with pytest.raises(ValueError, match=gate):
        get_apt_model(model("Qwen2Moe"), APTConfig(r=1, rank_pattern={"shared_expert_gate": 2}))
    with pytest.raises(ValueError, match="rank must be at most .* = 16, got 17"):
        get_apt_model(model("Qwen2Moe"), APTConfig(r=17))
    with pytest.raises(ValueError, match=r"shared_expert_gate: rank must be at most .* = 1, got 2"):
        get_apt_model(model("Qwen2Moe"), APTConfig(r=2, target_modules=["shared_expert_gate"]))
    apt = (
        get_apt_model(model("Qwen2Moe"), APTConfig(r=17, target_modules=["q_proj", "k_proj"], rank_pattern={"q_proj": 2}))
        if False
        else None
    )
    assert apt is None


def test_a_narrow_linear_of_another_kind(caplog):
    """Beside a wide one; reserved storage is no more than it can hold either."""
    base = torch.nn.ModuleDict({"up": torch.nn.Linear(12, 20), "narrow": torch.nn.Linear(20, 3)})
    apt = get_apt_model(base, APTConfig(r=8, max_rank=10))
    found = dict(adapters(apt))
    assert [(a.rank, a.max_rank) for a in (found["up"], found["narrow"])] == [(8, 10), (3, 3)]
    assert said(caplog) == ["r: 8 is more than these linears can hold, so they get what they can: narrow (3)"]
