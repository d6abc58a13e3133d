"""apt-ext checks arguments, files and what shapes decide before a model is loaded, and keeps what is done before it is timed."""

import json

import pytest
import torch
from families import FAMILIES
from small_source import command, letters

from apt_ext.tools import demo, shrinking
from apt_ext.tools.cli import main
from apt_ext.tools.data import Review
from apt_ext.tools.models import transformers_offline

transformers = pytest.importorskip("transformers")

REVIEWS = [Review(f"a {'good' if i % 2 else 'bad'} film {i}", i % 2) for i in range(2700)]


@pytest.fixture
def unloaded(monkeypatch):
    """No weights are loaded or drawn, nothing is trained."""

    def loads(*_, **__):
        pytest.fail("it loads")

    transformers_offline()  # without bars
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(loads))
    for name in ("random_model", "fit", "one_shot"):
        monkeypatch.setattr(shrinking, name, loads)
    monkeypatch.setattr(demo, "run_apart", loads)


def said(capsys):
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.startswith("apt-ext: "), text
    return text


# -- shrink ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--keep", "heads=9"], "keep: expected 1 to 3 heads, got 9"),
        (["--keep", "layers=1"], "keep: expected kinds of blocks of this model (heads, neurons, hidden), got 'layers'"),
        (["--keep", "heads=2", "--length", "65"], "length: expected at most the 64 positions of LlamaForCausalLM, got 65"),
        (["--keep", "heads=2", "--length", "64", "--batch", "90"], "text: expected at least"),
        (["--keep", "heads=2", "--text", "missing.txt"], "text: expected files, found none at missing.txt"),
        (["--keep", "heads=2", "--device", "cuda"], "device: expected a CUDA device"),
    ],
)
def test_shrink_of_text(tmp_path, capsys, unloaded, monkeypatch, more, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command(letters(tmp_path), tmp_path / "out", *more) == 1
    assert words in said(capsys) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["output/dense", "output/model", "json"])
def test_shrink_where_it_may_not_write(tmp_path, capsys, unloaded, option):
    out, more = tmp_path / "out", []
    if option == "json":
        more = ["--json", str(tmp_path)]
    else:
        (out / option.partition("/")[2]).mkdir(parents=True)
        (out / option.partition("/")[2] / "mine.txt").write_text("mine")
    assert command(letters(tmp_path), out, "--keep", "heads=2", *more) == 1
    assert ("got the directory" if more else "output: expected a missing or empty directory, or an unchanged") in said(capsys)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_shrink_of_a_directory_that_lacks_a_file(tmp_path, capsys, unloaded, missing):
    source = letters(tmp_path)
    (source / missing).unlink()
    assert command(source, tmp_path / "out", "--keep", "heads=2") == 1
    assert str(source) in said(capsys)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_language_model_needs_text(tmp_path, capsys, unloaded, monkeypatch, family):
    monkeypatch.setattr(shrinking, "load_reviews", lambda archive: pytest.fail("it asks for reviews first"))
    source = letters(tmp_path, family)
    assert main(["shrink", str(source), "--keep", "neurons=4", "--output", str(tmp_path / "out")]) == 1
    assert f"text: expected --text FILE, which a language model needs, got none for {source}; only a model" in said(capsys)


def test_a_gguf_file_needs_text(tmp_path, capsys, unloaded, monkeypatch):
    config = FAMILIES["llama"].model(torch.float32).config
    monkeypatch.setattr(shrinking, "load_reviews", lambda archive: REVIEWS)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: config)
    file = tmp_path / "model.gguf"
    file.touch()
    assert main(["shrink", str(file), "--keep", "neurons=4", "--output", str(tmp_path / "out")]) == 1
    assert f"text: expected --text FILE, which a language model needs, got none for {file}" in said(capsys)


@pytest.mark.parametrize(
    ("more", "number", "words"),
    [
        (["heads=2"], 2700, "keep: expected sizes that a stock config can say, but BertConfig makes heads of hidden_size / num_attention"),
        (["heads=2", "hidden=16"], 2569, "batch: expected at most the 1 reviews to train on, got 4"),
    ],
)
def test_shrink_of_reviews(tmp_path, capsys, unloaded, monkeypatch, more, number, words):
    monkeypatch.setattr(shrinking, "load_reviews", lambda archive: REVIEWS[:number])
    source = letters(tmp_path, "bert", num_labels=2)
    assert main(["shrink", str(source), "--keep", *more, "--device", "cpu", "--output", str(tmp_path / "out")]) == 1
    assert words in said(capsys)


