"""APTConfig.from_peft against real PEFT: the same linears, ranks, scalings and saved modules, or refused in words."""

import copy
import dataclasses
import logging
import sys
import time

import pytest
import torch
from families import FAMILIES

from apt_ext import APTConfig, adapters, get_apt_model
from apt_ext.common import patterns

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning",
    "ignore:.*use_rslora:UserWarning",
    "ignore:.*fan_in_fan_out:UserWarning",
)

EXACT = "model.layers.0.self_attn.q_proj"
LLAMA = {
    "a list": {"target_modules": ["q_proj", "mlp.up_proj"]},
    "a set": {"target_modules": {"q_proj", "v_proj"}},
    "an expression": {"target_modules": r".*layers\.1\..*(?:q|down)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "All-Linear": {"target_modules": "All-Linear"},
    "without a list": {"target_modules": "all-linear", "exclude_modules": ["q_proj", "mlp.up_proj"]},
    "without an expression": {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {r"layers\.1\..*": 3, "q_proj": 4},
        "alpha_pattern": {"^" + EXACT.replace(".", r"\."): 7, "up_proj": 9},
    },
    "a layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 1]},
    "no layers": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "a layer and a whole name": {"target_modules": ["v_proj", EXACT], "layers_to_transform": [1]},
    "a layer by its pattern": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "a layer by one of two": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "model.layers"]},
    "rslora": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "r": 3},
    "rslora, ranks by expressions": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "rank_pattern": {r".*\.1\..*": 3}},
    "rslora, both by names": {
        "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"],
        "use_rslora": True,
        "rank_pattern": {"q_proj": 3, "mlp.up_proj": 5, "v_proj": 2},
        "alpha_pattern": {"self_attn.q_proj": 7, "up_proj": 11, "down_proj": 13},
    },
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]},
}
BERT = {
    "a head": {"target_modules": ["query"], "task_type": "SEQ_CLS"},
    "a head that is named": {"target_modules": ["query"], "task_type": "TOKEN_CLS", "modules_to_save": ["classifier"]},
    "a head and more": {"target_modules": ["query"], "task_type": "SEQ_CLS", "modules_to_save": ["classifier", "pooler"]},
    "all but the head": {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
}
GPT2 = {"a layer": {"target_modules": ["c_attn", "mlp.c_proj"], "layers_to_transform": [1]}, "no task": {"target_modules": "all-linear"}}
CASES = {(family, kind): fields for family, kinds in (("llama", LLAMA), ("bert", BERT), ("gpt2", GPT2)) for kind, fields in kinds.items()}


def lora(**fields):
    """A configuration with lists of its own, to which PEFT adds."""
    return peft.LoraConfig(**copy.deepcopy({"r": 2, "lora_alpha": 5, "target_modules": ["q_proj"], **fields}))


@pytest.mark.parametrize("as_dict", [False, True], ids=["object", "dict"])
@pytest.mark.parametrize(("family", "kind"), CASES, ids=lambda text: text)
def test_the_same_linears_ranks_and_scalings(family, kind, as_dict):
    fields = CASES[family, kind]
    config = APTConfig.from_peft(lora(**fields).to_dict() if as_dict else lora(**fields))
    apt = get_apt_model(FAMILIES[family].model(), config)
    ours = {name: (adapter.rank, pytest.approx(adapter.scaling)) for name, adapter in adapters(apt) if adapter.rank}
    model = peft.get_peft_model(FAMILIES[family].model(), lora(**fields))
    modules = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
    theirs = {name: (m.r["default"], m.scaling["default"]) for name, m in modules.items() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert theirs == ours and theirs
    assert {name for name, module in modules.items() if isinstance(module, peft.utils.ModulesToSaveWrapper)} == set(apt.saved)


def test_the_first_number_of_a_name_is_its_layer():
    def model():
        expert = torch.nn.ModuleDict({"w": torch.nn.Linear(4, 4)})
        layer = torch.nn.ModuleDict({"experts": torch.nn.ModuleList([expert, copy.deepcopy(expert)])})
        stack = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer, copy.deepcopy(layer)])})
        return torch.nn.ModuleDict({"model": stack})

    for more in ({}, {"layers_pattern": ["layers"]}):
        fields = {"target_modules": ["w"], "layers_to_transform": [0], **more}
        theirs = peft.tuners.lora.LoraModel(model(), lora(**fields), "default")
        wrapped = {name.removeprefix("model.") for name, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
        apt = get_apt_model(model(), APTConfig.from_peft(lora(**fields)))
        assert {name for name, adapter in adapters(apt) if adapter.rank} == {f"model.layers.0.experts.{i}.w" for i in (0, 1)}
        assert {name for name, adapter in adapters(apt) if adapter.rank} == wrapped


def test_more_fields_are_added_and_a_clash_is_an_error():
    config = APTConfig.from_peft(lora(lora_dropout=0.1), density=0.5, prune=["heads"], max_rank=4, lora_dropout=0.1)
    assert (config.density, config.prune, config.max_rank, config.lora_dropout) == (0.5, ["heads"], 4, 0.1)
    for name, value, words in (
        ("r", 4, r"r: expected it in lora_config alone, which says 2, got 4; .*dataclasses.replace\(config, r=...\)"),
        ("exclude_modules", ["v_proj"], "exclude_modules: expected it in lora_config alone, which says None"),
        ("modules_to_save", None, r"modules_to_save: expected it in lora_config alone, which says \[\], got None"),
        ("prun", ["heads"], "more: expected fields of APTConfig, got 'prun'; nearest: prune"),
        ("max_rank", 1, "max_rank: expected at least r"),
    ):
        with pytest.raises(ValueError, match=words):
            APTConfig.from_peft(lora(), **{name: value})


# Each field of LoraConfig is in one of these.
TAKEN = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern",
    "use_rslora", "layers_to_transform", "layers_pattern", "task_type", "bias", "init_lora_weights",
}  # fmt: skip
WITHOUT_MEANING = {  # where it came from, and what only acts together with a field that is refused
    "auto_mapping": {"base_model_class": "Mine"}, "peft_version": "0.21.2", "base_model_name_or_path": "there", "revision": "main",
    "inference_mode": True, "fan_in_fan_out": True, "megatron_core": "other", "loftq_config": {"loftq_bits": 4}, "eva_config": {"rho": 1},
    "corda_config": {}, "lora_ga_config": {}, "qalora_group_size": 8, "runtime_config": {"ephemeral_gpu_offload": True},
}  # fmt: skip
REFUSED = {
    "bias": (["all", "lora_only"], "expected bias='none'"),
    "init_lora_weights": (["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga"], "path_initial_model_for_weight_conversion"),
    "use_dora": ([True], "merge_and_unload"),
    "lora_bias": ([True], "merge_and_unload"),
    "megatron_config": ([{"a": 1}, {}], "Megatron"),
    "trainable_token_indices": ([[1, 2], {"embed_tokens": [1]}], "name the embedding in modules_to_save"),
    "velora_config": ([{}], "merge_and_unload"),
    "alora_invocation_tokens": ([[1]], "acts on all tokens"),
    "use_qalora": ([True], "without quantisation"),
    "monteclora_config": ([{}], "merge_and_unload"),
    "layer_replication": ([[[0, 2], [1, 2]]], "replicate the layers in the base model"),
    "target_parameters": ([["experts.down_proj"]], "no lone Parameters"),
    "use_bdlora": ([{}], "merge_and_unload"),
    "arrow_config": ([{}], "no routing"),
    "kasa_config": ([{}], "merge_and_unload"),
    "ensure_weight_tying": ([True], "tied"),
    "r": ([0, -1], "r must be at least 1"),
    "rank_pattern": ([{"q_proj": 0}, {"(": 2}], "rank_pattern"),
    "something_new": ([3], "this version does not know it"),
}


