"""apt-ext shrink on tiny models: the path from a directory to a smaller one, and its report."""

import json
import shutil

import pytest
import torch
from families import FAMILIES
from small_source import command, letters

from apt_ext.common import clock
from apt_ext.tools import measuring, shrinking
from apt_ext.tools.cli import main

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("loaded_here", "quick")


@pytest.fixture
def quick(monkeypatch, request):
    """Rounds that last no time, and memory measured in this process; those marked slow do it as users do."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(clock, "_ROUND", 0.0)
        monkeypatch.setattr(measuring, "_NEW", 2)
        monkeypatch.setattr(measuring, "run_apart", lambda function, *args: function(*args))


@pytest.fixture
def source(tmp_path):
    return letters(tmp_path)


def test_a_directory_becomes_a_smaller_one(source, tmp_path, capsys):
    assert (
        command(
            source,
            tmp_path / "out",
            "--keep",
            "heads=2",
            "neurons=7",
            "--recover",
            "3",
            "--json",
            str(tmp_path / "kept.json"),
            "--commit=c0ffee",
        )
        == 0
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert type(small).__name__ == report["loaded by"] == "LlamaForCausalLM"
    assert (small.config.num_attention_heads, small.config.num_key_value_heads, small.config.intermediate_size) == (4, 2, 7)
    assert report["parameters"]["after"] == small.num_parameters() < report["parameters"]["before"]
    quality = report["quality"]
    assert (
        quality["measure"] == "perplexity" and quality["on"] == "64 tokens" and min(quality[s] for s in ("before", "masked", "after")) > 1
    )
    for side, directory in (("before", "dense"), ("after", "model")):
        files = list((tmp_path / "out" / directory).iterdir())
        assert report["bytes on disk"][side] == sum(file.stat().st_size for file in files)
    assert report["bytes on disk"]["after"] < report["bytes on disk"]["before"]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "model")("fox")["input_ids"]
    kept = json.loads((tmp_path / "kept.json").read_text())
    line = kept.pop("command")
    assert report["commit"] == "c0ffee" and "c0ffee" not in line
    assert kept == report and line.startswith("apt-ext shrink") and "--keep heads=2 neurons=7" in line
    assert "--output" not in line and "--json" not in line and str(tmp_path / "out") not in line and "kept.json" not in line
    shown = capsys.readouterr().out
    assert "LlamaForCausalLM, kept in every layer" in shown and "perplexity, 64 tokens" in shown and "quartiles" in shown


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_speed_and_memory_come_with_their_spread(source, tmp_path, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert command(source, tmp_path / "out", "--keep", "heads=2", "neurons=7", "--device", device) == 0
    (found,) = json.loads((tmp_path / "out" / "report.json").read_text())["devices"].values()
    assert found["dtype"] == {"cpu": "float32", "cuda": "bfloat16"}[device] and found["batches"] == [[2, 16]]
    for name in ("tokens per second", "generated tokens per second", "peak memory"):
        for side in ("before", "after"):
            values = found[name][side]
            assert 0 <= values["low"] <= values["median"] <= values["high"] and len(values["rounds"]) == 3
    speeds = found["tokens per second"]
    assert min(speeds["before"]["rounds"]) > 0
    pairs = zip(speeds["after"]["rounds"], speeds["before"]["rounds"], strict=True)
    assert speeds["ratio"]["rounds"] == pytest.approx([after / before for after, before in pairs])


def test_padding_is_no_token(tmp_path, source):
    directory = tmp_path / "model"
    shutil.copytree(source, directory)
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])}
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "_speeds", lambda calls, tokens, rounds, synchronize: seen.append(tokens))
        measuring.compared({"before": directory, "after": directory}, [batch], "cpu", 1)
    assert seen == [5, 2]


@pytest.mark.slow
def test_memory_is_that_of_the_model_and_its_pass(tmp_path):
    """In processes of their own, as users measure: what a model of known size adds, and not what loading it took."""
    model = FAMILIES["llama"].model(torch.float32, hidden_size=1008, intermediate_size=8192)
    model.save_pretrained(tmp_path)
    size = 4 * model.num_parameters()
    got = measuring.run_apart(measuring.resident_of, tmp_path, [{"input_ids": [[1] * 8]}])
    assert size < got < 1.2 * size


def test_random_parameters_need_no_data(source, tmp_path, capsys):
    (tmp_path / "shapes").mkdir()
    shutil.copy(source / "config.json", tmp_path / "shapes")
    arguments = ["--random", "--batch", "2", "--length", "8", "--rounds", "2", "--device", "cpu", "--json", str(tmp_path / "kept.json")]
    assert main(["shrink", str(tmp_path / "shapes"), "--keep", "heads=2", "neurons=7", "--output", str(tmp_path / "out"), *arguments]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"Written: {tmp_path / 'out' / 'model'} (smaller)")
    report = json.loads((tmp_path / "kept.json").read_text())
    assert report["random"] is True and "quality" not in report and report["devices"]["cpu"]["batches"] == [[2, 8]]
    small = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert (small.config.num_key_value_heads, small.config.intermediate_size) == (2, 7)
    assert report["parameters"]["after"] == small.num_parameters() < report["parameters"]["before"]


def test_random_parameters_whose_sizes_no_config_can_say_write_nothing(tmp_path, capsys):
    config = transformers.BertConfig(
        num_hidden_layers=1, hidden_size=32, num_attention_heads=4, intermediate_size=8, vocab_size=50, architectures=["BertModel"]
    )
    config.save_pretrained(tmp_path / "shapes")
    assert main(["shrink", str(tmp_path / "shapes"), "--random", "--keep", "heads=3", "--output", str(tmp_path / "out")]) == 1
    assert "BertConfig makes heads of hidden_size / num_attention_heads channels, got 3 heads" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_recovery_the_masked_and_the_reloaded_model_agree(source, tmp_path):
    assert command(source, tmp_path / "out", "--keep", "heads=2", "neurons=7", "hidden=16") == 0
    quality = json.loads((tmp_path / "out" / "report.json").read_text())["quality"]
    assert quality["after"] == pytest.approx(quality["masked"], rel=1e-4)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--keep", "heads=4"], "keep: expected 1 to 3 heads, got 4"),
        (["--keep", "heads=2", "--batch", "300"], "text: expected at least"),
        (["--keep", "heads=2", "heads=3"], "keep: expected each kind once, got heads more than once"),
        (["--keep", "heads=2", "--length", "65"], "length: expected at most the 64 positions of LlamaForCausalLM, got 65"),
        (["--keep", "heads=2", "--text", "missing.txt"], "text: expected files, found none at missing.txt"),
        (["--keep", "heads=2", "--text", "*.missing"], "text: expected files, found none at *.missing"),
    ],
)
def test_what_is_missing_is_one_sentence(source, tmp_path, capsys, more, words):
    assert command(source, tmp_path / "out", *more) == (2 if "more than once" in words else 1)
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out" / "model").exists()


def test_a_device_that_is_not_there(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command(source, tmp_path / "out", "--keep", "heads=2", "--device", "cpu", "cuda") == 1
    assert "device: expected a CUDA device that torch can use, found none" in capsys.readouterr().err
    assert main(["shrink", str(source), "--random", "--recover", "1", "--keep", "heads=2", "--output", str(tmp_path / "out")]) == 2
    assert "random: expected no --steps and no --recover" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("option", "number"), [("--steps", "-1"), ("--recover", "-1"), ("--batch", "0"), ("--score", "two")])
def test_numbers_of_the_command(source, tmp_path, capsys, option, number):
    with pytest.raises(SystemExit):
        command(source, tmp_path / "out", "--keep", "heads=2", option, number)
    assert f"argument {option}: expected a whole number of at least" in capsys.readouterr().err


def test_a_model_that_is_not_there(tmp_path, capsys):
    assert main(["shrink", "no-such-package", "--keep", "heads=1", "--text", "a"]) == 1
    assert "expected a directory, a .gguf file or an installed package" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "words"),
    [("config.json", "expected a directory with a config.json"), ("model.safetensors", "expected model.safetensors or pytorch_model.bin")],
)
def test_a_directory_without_a_model(source, tmp_path, capsys, missing, words):
    (source / missing).unlink()
    assert command(source, tmp_path / "out", "--keep", "heads=1") == 1
    said = capsys.readouterr().err
    assert words in said and f"found none {'at' if 'config' in missing else 'in'} {source}" in said and not (tmp_path / "out").exists()


def test_weights_that_are_none(source, tmp_path, capsys):
    (source / "model.safetensors").write_bytes(b"{")
    assert command(source, tmp_path / "out", "--keep", "heads=1") == 1
    assert f"apt-ext: model: {source}: " in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_reviews_are_classified(monkeypatch, tmp_path, source):
    """With a reader of reviews in the place of the archive."""
    from apt_ext.tools.data import Review

    words = ["good", "bad"]
    reviews = [Review(f"a {words[i % 2]} film {i}", i % 2) for i in range(3000)]
    monkeypatch.setattr(shrinking, "load_reviews", lambda archive: reviews)
    model = FAMILIES["bert"].model(torch.float32, num_labels=2, vocab_size=50)
    (tmp_path / "bert").mkdir()
    for file in source.glob("tokenizer*"):
        (tmp_path / "bert" / file.name).write_bytes(file.read_bytes())
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path / "bert")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "bert")
    tokenizer.pad_token = "[UNK]"  # noqa: S105
    tokenizer.save_pretrained(tmp_path / "bert")
    arguments = ["--keep", "heads=2", "hidden=16", "--steps", "2", "--batch", "4", "--score", "2", "--output", str(tmp_path / "out")]
    arguments += ["--rounds", "1", "--device", "cpu"]
    assert main(["shrink", str(tmp_path / "bert"), *arguments]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["loaded by"] == "BertForSequenceClassification" and 0 <= report["quality"]["after"] <= 1
    assert report["quality"]["on"] == "1,568 reviews" and "generated tokens per second" not in report["devices"]["cpu"]


def test_rows_of_the_users_own_file(tmp_path, capsys, own_data):
    from own_source import classifier

    source = classifier(tmp_path, num_labels=3)
    words = ["shrink", str(source), "--data", str(own_data), "--keep", "neurons=8", "--steps", "4", "--recover", "2", "--rounds", "2"]
    assert main([*words, "--device", "cpu", "--output", str(tmp_path / "out")]) == 0
    small = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    assert small.config.intermediate_size == 8 and small.config.id2label == {0: "neg", 1: "pos"}
    assert "accuracy, 8 rows" in capsys.readouterr().out
    assert main([*words, "--label-column", "lable", "--device", "cpu", "--output", str(tmp_path / "other")]) == 1
    assert "expected a column 'lable' in" in capsys.readouterr().err