@pytest.mark.parametrize(
    ("more", "words"), [(["heads=3"], "stock config"), (["heads=9"], "expected 1 to 4"), (["heads=2", "--length", "999"], "positions")]
)
def test_shrink_of_random_parameters(tmp_path, capsys, unloaded, more, words):
    FAMILIES["bert"].model(torch.float32, num_attention_heads=4, hidden_size=32).config.save_pretrained(tmp_path / "shapes")
    config = json.loads((tmp_path / "shapes" / "config.json").read_text())
    (tmp_path / "shapes" / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    arguments = ["shrink", str(tmp_path / "shapes"), "--random", "--length", "8", "--output", str(tmp_path / "out")]
    assert main([*arguments, "--keep", *more]) == 1
    assert words in said(capsys)


def test_the_report_is_there_before_the_clock_runs(tmp_path, monkeypatch, loaded_here):
    output, seen = tmp_path / "out", []

    def clock(directories, batches, device, rounds):
        seen.append(json.loads((output / "report.json").read_text()))
        if device == "cuda":
            raise RuntimeError("CUDA out of memory")
        return {"device": "a CPU", "dtype": "float32", "threads": 1}

    monkeypatch.setattr(shrinking, "compared", clock)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert command(letters(tmp_path), output, "--keep", "heads=2", "--device", "cpu", "cuda") == 1
    found = json.loads((output / "report.json").read_text())
    assert [list(report["devices"]) for report in (*seen, found)] == [[], ["cpu"], ["cpu"]]
    assert found["quality"]["after"] > 1 and found["parameters"]["after"] < found["parameters"]["before"]
    assert sorted(path.name for path in output.iterdir()) == ["dense", "model", "report.json"]


# -- demo --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """The demo's encoder and reviews."""
    monkeypatch.setattr(demo, "check_pictures", lambda: None)
    monkeypatch.setattr(demo, "encoder_directory", lambda: letters(tmp_path, "bert"))
    monkeypatch.setattr(demo, "load_reviews", lambda archive: REVIEWS)


@pytest.mark.parametrize("method", demo.METHODS)
def test_a_demo_where_it_may_not_write(tmp_path, capsys, unloaded, sources, method):
    (tmp_path / "out" / method).mkdir(parents=True)
    (tmp_path / "out" / method / "mine.txt").write_text("mine")
    assert main(["demo", "--output", str(tmp_path / "out")]) == 1
    assert "output: expected a missing or empty directory" in said(capsys)


def test_a_demo_of_too_few_reviews(tmp_path, capsys, unloaded, sources, monkeypatch):
    monkeypatch.setattr(demo, "load_reviews", lambda archive: REVIEWS[:2570])
    assert main(["demo", "--output", str(tmp_path / "out")]) == 1
    assert "data: expected at least 32 reviews to train on beside those held out, got 2 in " in said(capsys)


def test_the_demos_report_is_there_before_the_clock_runs(tmp_path, capsys, sources, monkeypatch):
    output = tmp_path / "out"
    trained = {"masks_are_binary": True, "exported_minus_trained": 0.0, "validation_accuracy": 0.8}
    again = {"class": "transformers.X", "apt_ext_imported": False, "bitwise": True, "difference": 0.0}

    def apart(function, *arguments):
        if function is demo.train:
            return trained | {"step_seconds": [0.3, 0.2, 0.1], "events": [2]}
        found = json.loads((output / "report.json").read_text())
        assert [found["methods"][method]["validation_accuracy"] for method in demo.METHODS] == [0.8, 0.8]
        if not finished:
            raise RuntimeError("out of memory")
        return {method: {"test_accuracy": 0.7} for method in demo.METHODS}

    monkeypatch.setattr(demo, "run_apart", apart)
    monkeypatch.setattr(demo, "reload", lambda *_: again)
    monkeypatch.setattr(demo, "write_plot", lambda *_: None)
    monkeypatch.setattr(demo, "table", lambda report: "")
    for finished in (False, True):
        assert main(["demo", "--output", str(output)]) == (not finished)
        found = json.loads((output / "report.json").read_text())
        assert ("test_accuracy" in found["methods"]["apt"]) == finished and found["methods"]["lora"]["validation_accuracy"] == 0.8
