"""apt-ext train on a tiny model: from a table to a smaller model, stopped and resumed, exported and reported."""

import json
import shutil

import pytest
import torch
from own_source import classifier, stock, train
from small_source import letters

import apt_ext
from apt_ext.tools import train as command
from apt_ext.tools.cli import main
from apt_ext.tools.train_table import table as train_table

pytest.importorskip("jsonargparse")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("loaded_here")
WEIGHTS = "model.safetensors"


# -- from a table to a model -------------------------------------------------------------------------------------------


def test_a_table_becomes_a_smaller_model(own_source, own_data, out, tmp_path, capsys, monkeypatch):
    written = []

    def write(model, controller, path, **more):
        written.append((path, controller.history[-1]["density"], more["exported"], len(more["losses"]) > 8))
        return path

    monkeypatch.setattr(apt_ext, "report", write, raising=False)
    kept = tmp_path / "kept.json"
    assert train(own_source, own_data, out, "--epochs", "8", "--rounds", "1", "--json", kept) == 0
    shown = capsys.readouterr()
    assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "model", "report.json", "run.json"]
    small = stock(out / "model")
    assert small.config.intermediate_size < 20 and small.config.id2label == {0: "neg", 1: "pos"}
    report = json.loads(kept.read_text())
    assert report["loaded by"] == "BertForSequenceClassification" and report["history"][-1]["density"] <= 0.8
    assert report["after"]["parameters"] == small.num_parameters() < report["before"]["parameters"]
    assert report["after"]["scores"]["accuracy"] == 1.0 > report["before"]["scores"]["accuracy"]
    assert report["speed"]["tokens per second"]["after"]["median"] > 0
    assert report["kept"]["neurons"] == {"before": [20, 20], "after": [small.config.intermediate_size] * 2}
    assert report["command"].startswith("apt-ext train") and str(out) not in report["command"]
    assert written == [(out / "report.html", report["history"][-1]["density"], out / "model", True)]
    for line in ("accuracy (validation)", "tokens a second", "neurons of a layer", "Written: "):
        assert line in shown.out
    for line in (
        "64 rows to train on, 8 to evaluate on",
        "has 3 labels, the data 2: it is drawn anew",
        "forecast: at most about",
        "step ",
    ):
        assert line in shown.err
    assert all(line.startswith("apt-ext: ") for line in shown.err.replace("\r", "\n").splitlines() if "clock" not in line and line.strip())
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    with torch.no_grad():
        chosen = small(**tokenizer(["great lovely", "awful dull"], return_tensors="pt", padding=True)).logits.argmax(1).tolist()
    assert chosen == [1, 0]
    # the same from the checkpoints: apt-ext export, of the directory and of a checkpoint whose run nobody noted
    last = max((out / "checkpoints").iterdir(), key=lambda one: int(one.name.rpartition("-")[2]))
    shutil.copytree(last, tmp_path / "copy")
    for given in (out, last, tmp_path / "copy"):
        assert main(["export", str(given), "--base", str(own_source), "--output", str(tmp_path / "again")]) == 0
        assert "which BertForSequenceClassification loads" in capsys.readouterr().out
        assert (tmp_path / "again" / WEIGHTS).read_bytes() == (out / "model" / WEIGHTS).read_bytes()
    # and apt-ext report
    written.clear()

    def write_again(model, controller, path, **more):
        written.append(
            (path, controller.history == report["history"], more["exported"], more["metrics"]["accuracy"], more["losses"][-1]["step"])
        )
        return path

    monkeypatch.setattr(apt_ext, "report", write_again, raising=False)
    assert main(["report", str(out), "--output", str(tmp_path / "page.html")]) == 0
    assert written == [(tmp_path / "page.html", True, out.absolute() / "model", 1.0, 32)]


def test_what_the_page_lacks_is_said_at_the_start(own_source, own_data, out, capsys, monkeypatch):
    def fails(*_, **__):
        raise ImportError("report needs jinja2")

    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "jinja2" else name)
    monkeypatch.setattr(apt_ext, "report", fails, raising=False)
    assert train(own_source, own_data, out) == 0
    said = capsys.readouterr().err
    first = 'no report.html will be written without jinja2; run: python -m pip install "apt_ext[report]"'
    assert said.index(first) < said.index("timing a few steps") < said.index(f"report needs jinja2; then: apt-ext report {out}")


def test_text_becomes_a_smaller_language_model(tmp_path, out, capsys):
    source = letters(tmp_path)
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text("the quick brown fox jumps over the lazy dog " * 30)
    assert train(source, folder, out, "--length", "32", "--gradient-checkpointing", "--weight-decay", "0.01", "--warmup", "2") == 0
    shown = capsys.readouterr()
    assert "perplexity (validation)" in shown.out and "blocks of 32 tokens to train on" in shown.err
    assert "its end token '[END]' pads" in shown.err
    small = stock(out / "model", "AutoModelForCausalLM")
    assert small.config.intermediate_size < 20


