"""apt-ext shrink and plan: what cannot be done is said in words, and before anything that takes long."""

import json
import shutil

import pytest
import torch
from families import FAMILIES
from small_source import command, letters

from apt_ext.tools import cli, shrinking
from apt_ext.tools.cli import main
from apt_ext.tools.data import Review, split_reviews
from apt_ext.tools.models import positions

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("loaded_here")


@pytest.fixture
def source(tmp_path):
    return letters(tmp_path)


@pytest.fixture
def idle(monkeypatch):
    """Nothing runs."""
    for name in ("shrink_model", "shrink_random", "demo"):
        monkeypatch.setattr(cli, name, lambda *arguments, **options: pytest.fail("it ran"))


def changed(directory, **values):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **values}))
    return directory


# -- places ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("where", ["file", "file/deep"])
def test_an_output_that_cannot_be_written_in_is_said_first(source, tmp_path, capsys, idle, where, random):
    (tmp_path / "file").write_text("")
    more = ["--random"] if random else ["--text", "t"]
    assert main(["shrink", str(source), "--keep", "heads=2", "--output", str(tmp_path / where), *more]) == 1
    assert f"output: expected a directory to write in, got '{tmp_path / where}': Not a directory" in capsys.readouterr().err
    assert main(["demo", "--output", str(tmp_path / where)]) == 1
    assert "output: expected a directory to write in" in capsys.readouterr().err


def test_an_output_that_is_read_only_is_said_first(source, tmp_path, capsys, idle, monkeypatch):
    def refused(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)  # root may write everywhere
    assert command(source, tmp_path / "deep" / "out", "--keep", "heads=2") == 1
    assert "output: expected a directory to write in" in (said := capsys.readouterr().err) and "Permission denied" in said
    assert not (tmp_path / "deep").exists()


def test_a_json_that_cannot_be_written_is_said_first(source, tmp_path, capsys, idle):
    (tmp_path / "file").write_text("")
    assert command(source, tmp_path / "out", "--keep", "heads=2", "--json", str(tmp_path / "file" / "x.json")) == 1
    assert "json: expected a directory to write in" in capsys.readouterr().err
    assert command(source, tmp_path / "out", "--keep", "heads=2", "--json", str(tmp_path)) == 1
    assert "json: expected a file's name, got the directory" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_directory_of_the_json_is_made(source, tmp_path, monkeypatch):
    seen = []

    def quick(*arguments, **options):
        seen.append((tmp_path / "deep" / "er").is_dir() and (tmp_path / "out").is_dir())
        return {"loaded by": "nothing"}

    monkeypatch.setattr(cli, "shrink_model", quick)
    monkeypatch.setattr(cli, "table", str)
    file = tmp_path / "deep" / "er" / "x.json"
    assert command(source, tmp_path / "out", "--keep", "heads=2", "--json", str(file)) == 0
    assert seen == [True] and json.loads(file.read_text())["loaded by"] == "nothing"


def test_of_a_run_that_fails_no_directory_stays(source, tmp_path, capsys):
    (source / "config.json").unlink()
    assert command(source, tmp_path / "a" / "out", "--keep", "heads=2", "--json", str(tmp_path / "b" / "x.json")) == 1
    assert "expected a directory with a config.json" in capsys.readouterr().err
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", ["99999999999999999999999", str(2**63), str(-(2**63) - 1), "one", "1.5"])
@pytest.mark.parametrize("name", ["shrink", "demo"])
def test_a_seed_that_is_none(source, tmp_path, capsys, idle, name, seed):
    with pytest.raises(SystemExit):
        command(source, tmp_path / "out", "--keep", "heads=2", f"--seed={seed}") if name == "shrink" else main(["demo", f"--seed={seed}"])
    assert "argument --seed: expected a whole number from -2^63 to 2^63 - 1, got" in capsys.readouterr().err


@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 1])
def test_seeds_at_the_ends_are_seeds(seed):
    options = cli._parser().parse_args(["shrink", "m", "--keep", "heads=1", f"--seed={seed}"])
    for more in range(3):  # as the command does
        torch.Generator().manual_seed(options.seed + more)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "roberta"])
