"""Adapters that PEFT trained, against real PEFT: the same logits from a directory and from a PeftModel, or refused in words."""

import dataclasses
import json

import pytest
import torch
from families import FAMILIES, keep_first, outputs

from apt_ext import APTConfig, APTModel, adapters, get_apt_model, shrink
from apt_ext.common import patterns

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning",
    "ignore:.*use_rslora:UserWarning",
    "ignore:.*fan_in_fan_out:UserWarning",
    "ignore:.*save_embedding_layers:UserWarning",
    "ignore:.*tie_word_embeddings:UserWarning",
)

TARGETS = {"llama": ["q_proj", "down_proj"], "bert": ["query", "intermediate.dense"], "gpt2": ["c_attn", "mlp.c_proj"]}
FIRST, SECOND = ({name: targets[i] for name, targets in TARGETS.items()} for i in (0, 1))


def lora(name, **fields):
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 5, "target_modules": TARGETS[name], **fields})


def trained(name, config, dtype=torch.float64, **changes):
    """A PeftModel whose factors and saved modules are not at their start, over a model of its own."""
    model = peft.get_peft_model(FAMILIES[name].model(dtype, **changes), config).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.5).to(parameter))
    return model


CONFIGS = {
    "plain": lambda name: lora(name),
    "patterns": lambda name: lora(name, rank_pattern={FIRST[name]: 3}, alpha_pattern={SECOND[name]: 7}),
    "rslora, both patterns": lambda name: lora(
        name, use_rslora=True, rank_pattern={FIRST[name]: 3}, alpha_pattern={FIRST[name]: 4, SECOND[name]: 7}
    ),
    "one layer": lambda name: lora(name, layers_to_transform=[1]),
    "all-linear": lambda name: lora(name, target_modules="all-linear", lora_dropout=0.25),
    "a regular expression": lambda name: lora(name, target_modules=rf".*\.1\..*{FIRST[name]}"),
    "a rank above what the linear holds": lambda name: lora(name, r=25, fan_in_fan_out=name == "gpt2"),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", TARGETS)
def test_logits_are_equal_from_a_model_and_from_a_directory(name, kind, tmp_path):
    family, model = FAMILIES[name], trained(name, CONFIGS[kind](name))
    expected = outputs(model, family.inputs())[0]
    assert (expected - outputs(family.model(), family.inputs())[0]).abs().max() > 1e-3
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "peft")
    theirs = {n.removeprefix("base_model.model.") for n, module in model.named_modules() if hasattr(module, "lora_A")}
    for source in (model, str(tmp_path / "peft")):
        base = family.model()
        apt = APTModel.from_peft(base, source).eval()
        assert apt.model is base and {n for n, adapter in adapters(apt) if adapter.rank} == theirs
        torch.testing.assert_close(outputs(apt, family.inputs())[0], expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    dropped = {adapter.dropout for _, adapter in adapters(apt) if adapter.rank}
    assert dropped == {0.25 if kind == "all-linear" else 0.0} and apt.saved == []
    if kind != "patterns":
        return
    apt.save_pretrained(tmp_path / "ours")
    again = APTModel.from_pretrained(family.model(), tmp_path / "ours").eval()
    assert torch.equal(outputs(again, family.inputs())[0], outputs(apt, family.inputs())[0])
    torch.testing.assert_close(outputs(shrink(apt), family.inputs())[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "saved"), [("bert", ["classifier", "pooler"]), ("llama", ["lm_head"]), ("gpt2", ["ln_f", "h.1.mlp.c_fc"])]
)
def test_modules_that_trained_whole_come_through(name, saved, tmp_path):
    family = FAMILIES[name]
    model = trained(name, lora(name, target_modules=[FIRST[name]], modules_to_save=saved))
    expected = outputs(model, family.inputs())[0]
    model.save_pretrained(tmp_path)
    for source in (model, tmp_path):
        apt = APTModel.from_peft(family.model(), source).eval()
        assert len(apt.saved) == len(saved) and all(any(f".{n}".endswith(f".{end}") for n in apt.saved) for end in saved)
        assert all(p.requires_grad for n in apt.saved for p in apt.get_submodule(f"model.{n}").parameters() if p.numel())
        torch.testing.assert_close(outputs(apt, family.inputs())[0], expected, rtol=1e-5, atol=1e-5)
    again = APTModel.from_peft(family.model(torch.bfloat16), tmp_path, dataclasses.replace(apt.apt_config, float32_factors=True))
    assert {p.dtype for p in again.parameters() if p.requires_grad} == {torch.float32}


def test_modules_are_saved_whose_names_end_so_without_a_dot(tmp_path):
    family, model = FAMILIES["llama"], trained("llama", lora("llama", modules_to_save=["norm"]))
    model.save_pretrained(tmp_path)
    for source in (model, tmp_path):
        apt = APTModel.from_peft(family.model(), source).eval()
        assert len(apt.saved) == 5  # with both norms of both layers, as in PEFT
        torch.testing.assert_close(outputs(apt, family.inputs())[0], outputs(model, family.inputs())[0], rtol=1e-5, atol=1e-5)


def test_the_head_of_a_task_comes_through(tmp_path):
    family = FAMILIES["bert"]
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    model = trained("bert", config)
    apt = APTModel.from_peft(family.model(), model).eval()
    assert apt.saved == ["classifier"]
    torch.testing.assert_close(outputs(apt, family.inputs())[0], outputs(model, family.inputs())[0], rtol=1e-5, atol=1e-5)
    own = APTConfig.from_peft(model.peft_config["default"], density=0.5)
    assert own.modules_to_save is None and get_apt_model(family.model(), own).saved == ["classifier"]


def test_pruning_goes_on_from_there(tmp_path):
    family, model = FAMILIES["llama"], trained("llama", lora("llama"))
    config = APTConfig.from_peft(model.peft_config["default"], density=0.5, max_rank=4)
    assert (config.r, config.lora_alpha, config.density, config.target_modules) == (2, 5, 0.5, sorted(TARGETS["llama"]))
    apt = APTModel.from_peft(family.model(), model, config).eval()
    torch.testing.assert_close(outputs(apt, family.inputs())[0], outputs(model, family.inputs())[0], rtol=1e-5, atol=1e-5)
    small = shrink(keep_first(apt, neurons=8))
    torch.testing.assert_close(outputs(small, family.inputs())[0], outputs(apt, family.inputs())[0])


def test_a_scaling_that_was_changed_on_the_model_is_the_models():
    family, model = FAMILIES["llama"], trained("llama", lora("llama"))
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.5)
    apt = APTModel.from_peft(family.model(), model).eval()
    torch.testing.assert_close(outputs(apt, family.inputs())[0], outputs(model, family.inputs())[0], rtol=1e-5, atol=1e-5)