def test_a_run_that_diverged_is_told_with_the_remedy(own_source, own_data, out, capsys):
    assert train(own_source, own_data, out, "--epochs", "4", "--learning-rate", "50") == 0
    shown = capsys.readouterr()
    last = shown.out.splitlines()[-1]
    assert last.startswith("Warning: the training loss rose from 0.69") and "a smaller --learning-rate" in last
    assert shown.err.count("8 of them before pruning ends: too few") == 1


def test_a_run_whose_numbers_overflow_is_not_told_to_go_on(own_source, own_data, out, capsys):
    assert train(own_source, own_data, out, "--learning-rate", "1e30") == 1
    said = capsys.readouterr().err
    assert "training has diverged; begin anew with a smaller --learning-rate" in said and "--resume" not in said


@pytest.mark.parametrize(
    ("measure", "before", "after", "losses", "said"),
    [
        ("accuracy", 0.5, 0.9, [0.7, 0.3], None),
        ("accuracy", 0.5, 0.4, [0.7, 0.3], "the accuracy is worse than before training"),
        ("rmse", 1.0, 2.0, [0.7, 0.3], "the rmse is worse than before training"),
        ("perplexity", 20.0, 30.0, [3.0, 2.9], None),
        ("perplexity", 20.0, 30.0, [3.0, float("nan")], "the loss is not finite"),
    ],
)
def test_what_tells_that_a_run_has_failed(measure, before, after, losses, said):
    sides = [{"scores": {"loss": 1.0, measure: value}, "parameters": 2, "bytes": 8} for value in (before, after)]
    report = {"before": sides[0], "after": sides[1], "measure": measure, "losses": [{"loss": loss} for loss in losses]}
    report |= {"kept": {}, "speed": None, "seconds": 1, "output": "out", "loaded by": "Bert", "report": None}
    last = train_table(report).splitlines()[-1]
    assert last.startswith(f"Warning: {said}" if said else "Written: ")


def test_a_regression_of_pairs(own_source, tmp_path, out, capsys):
    data = tmp_path / "pairs.tsv"
    data.write_text("one\ttwo\tscore\n" + "".join(f"{'good' * (i % 3)} a\tb {i}\t{i % 3 + 0.5}\n" for i in range(60)))
    more = [
        "--text-column",
        "one",
        "--text-pair-column",
        "two",
        "--label-column",
        "score",
        "--max-steps",
        "4",
        "--gradient-accumulation",
        "2",
    ]
    assert train(own_source, data, out, *more, "--bf16", "--eval-steps", "2") == 0
    shown = capsys.readouterr()
    assert "a regression (--problem classification says otherwise)" in shown.err and "rmse (validation)" in shown.out
    assert stock(out / "model").config.problem_type == "regression" and stock(out / "model").num_labels == 1


def test_other_widths_in_each_layer(own_source, own_data, out, capsys):
    assert (
        train(own_source, own_data, out, "--prune", "heads", "neurons", "--density", "0.6", "--uniform", "false", "--export", "per_layer")
        == 0
    )
    assert "loaded by apt_ext.load_export" in capsys.readouterr().out
    assert apt_ext.load_export(out / "model").num_labels == 2


def test_a_head_of_as_many_labels_is_kept_and_said(tmp_path, own_data, out, capsys):
    source = classifier(tmp_path, num_labels=2)
    assert train(source, own_data, out, "--dry-run") == 0
    assert "head is kept; its labels, which were LABEL_0, LABEL_1, are now neg, pos" in capsys.readouterr().err


def test_a_dry_run_forecasts_and_leaves_nothing(own_source, own_data, out, capsys):
    assert train(own_source, own_data, out, "--dry-run", "--teacher", "lora") == 0
    shown = capsys.readouterr()
    assert "forecast: at most about" in shown.err and "8 steps of" in shown.err and "3 timed forward and backward passes" in shown.err
    assert not shown.out and not out.exists()


# -- export of other checkpoints ---------------------------------------------------------------------------------------


def test_what_is_no_checkpoint_or_has_no_base(own_source, tmp_path, capsys):
    output = ["--output", str(tmp_path / "out")]
    assert main(["export", str(own_source), *output]) == 1
    assert "checkpoint: expected a directory that APTModel.save_pretrained, a Trainer or apt-ext train wrote" in capsys.readouterr().err
    saved = tmp_path / "saved"
    apt_ext.get_apt_model(stock(own_source), apt_ext.APTConfig(r=2)).save_pretrained(saved)
    config = json.loads((saved / "apt_config.json").read_text())
    if config.pop("base", None) is None:
        assert main(["export", str(saved), *output]) == 1
        assert "base: expected --base MODEL, the model that was trained" in capsys.readouterr().err
    assert main(["export", str(saved), "--base", str(letters(tmp_path, "gpt2")), *output]) == 1
    assert "apt-ext: checkpoint: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["export", str(saved), "--base", str(own_source), *output]) == 0
    assert stock(tmp_path / "out").num_labels == 3
