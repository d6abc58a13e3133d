"""What an export says of itself, and what travels with it."""

import json
import re

import pytest
import torch
from families import FAMILIES, adapted, close, keep_first, mask_all, outputs, some

import apt_ext
from apt_ext import APTConfig, export, get_apt_model, shrink
from apt_ext.pruning.target import Target

transformers = pytest.importorskip("transformers")
huggingface_hub = pytest.importorskip("huggingface_hub")
pytestmark = pytest.mark.usefixtures("loaded_here")


@pytest.fixture(autouse=True)
def _code_runs(monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def commands(card):
    return [block for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "transformers" in block]


def exported(tmp_path, name="bert", **options):
    family = FAMILIES[name]
    apt = keep_first(adapted(family), neurons=7)
    apt.config._name_or_path = "someone/tiny"
    export(apt, tmp_path / "small", **options)
    return apt, (tmp_path / "small" / "README.md").read_text(), json.loads((tmp_path / "small" / "provenance.json").read_text())


def test_the_card_is_one_that_the_hub_reads(tmp_path):
    apt, card, _ = exported(tmp_path, metrics={"accuracy": 0.875, "eval_loss": 1})
    data = huggingface_hub.ModelCard(card).data
    assert (data.library_name, data.base_model, data.pipeline_tag) == ("transformers", "someone/tiny", "text-classification")
    assert {"apt_ext", "structured-pruning"} <= set(data.tags)
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found == {"accuracy": 0.875, "eval_loss": 1}
    assert "| accuracy | 0.875 |" in card and "| eval_loss | 1 |" in card
    assert f"Density: {apt.density:.4f} of the layers' parameters are kept" in card
    assert "| neurons a layer | 7 | 20 |" in card and "| hidden | 24 | 24 |" in card
    assert "| 1 | 3 of 3 | 7 of 20 |" in card


def test_its_commands_load_the_model(tmp_path, monkeypatch):
    apt, card, _ = exported(tmp_path)
    monkeypatch.chdir(tmp_path)
    (command,) = commands(card)
    names = {}
    exec(command, names)  # noqa: S102  # of the card that was just written
    close(outputs(names["model"], FAMILIES["bert"].inputs()), outputs(apt, FAMILIES["bert"].inputs()))


def test_its_commands_load_widths_of_their_own(tmp_path, monkeypatch):
    family = FAMILIES["llama"]
    apt = adapted(family)
    mask_all(apt, some(family, apt.blocks, ("heads", "neurons"), "hard"))
    export(apt, tmp_path / "small", per_layer=True)
    card = (tmp_path / "small" / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", __import__("sys").path[:])
    names = {}
    for command in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(command, names)  # noqa: S102  # of the card that was just written
        close(outputs(names["model"], family.inputs()), outputs(apt, family.inputs()))
    assert "custom_code" in huggingface_hub.ModelCard(card).data.tags and "trust_remote_code=True" in card


def test_provenance_says_versions_base_settings_and_what_was_kept(tmp_path):
    apt, _, said = exported(tmp_path, metrics={"accuracy": 0.5})
    assert (said["apt_ext"], said["torch"], said["transformers"]) == (apt_ext.__version__, torch.__version__, transformers.__version__)
    assert said["base"] == {"kind": "BertForSequenceClassification", "name": "someone/tiny", "revision": None}
    assert said["kept"]["1.neurons"] == 7 and said["before"]["1.neurons"] == 20 and said["density"] == apt.density
    assert APTConfig.from_dict(said["config"]) == apt.apt_config and set(said["ranks"].values()) == {2}
    assert said["metrics"] == {"accuracy": 0.5} and said["target"] is None
    assert said["parameters"] == sum(parameter.numel() for parameter in shrink(apt).parameters())


def test_it_is_the_same_whenever_and_wherever_it_is_written(tmp_path):
    _, card, said = exported(tmp_path / "one")
    _, again, other = exported(tmp_path / "two")
    assert card == again and said == other and str(tmp_path) not in card


def test_a_target_and_a_second_prune_are_said(tmp_path):
    apt = keep_first(adapted(FAMILIES["bert"]), neurons=7)
    apt.cut()
    apt.target = Target(0.5, "flops", reached=True)
    export(apt, tmp_path / "small")
    card = (tmp_path / "small" / "README.md").read_text()
    assert "; the target was 0.5 of the flops.\n" in card and "| neurons a layer | 7 | 20 |" in card
    assert json.loads((tmp_path / "small" / "provenance.json").read_text())["target"] == apt.target.to_dict()


@pytest.mark.parametrize(
    ("name", "path", "words"),
    [
        ("llama", "", "A `LlamaForCausalLM` with "),
        ("t5", "/data/models/tiny-t5", "A `T5ForConditionalGeneration` of `tiny-t5` with "),
    ],
)
def test_what_is_not_known_is_left_out(name, path, words, tmp_path):
    small = shrink(keep_first(adapted(FAMILIES[name]), neurons=7))
    small.config._name_or_path = path
    export(small, tmp_path / "small", metrics={"loss": 1.5})
    card = (tmp_path / "small" / "README.md").read_text()
    data = huggingface_hub.ModelCard(card).data
    assert words in card and data.base_model is None and "Density" not in card and "/data/models" not in card
    assert "| neurons a layer | 7 | unknown |" in card
    assert data.pipeline_tag == (None if name == "t5" else "text-generation") and (data.eval_results is None) == (name == "t5")


@pytest.mark.parametrize(
    ("metrics", "kind", "words"),
    [
        ([("a", 1)], TypeError, "metrics: expected a dict, got list"),
        ({"a": "1"}, TypeError, r"metrics\['a'\] must be a number, got str"),
        ({"a": True}, TypeError, r"metrics\['a'\] must be a number, got bool"),
        ({"a": float("nan")}, ValueError, r"metrics\['a'\] must be a finite number, got nan"),
        ({"a\nb": 1}, ValueError, "metrics: expected printable names of metrics"),
        ({3: 1}, ValueError, "metrics: expected printable names of metrics, got 3"),
    ],
)
def test_metrics_are_numbers(metrics, kind, words, tmp_path):
    with pytest.raises(kind, match=words):
        exported(tmp_path, metrics=metrics)
    assert not (tmp_path / "small").exists()


# -- what travels ------------------------------------------------------------------------------------------------------


def test_processors_templates_and_generation_travel_from_the_source(tmp_path):
    (tmp_path / "source").mkdir()
    files = ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "processor_config.json", "generation_config.json")
    for name in (*files, "model.safetensors", "other.py"):
        (tmp_path / "source" / name).write_text(name)
    apt = keep_first(adapted(FAMILIES["bert"]), neurons=7)
    apt.config._name_or_path = str(tmp_path / "source")
    export(apt, tmp_path / "small")
    for name in files:
        assert (tmp_path / "small" / name).read_text() == name
    assert not (tmp_path / "small" / "other.py").exists() and (tmp_path / "small" / "model.safetensors").stat().st_size > 1000
    assert "AutoTokenizer.from_pretrained" in (tmp_path / "small" / "README.md").read_text()


def test_the_models_own_generation_config_goes_before_that_of_the_source(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "generation_config.json").write_text('{"max_new_tokens": 3}')
    apt = keep_first(adapted(FAMILIES["llama"]), neurons=7)
    apt.config._name_or_path = str(tmp_path / "source")
    apt.model.generation_config.max_new_tokens = 17
    export(apt, tmp_path / "small")
    assert json.loads((tmp_path / "small" / "generation_config.json").read_text())["max_new_tokens"] == 17


def test_a_tokenizer_in_the_cache_of_the_hub_travels(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--someone--tiny" / "refs").mkdir()
    (tmp_path / "models--someone--tiny" / "refs" / "main").write_text("a" * 40)
    (snapshot / "vocab.txt").write_text("words")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    exported(tmp_path)
    assert (tmp_path / "small" / "vocab.txt").read_text() == "words"


def chatting():
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))  # noqa: S106
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")  # noqa: S106


