"""The README's script, the lines of use and the formula of docs run as they stand there; figures are those of the kept runs."""

import importlib
import json
import pathlib
import re
import shlex
import shutil

import pytest
import torch
from torch.nn import functional as F

from apt_ext import ops
from apt_ext.tools import cli

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHRINK = (ROOT / "docs/shrink.md").read_text(encoding="utf-8")


def block(having, file="README.md"):
    (found,) = [code for code in re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(encoding="utf-8"), re.DOTALL) if having in code]
    return found


def test_it_is_short():
    assert len(README.split()) <= 900


def test_its_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link]
    assert links and all((ROOT / link).exists() for link in links), [link for link in links if not (ROOT / link).exists()]


def test_the_formula():
    x, W, b, A, B = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 5), (6, 5), (6,), (3, 5), (6, 3)))
    names = {"F": F, "x": x, "W": W, "b": b, "A": A, "B": B, "s": 2.0}
    names |= {"mask_in": torch.rand(5).round().double(), "mask_out": torch.rand(6).double()}
    exec(block("mask_out * (", "docs/api.md"), names)  # noqa: S102
    got = ops.apt_linear(x, W, b, A, B, names["mask_in"], names["mask_out"], 2.0)
    torch.testing.assert_close(got, names["y"], rtol=1e-12, atol=1e-12)


def test_the_lines_of_use(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    config = transformers.BertConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=48, vocab_size=50, max_position_embeddings=16
    )
    batch = {"input_ids": torch.randint(0, 50, (2, 8)), "labels": torch.tensor([0, 1])}
    names = {"model": transformers.BertForSequenceClassification(config), "batch": batch}
    exec(block("import torch, apt_ext", "docs/by-hand.md"), names)  # noqa: S102
    assert names["layer"].rank == 16
    small = transformers.BertForSequenceClassification.from_pretrained("smaller-model").eval()
    assert small.config.intermediate_size == 24
    expected = names["model"].eval()(**batch).logits
    torch.testing.assert_close(small(**batch).logits, expected, rtol=1e-5, atol=1e-5)


def test_the_script(tmp_path, monkeypatch, capsys, loaded_here):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    code = block("apt_ext.Controller(")
    assert len(code.splitlines()) <= 22
    names = {}
    exec(code, names)  # noqa: S102
    assert capsys.readouterr().out.count("density") == 4 and names["controller"].density <= 0.6
    assert names["small"].config.intermediate_size < 64


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("report")


def test_its_figures_are_those_of_the_kept_runs(report):
    """`python benchmarks/bench.py --report` writes them."""
    marked = [match[1:3] for match in report.MARKED.findall(README)]
    assert marked == [("cells-movies.jsonl", "benefit"), ("steps-h200.json", "steps-speed")]
    assert [match[1:3] for match in report.MARKED.findall(SHRINK)] == [("shrink-*.json", "quality"), ("shrink-*.json", "speed")]
    assert report.updated(README) == README and report.updated(SHRINK) == SHRINK


def test_a_score_that_no_cell_gave_is_noticed(report, monkeypatch, tmp_path):
    lines = [json.loads(line) for line in (report.RESULTS / "cells-movies.jsonl").read_text().splitlines()]
    for line in lines:
        if line["row"] == "apt" and not line["trial"]:
            line["scores"]["test"] += 1
    shutil.copytree(report.RESULTS, tmp_path / "results")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    assert report.updated(README) == README
    (tmp_path / "results" / "cells-movies.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert report.updated(README) != README


@pytest.mark.parametrize("name", ["quality", "parameters", "bytes on disk", "devices"])
def test_a_figure_that_no_run_gave_is_noticed(report, monkeypatch, tmp_path, name):
    shutil.copytree(report.RESULTS, tmp_path / "results")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    assert report.updated(SHRINK) == SHRINK
    runs = {path: json.loads(path.read_text()) for path in sorted((tmp_path / "results").glob("shrink-*.json"))}
    changed, run = next((path, run) for path, run in runs.items() if name in run and "cpu" in run["devices"])
    where = run[name]["cpu"]["tokens per second"]["after"] if name == "devices" else run[name]
    where["low" if name == "devices" else "before"] *= 0.9
    changed.write_text(json.dumps(run))
    assert report.updated(SHRINK) != SHRINK


def test_the_kept_runs_are_of_commands_that_there_are(report):
    runs = [json.loads(path.read_text()) for path in report.RESULTS.glob("shrink-*.json")]
    assert runs and all(re.fullmatch("[0-9a-f]{7,40}", run["commit"]) for run in runs)  # of files as they were committed
    for run in runs:
        program, *arguments = shlex.split(run["command"])
        options = cli._parser().parse_args(arguments)
        assert program == "apt-ext" and dict(options.keep) == run["settings"]["keep"]
        for found in run["devices"].values():
            assert all(len(found["tokens per second"][side]["rounds"]) >= 5 for side in ("before", "after"))