def test_a_compiled_model_and_an_adapter_of_any_name():
    family = FAMILIES["bert"]
    model = peft.get_peft_model(family.model(), lora("bert"), adapter_name="query").eval()
    with torch.no_grad():
        model.base_model.model.bert.encoder.layer[0].attention.self.query.lora_B["query"].weight.fill_(0.3)
    expected = outputs(model, family.inputs())[0]
    apt = APTModel.from_peft(torch.compile(family.model(), backend="eager"), torch.compile(model, backend="eager")).eval()
    torch.testing.assert_close(outputs(apt, family.inputs())[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_dora": True}, "use_dora has no meaning"),
        ({"bias": "all"}, "expected bias='none'"),
        ({"bias": "lora_only"}, "expected bias='none'"),
        ({"lora_bias": True}, "lora_bias has no meaning"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices has no meaning"),
        ({"target_parameters": ["down_proj.weight"], "target_modules": []}, "target_parameters has no meaning"),
    ],
    ids=str,
)
def test_what_there_is_not_is_refused_by_name(fields, words, tmp_path):
    config = lora("llama", **fields)
    with pytest.raises(ValueError, match=words):
        APTConfig.from_peft(config)
    config.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    base = FAMILIES["llama"].model()
    with pytest.raises(ValueError, match=f"{tmp_path}/adapter_config.json: .*{words}"):
        APTModel.from_peft(base, tmp_path)
    assert not list(adapters(base))


def test_what_only_a_model_can_resolve_is_refused_by_the_config_alone():
    for fields, words in (
        ({"target_modules": None}, "target_modules"),
        ({"use_rslora": True, "rank_pattern": {"q_pro[j]": 3}, "alpha_pattern": {"q_proj": 3}}, "use_rslora"),
    ):
        with pytest.raises(ValueError, match=words):
            APTConfig.from_peft(lora("llama", **fields))
    with pytest.raises(ValueError, match="peft_type LORA, got VERA"):
        APTConfig.from_peft(peft.VeraConfig())
    for other in ({}, {"r": 2}, "llama", None):
        with pytest.raises(TypeError, match="lora_config: expected a peft.LoraConfig"):
            APTConfig.from_peft(other)
    stable = APTConfig.from_peft(lora("llama", use_rslora=True, r=4, alpha_pattern={"q_proj": 3}))
    assert (stable.scaling_of("a.q_proj"), stable.scaling_of("a.down_proj")) == (1.5, 2.5)


def adapter_at(directory, **fields):
    trained("llama", lora("llama", **fields)).save_pretrained(directory)
    return directory


def no_weights(directory):
    (directory / "adapter_model.safetensors").unlink()
    return directory, ValueError, "adapter_model.safetensors: expected a file that PEFT wrote, got none$"


def a_pickle(directory):
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    return directory, ValueError, "adapter_model.bin is a pickle, which is never read"


def not_safetensors(directory):
    (directory / "adapter_model.safetensors").write_bytes(b"no")
    return directory, ValueError, "adapter_model.safetensors: expected safetensors"


def not_json(directory):
    (directory / "adapter_config.json").write_text("{")
    return directory, ValueError, "adapter_config.json: expected JSON"


def endless_json(directory):
    (directory / "adapter_config.json").write_text(" " * (1 << 20) + "{}")
    return directory, ValueError, "adapter_config.json: expected at most 1048576 bytes, got more"


def deep_json(directory):
    (directory / "adapter_config.json").write_text("[" * 100_000)
    return directory, ValueError, "adapter_config.json: expected JSON"


def a_key_twice(directory):
    (directory / "adapter_config.json").write_text('{"r": 2, "r": 3}')
    return directory, ValueError, "adapter_config.json: expected JSON, got something else .*each key once"


def no_rank(directory):
    values = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**values, "r": 0}))
    return directory, ValueError, "adapter_config.json: lora_config: r must be at least 1, got 0"