def test_every_field_of_peft_is_taken_without_meaning_or_refused():
    names = {entry.name for entry in dataclasses.fields(peft.LoraConfig)}
    assert names == TAKEN | WITHOUT_MEANING.keys() | REFUSED.keys() - {"something_new"}
    default = APTConfig.from_peft(lora())
    for name, value in WITHOUT_MEANING.items():
        assert APTConfig.from_peft(lora().to_dict() | {name: value}) == default, name


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, (values, _) in REFUSED.items() for value in values], ids=str)
def test_what_there_is_not_is_refused_with_its_remedy(name, value):
    with pytest.raises(ValueError, match=f"lora_config: .*{name}.*") as raised:
        APTConfig.from_peft(lora().to_dict() | {name: value})
    assert REFUSED[name][1] in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"target_modules": None}, ValueError, "expected target_modules, got None, which PEFT resolves"),
        ({"target_modules": 3}, TypeError, "target_modules: expected a list of names, got 3"),
        ({"target_modules": "a(b"}, ValueError, "target_modules: expected a regular expression"),
        ({"target_modules": "all-linear", "layers_to_transform": [1]}, ValueError, "expected target_modules as a list where layers_to"),
        ({"layers_to_transform": [1], "layers_pattern": ["a|b"]}, ValueError, "layers_pattern to hold names .*got 'a|b'"),
        ({"layers_to_transform": [-1]}, ValueError, "layers_to_transform must be at least 0"),
        ({"modules_to_save": "lm_head"}, TypeError, "modules_to_save: expected a list of names"),
        ({"rank_pattern": [2]}, TypeError, "rank_pattern: expected a dict"),
        ({"alpha_pattern": {"q_proj": "x"}}, TypeError, r"alpha_pattern\['q_proj'\] must be a number"),
        ({"lora_dropout": "x"}, TypeError, "lora_dropout: expected a number"),
        ({"use_rslora": True, "rank_pattern": {"q.*": 3}, "alpha_pattern": {"q_proj": 3}}, ValueError, "use_rslora with rank_pattern or"),
        (
            {"task_type": "SEQ_CLS", "modules_to_save": ["pooler", "classifier", "score"]},
            ValueError,
            "name the one head of the model beside pooler, .*PEFT adds classifier and score",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused_in_words(fields, kind, words):
    with pytest.raises(kind, match=words):
        APTConfig.from_peft(lora().to_dict() | fields)


def test_another_start_is_said_once(caplog):
    with caplog.at_level(logging.WARNING, "apt_ext"):
        APTConfig.from_peft(lora())
        assert not caplog.records
        for start in ("gaussian", "orthogonal", False):
            caplog.clear()
            APTConfig.from_peft(lora(init_lora_weights=start))
            assert f"init_lora_weights: {start!r} is not taken over" in caplog.text and len(caplog.records) == 1


def test_embeddings_and_other_modules_as_targets_are_named():
    for target, words in (
        ("embed_tokens", "matches only model.embed_tokens, of class Embedding and no linear"),
        ("mlp", r"matches only model.layers.0.mlp, model.layers.1.mlp, of class LlamaMLP and no linear; nearest"),
    ):
        with pytest.raises(ValueError, match=words):
            get_apt_model(FAMILIES["llama"].model(), APTConfig.from_peft(lora(target_modules=["q_proj", target])))


@pytest.mark.parametrize("hostile", [r"(?:.|..)+[!?]", r"(?:\w|.)+[!?]", r"(?:.|..)+(?<=[!?])"], ids=str)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_an_expression_that_would_take_years_is_refused(field, hostile, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    value = {hostile: 3} if field.endswith("pattern") else hostile
    config = APTConfig.from_peft(lora().to_dict() | {field: value})
    began = time.monotonic()
    with pytest.raises(ValueError, match="tried on a name within 0.2 seconds, got .*list the names"):
        get_apt_model(FAMILIES["llama"].model(), config)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("has_regex", [True, False])
def test_patterns_are_read_alike_without_the_package_regex(has_regex, monkeypatch):
    if not has_regex:
        monkeypatch.setitem(sys.modules, "regex", None)
    patterns._matcher.cache_clear()
    try:
        assert patterns.ends_with("q_proj", "model.q_proj") and not patterns.ends_with("q_proj", "model.xq_proj")
        assert patterns.ends_with(r"^model\.q", "model.q") and not patterns.ends_with(r"^model\.q", "a.model.q")
        assert patterns.ends_with("a|b", "x.b") and patterns.matches(r".*\d", "x1") and not patterns.matches(r".*\d", "x1.")
    finally:
        patterns._matcher.cache_clear()