def test_random_inputs_longer_than_the_model_are_said(tmp_path, capsys, family):
    directory = letters(tmp_path, family)
    most = positions(FAMILIES[family].model(torch.float32))
    assert most == FAMILIES[family].model(torch.float32).config.max_position_embeddings - (2 if family == "roberta" else 0)
    arguments = ["--random", "--keep", "neurons=7", "--output", str(tmp_path / "out"), "--batch", "1", "--device", "cpu"]
    for length in (1600, most + 1):
        assert main(["shrink", str(directory), *arguments, "--length", str(length)]) == 1
        assert f"length: expected at most the {most} positions of " in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_the_longest_inputs_fit(family):
    model = FAMILIES[family].model(torch.float32)
    with torch.no_grad():
        model(torch.full((1, positions(model)), 5))
        with pytest.raises(Exception):  # noqa: B017, PT011  # whatever torch raises there
            model(torch.full((1, positions(model) + 1), 5))


def test_reviews_are_no_longer_than_the_model(source):
    split = split_reviews([Review(f"a film {i} " * 30, i % 2) for i in range(3000)])
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = "[UNK]"  # noqa: S105
    for most, length in ((16, 16), (None, 64), (512, 64)):
        reviews = shrinking.Reviews(split, tokenizer, shrinking.Settings(keep={}), most)
        assert max(batch["input_ids"].shape[1] for batch in reviews.tests()) == length


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": -1},
        {"hidden_size": "wide"},
        {"vocab_size": -1},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 0},
        {"hidden_act": "none such"},
        {"architectures": [3]},
        {"architectures": ["BertModel"]},
    ],
    ids=str,
)
def test_a_config_that_is_no_model_is_said(source, tmp_path, capsys, values, random):
    changed(source, **values)
    shrink = ["shrink", str(source), "--random", "--keep", "heads=2", "--output", str(tmp_path / "out")]
    assert main(shrink if random else ["plan", str(source)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"apt-ext: model: {source / 'config.json'}: ") and said.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["pipeline", "AutoConfig", "LlamaConfig", "NoSuch"])
def test_an_architecture_that_is_no_model_is_as_none(source, capsys, name):
    assert main(["plan", str(changed(source, architectures=[name]))]) == 0
    assert capsys.readouterr().out.startswith("LlamaModel:")


@pytest.mark.parametrize("other", ["gpt2", "bert", "one"])
def test_weights_of_another_model_are_said(source, tmp_path, capsys, other):
    if other == "one":
        from safetensors.torch import load_file, save_file

        state = load_file(source / "model.safetensors")
        state.pop("model.layers.1.mlp.up_proj.weight")
        save_file(state, source / "model.safetensors", {"format": "pt"})
    else:
        FAMILIES[other].model(torch.float32).save_pretrained(tmp_path / "other")
        shutil.copy(tmp_path / "other" / "model.safetensors", source)
    assert command(source, tmp_path / "out", "--keep", "heads=2") == 1
    said = capsys.readouterr().err
    assert f"apt-ext: model: {source}: expected the weights of LlamaForCausalLM, found none for " in said
    assert ("found none for 1 (model.layers.1.mlp.up_proj.weight" in said) == (other == "one") != ("it holds " in said)
    assert not (tmp_path / "out").exists()


def test_weights_of_other_sizes_are_said(source, tmp_path, capsys):
    changed(source, intermediate_size=28)
    assert command(source, tmp_path / "out", "--keep", "heads=2") == 1
    said = capsys.readouterr().err
    assert "expected model.layers.0.mlp.down_proj.weight of shape [24, 28], which config.json says, got [24, 20]" in said
    assert not (tmp_path / "out").exists()


def test_a_new_head_is_no_missing_weight_and_a_layer_is(tmp_path, capsys):
    """With the encoder alone, or one of its layers fewer, in the place of a classifier."""
    from safetensors.torch import load_file, save_file

    from apt_ext.tools.data import Missing
    from apt_ext.tools.models import load

    directory = letters(tmp_path, "bert")
    kind = transformers.AutoModelForSequenceClassification
    state = load_file(directory / "model.safetensors")
    state = {key: value for key, value in state.items() if "classifier" not in key and "pooler" not in key}
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    load(directory, kind, head=True)
    with pytest.raises(Missing, match="found none for 4 .*bert.pooler.dense"):
        load(directory, kind)
    left = {key: value for key, value in state.items() if "layer.1." not in key}
    save_file(left, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(Missing, match="expected the weights of BertForSequenceClassification, found none for 16 "):
        load(directory, kind, head=True)