def another_kind(directory):
    values = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**values, "peft_type": "IA3"}))
    return directory, ValueError, "adapter_config.json: lora_config: expected peft_type LORA, got IA3"


def within(directory):
    return directory.parent, ValueError, "give the directory of one adapter: peft"


def other_sizes(directory):
    trained("llama", lora("llama"), intermediate_size=28).save_pretrained(directory)
    return directory, ValueError, "base_model: expected model.layers.0.mlp.down_proj of the sizes of PEFT's factors"


def other_names(directory):
    trained("bert", lora("bert")).save_pretrained(directory)
    return directory, ValueError, "base_model: expected a linear bert.encoder.layer.0"


def embeddings(directory):
    adapter_at(directory, target_modules=["q_proj", "embed_tokens"])
    return directory, ValueError, "adapter_model.safetensors: expected factors"


def several(directory):
    model = trained("llama", lora("llama"))
    model.add_adapter("other", lora("llama"))
    return model, ValueError, "peft: expected a PeftModel with one adapter, got default, other"


def prompts(directory):
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    return peft.get_peft_model(FAMILIES["llama"].model(), config), ValueError, "peft_type LORA, got PROMPT_TUNING"


def no_adapter(directory):
    return FAMILIES["llama"].model(), TypeError, "peft: expected a directory or a PeftModel, got a LlamaForCausalLM"


def no_path(directory):
    return 3, TypeError, "peft: expected a directory or a PeftModel, got int"


@pytest.mark.parametrize(
    "change",
    [
        no_weights, a_pickle, not_safetensors, not_json, endless_json, deep_json, a_key_twice, no_rank, another_kind, within, other_sizes,
        other_names, embeddings, several, prompts, no_adapter, no_path,
    ],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_what_cannot_be_read_is_refused_and_nothing_changes(change, tmp_path):
    source, kind, words = change(adapter_at(tmp_path / "peft"))
    base = FAMILIES["llama"].model()
    before = [(name, id(module)) for name, module in base.named_modules()]
    with pytest.raises(kind, match=words):
        APTModel.from_peft(base, source)
    assert [(name, id(module)) for name, module in base.named_modules()] == before
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_an_expression_in_a_file_that_would_take_years_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    directory = adapter_at(tmp_path / "peft")
    values = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**values, "alpha_pattern": {r"(?:.|..)+[!?]": 3}}))
    base = FAMILIES["llama"].model()
    with pytest.raises(ValueError, match="adapter_model.safetensors: expected a regular expression that is tried on a name within 0.2 sec"):
        APTModel.from_peft(base, directory)
    assert not list(adapters(base))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (APTConfig(r=2, lora_alpha=5, target_modules=["q_proj"]), "expected model.layers.0.mlp.down_proj among target_modules"),
        (APTConfig(r=3, lora_alpha=5, target_modules=TARGETS["llama"]), "expected rank 2 and scaling 2.5 for .*, got 3"),
        (APTConfig(r=2, lora_alpha=4, target_modules=TARGETS["llama"]), "expected rank 2 and scaling 2.5 for .*, got 2 and 2"),
        (APTConfig(r=2, lora_alpha=5, target_modules=TARGETS["llama"]), "expected lm_head in modules_to_save"),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_is_refused(config, words, tmp_path):
    base = FAMILIES["llama"].model()
    weight = base.lm_head.weight.detach().clone()
    with pytest.raises(ValueError, match=words):
        APTModel.from_peft(base, trained("llama", lora("llama", modules_to_save=["lm_head"])), config)
    assert not list(adapters(base)) and torch.equal(base.lm_head.weight, weight)


def test_a_copy_of_a_tied_weight_is_refused():
    base = FAMILIES["llama-tied"].model()
    model = peft.get_peft_model(FAMILIES["llama-tied"].model(), lora("llama", modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(1.0)
    with pytest.raises(ValueError, match="lm_head.weight to be its own.*tied to model.embed_tokens"):
        APTModel.from_peft(base, model)
    assert base.lm_head.weight is base.model.embed_tokens.weight and not list(adapters(base))


def test_a_base_with_pefts_layers_in_it_is_refused():
    model = trained("llama", lora("llama"))
    for base in (model, model.get_base_model()):
        with pytest.raises(TypeError, match="base_model: expected a model without layers of PEFT"):
            APTModel.from_peft(base, model)
