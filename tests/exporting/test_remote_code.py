"""Widths of their own load by the code that the directory carries, in a process without apt_ext, and never at random."""

import copy
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from families import EMPTY_HEADS, FAMILIES, ONE_EACH, adapted, close, generated, mask_all, outputs, some, streams

from apt_ext import APTConfig, export, get_apt_model, load_export, shrink
from apt_ext.pruning.architectures.lookup import architecture_of, find_blocks
from apt_ext.pruning.sizes import Sizes
from apt_ext.storage import atomic_dir, per_layer, remote_code
from apt_ext.storage.per_layer import MANIFEST
from apt_ext.storage.shaped import widest

transformers = pytest.importorskip("transformers")
KINDS = ("heads", "neurons", "hidden")


def uneven(name, how="hard"):
    """A family, and its model cut to widths of its own in every layer."""
    family = FAMILIES[name]
    apt = adapted(family)
    return family, shrink(mask_all(apt, some(family, apt.blocks, KINDS, how)))


def body_of(small, family):
    """The last hidden state, of what the body alone returns."""
    with torch.no_grad():
        return small.base_model(**family.inputs())[0]


@pytest.fixture
def code_runs(monkeypatch, tmp_path):
    """transformers copies code into a place of this test, and this process loads it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", sys.path[:])


def auto_of(directory):
    names = json.loads((directory / "config.json").read_text())["auto_map"]
    return next(name for name in names if name not in ("AutoConfig", "AutoModel", "AutoModelForPreTraining"))


def loaded(directory, auto=None, **options):
    return getattr(transformers, auto or auto_of(directory)).from_pretrained(directory, trust_remote_code=True, **options)


@pytest.mark.parametrize("names", [ONE_EACH, pytest.param(tuple(FAMILIES), marks=pytest.mark.slow)], ids=["one each", "every family"])
def test_a_process_without_apt_ext_loads_and_generates(names, tmp_path):
    """One process for all: the task's class and the body, once more after save_pretrained, with a cache of other heads in every layer."""
    for name in names:
        family, small = uneven(name)
        small.save_pretrained(tmp_path / name)
        steps = generated(small, family.inputs(), use_cache=False) if family.decoder else []
        state = streams(small, family.inputs())[-1] if family.alike else body_of(small, family)
        torch.save((family.inputs(), outputs(small, family.inputs())[0], state, steps), tmp_path / f"{name}.pt")
    script = """
        import json, os, sys, torch
        sys.modules["apt_ext"] = None  # an import of it would fail
        import transformers
        transformers.logging.set_verbosity_error()
        auto_code = {"trust_remote_code": True, "dtype": "auto"}
        for name in sys.argv[1:]:
            inputs, expected, state, steps = torch.load(f"{name}.pt")
            autos = json.load(open(f"{name}/config.json"))["auto_map"]
            auto = next(one for one in autos if one not in ("AutoConfig", "AutoModel", "AutoModelForPreTraining"))
            model = getattr(transformers, auto).from_pretrained(name, **auto_code)
            body = transformers.AutoModel.from_pretrained(name, **auto_code)
            model.save_pretrained(f"{name}-again")
            body.save_pretrained(f"{name}-body")
            again = getattr(transformers, auto).from_pretrained(f"{name}-again", **auto_code)
            body_again = transformers.AutoModel.from_pretrained(f"{name}-body", **auto_code)
            with torch.no_grad():
                for one in (model, again):
                    assert (one(**inputs).logits - expected).abs().max() <= 1e-12, name
                for one in (body, body_again):
                    assert (one(**inputs)[0] - state).abs().max() <= 1e-12, name
            inputs.pop("decoder_input_ids", None)
            options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
            for cached in (True, False):
                found = again.generate(**inputs, **options, use_cache=cached).logits if steps else []
                assert len(found) == len(steps) and all((a - b).abs().max() <= 1e-10 for a, b in zip(found, steps)), name
            for auto_class in (getattr(transformers, auto), transformers.AutoModel, type(model).__mro__[2]):
                for ignoring in (False, True):
                    for directory in (name, f"{name}-again"):
                        try:
                            auto_class.from_pretrained(directory, ignore_mismatched_sizes=ignoring)
                        except OSError as error:
                            assert "no file named model.safetensors" in str(error)
                        else:
                            raise AssertionError(f"{name} was loaded without its code")
            print(name)
    """
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script), *names]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == list(names)


