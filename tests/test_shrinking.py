"""apt-ext shrink on tiny models: the path from a directory to a smaller one, and its report."""

import json

import pytest
import torch
from families import FAMILIES

from apt_ext.tools import shrinking
from apt_ext.tools.cli import main

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.usefixtures("loaded_here")


@pytest.fixture
def source(tmp_path):
    """A tiny LLaMA with a tokenizer of letters, and a text."""
    directory = tmp_path / "source"
    vocabulary = {"[UNK]": 0, "[END]": 1, **{chr(97 + i): i + 2 for i in range(26)}, " ": 28}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="[END]")  # noqa: S106
    tokenizer.save_pretrained(directory)
    FAMILIES["llama"].model(torch.float32).save_pretrained(directory)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 100)
    return directory


def command(source, output, *more):
    text = str(source.parent / "text.txt")
    numbers = ["--batch", "2", "--length", "16", "--score", "2", "--test", "2"]
    return main(["shrink", str(source), "--text", text, "--output", str(output), *numbers, *more])


def test_a_directory_becomes_a_smaller_one(source, tmp_path, capsys):
    assert command(source, tmp_path / "out", "--keep", "heads=2", "neurons=7", "--recover", "3") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert type(small).__name__ == report["loaded by"] == "LlamaForCausalLM"
    assert (small.config.num_attention_heads, small.config.num_key_value_heads, small.config.intermediate_size) == (4, 2, 7)
    assert report["after"]["parameters"] == small.num_parameters() < report["before"]["parameters"]
    assert report["before"]["perplexity"] > 1 and report["after"]["perplexity"] > 1 and report["masked"] > 1
    speeds = report["after"]["tokens per second"]
    assert speeds["min"] <= speeds["median"] <= speeds["max"]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "model")("fox")["input_ids"]
    shown = capsys.readouterr().out
    assert "LlamaForCausalLM -> LlamaForCausalLM" in shown and "perplexity" in shown


def test_without_recovery_the_masked_and_the_reloaded_model_agree(source, tmp_path):
    assert command(source, tmp_path / "out", "--keep", "heads=2", "neurons=7", "hidden=16") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["after"]["perplexity"] == pytest.approx(report["masked"], rel=1e-4)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--keep", "heads=4"], "keep: expected 1 to 3 heads, got 4"),
        (["--keep", "heads=2", "--length", "5000"], "text: expected at least"),
        (["--keep", "heads=2", "heads=3"], "keep: expected each kind once, got heads more than once"),
        (["--keep", "heads=2", "--length", "65"], "length: expected at most the 64 positions of LlamaForCausalLM, got 65"),
        (["--keep", "heads=2", "--text", "missing.txt"], "text: expected files, found none at missing.txt"),
    ],
)
def test_what_is_missing_is_one_sentence(source, tmp_path, capsys, more, words):
    assert command(source, tmp_path / "out", *more) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize(("option", "number"), [("--steps", "-1"), ("--recover", "-1"), ("--batch", "0"), ("--score", "two")])
def test_numbers_of_the_command(source, tmp_path, capsys, option, number):
    with pytest.raises(SystemExit):
        command(source, tmp_path / "out", "--keep", "heads=2", option, number)
    assert f"argument {option}: expected a whole number of at least" in capsys.readouterr().err


def test_a_model_that_is_not_there(tmp_path, capsys):
    assert main(["shrink", "no-such-package", "--keep", "heads=1", "--text", "a"]) == 1
    assert "expected a directory, a .gguf file or an installed package" in capsys.readouterr().err


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
    assert main(["shrink", str(tmp_path / "bert"), *arguments]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["loaded by"] == "BertForSequenceClassification" and 0 <= report["after"]["accuracy"] <= 1