def test_a_real_tokenizer_with_several_templates_comes_back(tmp_path):
    tokenizer = chatting()
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    exported(tmp_path, tokenizer=tokenizer)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "small")
    assert again.chat_template == tokenizer.chat_template and again("a").input_ids == tokenizer("a").input_ids


def test_templates_in_a_directory_of_the_source_are_named(tmp_path, caplog):
    tokenizer = chatting()
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "source")
    apt = keep_first(adapted(FAMILIES["bert"]), neurons=7)
    apt.config._name_or_path = str(tmp_path / "source")
    export(apt, tmp_path / "small")
    assert "additional_chat_templates" in caplog.text and "give the tokenizer with tokenizer=" in caplog.text


@pytest.mark.parametrize("how", ["shrink", "export", "merge", "copy", "gone"])
@pytest.mark.parametrize("before", [True, False])
def test_use_cache_is_what_it_was_before_training(before, how, tmp_path):
    pytest.importorskip("accelerate")
    model = FAMILIES["llama"].model(torch.float32)
    model.config.use_cache = before
    apt = get_apt_model(model, APTConfig(r=1))
    arguments = transformers.TrainingArguments(str(tmp_path / "run"), report_to=[], use_cpu=True)
    transformers.Trainer(apt, arguments)
    assert apt.config.use_cache is False  # or this tests nothing
    if how == "export":
        export(apt, tmp_path / "small")
        assert json.loads((tmp_path / "small" / "config.json").read_text())["use_cache"] is before
        return
    if how == "gone":
        inner = apt.model
        del apt
        apt = vars(inner)["push_to_hub"]._saving.whole()
    found = {"copy": lambda: __import__("copy").deepcopy(apt).merge_and_unload(), "merge": lambda: apt.merge_and_unload()}
    assert found.get(how, lambda: shrink(apt))().config.use_cache is before
