"""APTConfig: validation, names and patterns, dict and back."""

import dataclasses
import json

import pytest

from apt_ext.config import APTConfig, Schedule, ends_with, select

LINEARS = [f"layer.{i}.{name}" for i in range(2) for name in ("self.query", "self.key", "dense")] + ["classifier"]


def targets(saved=(), output=None, **fields):
    return APTConfig(**fields).targets(LINEARS, saved, output)


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"r": 0}, ValueError, "r: expected at least 1, got 0"),
        ({"r": 2.0}, TypeError, "r: expected an int, got float"),
        ({"r": True}, TypeError, "r: expected an int, got bool"),
        ({"lora_alpha": float("nan")}, ValueError, "lora_alpha: expected a finite number"),
        ({"lora_alpha": "16"}, TypeError, "lora_alpha: expected a number, got str"),
        ({"lora_dropout": 1.0}, ValueError, r"lora_dropout: expected a probability in \[0, 1\), got 1.0"),
        ({"density": 1.5}, ValueError, "density: expected a share"),
        ({"round_to": 0}, ValueError, "round_to: expected at least 1"),
        ({"prune": ["head"]}, ValueError, "prune: expected kinds of heads, neurons, hidden, got 'head'"),
        ({"prune": "heads"}, TypeError, "prune: expected a list of names, got 'heads'"),
        ({"uniform": 1}, TypeError, "uniform: expected a bool, got int"),
        ({"float32_factors": None}, TypeError, "float32_factors: expected a bool, got NoneType"),
        ({"schedule": 0.5}, TypeError, "schedule: expected a Schedule or a dict of its fields, got float"),
        ({"schedule": {"stop": 3}}, ValueError, "schedule: expected fields of Schedule, got 'stop'"),
        ({"schedule": {"start": 1.5}}, ValueError, r"schedule.start: expected a number of steps \(int\) or a share of all in \[0, 1\]"),
        ({"schedule": {"end": "all"}}, TypeError, "schedule.end: expected a number, got str"),
        ({"schedule": {"window": -1}}, ValueError, "schedule.window: expected a number of steps"),
        ({"schedule": {"events": 0}}, ValueError, "schedule.events: expected at least 1, got 0"),
        ({"schedule": {"per_step": 1}}, TypeError, "schedule.per_step: expected a bool, got int"),
        ({"max_rank": 4}, ValueError, "max_rank: expected at least r"),
        ({"max_rank": 16, "rank_pattern": {"query": 32}}, ValueError, "max_rank: expected at least r"),
        ({"target_modules": []}, ValueError, "target_modules: expected at least one name"),
        ({"target_modules": None}, TypeError, "target_modules: expected a list of names or a regular expression"),
        ({"target_modules": "quer(y"}, ValueError, "target_modules: expected a regular expression"),
        ({"target_modules": ""}, ValueError, "empty"),
        ({"target_modules": ["query", ""]}, ValueError, "target_modules: expected names, got an empty one"),
        ({"modules_to_save": "classifier"}, TypeError, "modules_to_save: expected a list of names, got 'classifier'"),
        ({"exclude_modules": 3}, TypeError, "exclude_modules: expected a list"),
        ({"rank_pattern": {"query": 0}}, ValueError, r"rank_pattern\['query'\]: expected at least 1, got 0"),
        ({"rank_pattern": {"(": 1}}, ValueError, "key of rank_pattern: expected a regular expression"),
        ({"alpha_pattern": {"query": "x"}}, TypeError, r"alpha_pattern\['query'\]: expected a number"),
        ({"alpha_pattern": ["query"]}, TypeError, "alpha_pattern: expected a dict"),
    ],
)
def test_each_field_is_checked_in_words(fields, kind, words):
    with pytest.raises(kind, match=words):
        APTConfig(**fields)


def test_dict_and_back_through_json():
    config = APTConfig(r=4, target_modules=("query", "key"), rank_pattern={"query": 2}, modules_to_save=[], max_rank=12, prune=["hidden"])
    config = dataclasses.replace(config, schedule={"start": 100, "end": 1.0, "window": 20}, uniform=False)
    assert APTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.target_modules == ["query", "key"] and config.schedule == Schedule(100, end=1.0, window=20)


def test_an_unknown_key_names_the_closest():
    with pytest.raises(ValueError, match="got 'lora_aplha'; nearest: lora_alpha"):
        APTConfig.from_dict({"lora_aplha": 3})


def test_later_changes_of_the_callers_lists_do_not_reach_it():
    names, ranks = ["query"], {"query": 2}
    config = APTConfig(target_modules=names, rank_pattern=ranks)
    names.append("key")
    ranks["query"] = 99
    assert config.target_modules == ["query"] and config.rank_of("layer.0.self.query") == 2


def test_targets_by_name_end_expression_and_all():
    assert targets(target_modules=["query"]) == ["layer.0.self.query", "layer.1.self.query"]
    assert targets(target_modules=["1.self.query", "layer.0.dense"]) == ["layer.0.dense", "layer.1.self.query"]
    assert targets(target_modules=r"layer\.1\..*") == LINEARS[3:6]
    assert targets(saved=["classifier"]) == LINEARS[:6]
    assert targets(output="classifier") == LINEARS[:6]
    assert targets(output="classifier", target_modules=["classifier"]) == ["classifier"]
    assert targets(target_modules=["query", "key"], exclude_modules=["0.self.key"]) == [
        n for n in LINEARS if "self" in n and n != LINEARS[1]
    ]
    # the end of a name begins at a dot, and a name is no regular expression
    with pytest.raises(ValueError, match="nearest: "):
        targets(target_modules=["uery"])
    with pytest.raises(ValueError, match="got 'self.quer.'"):
        targets(target_modules=["self.quer."])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_modules": ["query", "qeury"]}, "target_modules: .*got 'qeury', which matches none; nearest: query"),
        ({"target_modules": ["self.kye"]}, "nearest: self.key"),
        ({"target_modules": "layer.9.*"}, "target_modules: .*got 'layer.9.*'"),
        ({"exclude_modules": ["vaule"]}, "exclude_modules: .*got 'vaule'"),
        ({"target_modules": ["query"], "exclude_modules": ["query"]}, "expected at least one linear layer"),
        ({"rank_pattern": {"valeu": 2}}, "rank_pattern: .*got 'valeu'"),
        ({"target_modules": ["query"], "alpha_pattern": {"key": 2}}, "alpha_pattern: .*got 'key'; nearest: query"),
    ],
)
def test_what_matches_nothing_is_an_error_with_the_nearest_names(fields, words):
    with pytest.raises(ValueError, match=words):
        targets(**fields)


def test_a_target_that_trains_whole_is_refused():
    with pytest.raises(ValueError, match="matches only classifier of modules_to_save"):
        targets(saved=["classifier"], target_modules=["query", "classifier"])


def test_patterns_match_the_end_as_in_peft_and_the_first_wins():
    config = APTConfig(r=8, lora_alpha=16, rank_pattern={"0.self.query": 2, "self.*": 4}, alpha_pattern={"query": 32})
    assert [config.rank_of(name) for name in LINEARS] == [2, 4, 8, 4, 4, 8, 8]
    assert [config.scaling_of(name) for name in LINEARS[:3]] == [16.0, 4.0, 2.0]
    assert ends_with("query", "self.query") and ends_with("query", "query") and not ends_with("query", "myquery")


def test_select_keeps_the_order_of_the_names():
    assert select("names", ["b", "a"], ["x.a", "x.b", "c"]) == ["x.a", "x.b"]