@pytest.mark.usefixtures("loaded_here", "code_runs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtype_and_shards_of_an_export_come_back(dtype, tmp_path):
    family = FAMILIES["llama"]
    apt = adapted(family, dtype=dtype)
    mask_all(apt, some(family, apt.blocks, ("heads", "neurons"), "hard"))
    export(apt, tmp_path / "small", per_layer=True, max_shard_size="3KB")
    assert len(list((tmp_path / "small").glob("apt_weights-*.safetensors"))) > 1
    again = loaded(tmp_path / "small")
    assert again.dtype == dtype
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in shrink(apt).state_dict().items())
    again.save_pretrained(tmp_path / "again", max_shard_size="4KB")
    assert len(list((tmp_path / "again").glob("apt_weights-*.safetensors"))) > 1
    assert all(torch.equal(value, loaded(tmp_path / "again").state_dict()[name]) for name, value in again.state_dict().items())


@EMPTY_HEADS
@pytest.mark.usefixtures("code_runs")
def test_ties_and_layers_with_nothing_left(tmp_path):
    apt = adapted(FAMILIES["llama-tied"])
    mask_all(apt, {"1.heads": torch.zeros(6), "0.neurons": torch.zeros(20), "hidden": torch.arange(24) % 2.0})
    small = shrink(apt)
    small.save_pretrained(tmp_path / "small")
    again = loaded(tmp_path / "small")
    assert again.lm_head.weight is again.model.embed_tokens.weight and again.model.layers[1].self_attn.q_proj.out_features == 0
    close(outputs(again, FAMILIES["llama-tied"].inputs()), outputs(small, FAMILIES["llama-tied"].inputs()))


@pytest.mark.usefixtures("code_runs")
def test_a_loaded_model_says_its_sizes_and_its_config_makes_another(tmp_path):
    family, small = uneven("bert")
    small.save_pretrained(tmp_path / "small")
    again = loaded(tmp_path / "small")
    assert type(again).__mro__[2] is transformers.BertForSequenceClassification
    for name, module in small.named_modules():
        theirs = again.get_submodule(name)
        for attribute in ("in_features", "out_features", "embedding_dim", "normalized_shape", "num_attention_heads", "all_head_size"):
            assert getattr(theirs, attribute, None) == getattr(module, attribute, None), (name, attribute)
    assert (again.config.hidden_size, again.config.intermediate_size) == (small.config.hidden_size, small.config.intermediate_size)
    other = transformers.AutoModelForSequenceClassification.from_config(copy.deepcopy(again.config), trust_remote_code=True)
    assert {name: value.shape for name, value in other.state_dict().items()} == {
        name: value.shape for name, value in small.state_dict().items()
    }
    again.config.save_pretrained(tmp_path / "config")
    kept = json.loads((tmp_path / "config" / "config.json").read_text())
    assert kept["hidden_size"] == kept["apt_per_layer"]["wide"]["hidden_size"] != again.config.hidden_size == 11


@pytest.mark.usefixtures("code_runs")
def test_load_export_runs_no_code_and_reads_directories_of_before(tmp_path):
    family, small = uneven("gpt2")
    small.save_pretrained(tmp_path / "small")
    (tmp_path / "small" / "modeling_apt.py").unlink()
    (tmp_path / "small" / "apt_weights.safetensors.index.json").unlink()
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    del config["auto_map"], config["apt_per_layer"]
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    (tmp_path / "small" / MANIFEST).unlink()
    atomic_dir.seal(tmp_path / "small", MANIFEST)
    close(outputs(load_export(tmp_path / "small"), family.inputs()), outputs(small, family.inputs()), 1e-12)


@pytest.mark.usefixtures("code_runs", "loaded_here")
def test_what_was_loaded_by_code_is_adapted_and_merged_and_its_export_says_the_way(tmp_path):
    family, small = uneven("bert")
    small.save_pretrained(tmp_path / "small")
    apt = get_apt_model(loaded(tmp_path / "small"), APTConfig(r=1))
    assert {block.count for block in apt.blocks.values() if block.kind == "hidden"} == {11}
    with pytest.raises(ValueError, match=r"transformers_modules.*; load the directory with apt_ext.load_export to prune it further"):
        export(apt, tmp_path / "other", per_layer=True)


DAMAGES = {
    "not an object": ("apt_per_layer", [], 'expected "apt_per_layer" with wide, real, shapes, attributes'),
    "another part": ("apt_per_layer", {"wide": {}}, 'expected "apt_per_layer" with wide, real, shapes, attributes'),
    "text as number": ("wide", {"hidden_size": "16"}, "expected numbers of the same entries"),
    "no shape": ("shapes", {"classifier.weight": "3x"}, 'expected "shapes" such as'),
    "code as shape": ("shapes", {"classifier.weight": "__import__('os')"}, 'expected "shapes" such as'),
    "a wider shape": ("shapes", {"classifier.weight": "3x999999"}, r"expected a shape of classifier.weight within \[3, 16\], got 3x999999"),
    "other dimensions": ("shapes", {"classifier.weight": "3"}, "expected a shape of classifier.weight within"),
    "text as attribute": ("attributes", {"bert": {"training": "x"}}, 'expected "attributes" that are numbers'),
}


@pytest.mark.usefixtures("code_runs")
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_code_trusts_no_value_of_the_config(damage, tmp_path):
    part, value, words = DAMAGES[damage]
    _, small = uneven("bert")
    small.save_pretrained(tmp_path / "small")
    file = tmp_path / "small" / "config.json"
    said = json.loads(file.read_text())
    if part == "apt_per_layer":
        said[part] = value
    else:
        said["apt_per_layer"][part] |= value
    file.write_text(json.dumps(said))
    with pytest.raises(ValueError, match=words):
        loaded(tmp_path / "small")


@pytest.mark.usefixtures("code_runs")
def test_an_attribute_that_is_no_number_is_not_set(tmp_path):
    family, small = uneven("bert")
    small.save_pretrained(tmp_path / "small")
    file = tmp_path / "small" / "config.json"
    said = json.loads(file.read_text())
    said["apt_per_layer"]["attributes"]["bert"] = {"forward": 3, "__class__": 1, "encoder": 2}
    file.write_text(json.dumps(said))
    close(outputs(loaded(tmp_path / "small"), family.inputs()), outputs(small, family.inputs()), 1e-12)


@pytest.mark.usefixtures("code_runs")
def test_push_to_hub_of_save_pretrained_is_refused(tmp_path):
    _, small = uneven("bert")
    small.save_pretrained(tmp_path / "small")
    again = loaded(tmp_path / "small")
    with pytest.raises(ValueError, match=r"push_to_hub: expected False, got True; call push_to_hub\(repo_id\)"):
        again.save_pretrained(tmp_path / "other", push_to_hub=True)
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("code_runs", "loaded_here")
def test_export_loads_it_by_its_code_before_it_takes_its_place(tmp_path, monkeypatch):
    family = FAMILIES["bert"]
    apt = adapted(family)
    mask_all(apt, some(family, apt.blocks, ("neurons",), "hard"))
    monkeypatch.setattr(remote_code, "_shapes", lambda *_: {})
    words = "expected AutoModelForSequenceClassification with trust_remote_code=True to load it again, but it does not"
    with pytest.raises(ValueError, match=words):
        export(apt, tmp_path / "small", per_layer=True)
    assert not (tmp_path / "small").exists()


@pytest.mark.usefixtures("loaded_here")
def test_a_class_that_cannot_be_made_on_meta_is_written_for_load_export_alone(tmp_path, monkeypatch, caplog):
    family = FAMILIES["bert"]
    apt = adapted(family)
    mask_all(apt, some(family, apt.blocks, ("neurons",), "hard"))
    init = transformers.BertForSequenceClassification.__init__

    def reads_values(self, config):
        init(self, config)
        float(self.classifier.weight.sum())

    monkeypatch.setattr(transformers.BertForSequenceClassification, "__init__", reads_values)
    export(apt, tmp_path / "small", per_layer=True)
    assert "carries no code for trust_remote_code=True" in caplog.text
    assert not (tmp_path / "small" / "modeling_apt.py").exists()
    assert "trust_remote_code" not in (tmp_path / "small" / "README.md").read_text()
    close(outputs(load_export(tmp_path / "small"), family.inputs()), outputs(apt, family.inputs()))


@pytest.mark.usefixtures("code_runs")
@pytest.mark.parametrize("name", ["gemma", "t5"])
def test_constants_are_those_of_the_hidden_size_that_is_left(name, tmp_path, monkeypatch):
    """Where a config has to say more hidden dimensions than there are: Gemma scales its embedding by them, T5 its output."""
    field = {"gemma": "hidden_size", "t5": "d_model"}[name]
    family, small = uneven(name)
    real = widest(architecture_of(small), Sizes.of(small, find_blocks(small)))
    entry = field if field in real else "hidden_size"
    monkeypatch.setattr(per_layer, "widest", lambda *_: {**real, entry: real[entry] + 5})
    small.save_pretrained(tmp_path / "small")
    assert json.loads((tmp_path / "small" / "config.json").read_text())[field] == real[entry] + 5
    for again in (loaded(tmp_path / "small"), load_export(tmp_path / "small")):
        close(outputs(again, family.inputs()), outputs(small, family.inputs()), 1e-10)
