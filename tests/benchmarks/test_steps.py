"""The benchmark of whole training steps runs, on a CPU at a tiny size, and keeps what it measured."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def steps(monkeypatch):
    for library in ("peft", "transformers"):
        pytest.importorskip(library)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import steps

    return steps


def run(steps, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["steps.py", *map(str, arguments)])
    steps.main()


@pytest.mark.parametrize(("model", "heads"), [("llama", 1), ("roberta", 2)])
def test_every_run_of_whole_steps_is_kept(steps, monkeypatch, tmp_path, capsys, model, heads):
    run(steps, monkeypatch, model, "--quick", "--layers", 1, "--out", tmp_path)
    kept = json.loads((tmp_path / f"steps-{model}.json").read_text())
    assert kept["failed"] == {} and kept["sizes"]["num_hidden_layers"] == 1 and kept["commit"]
    assert list(kept["runs"]) == [*steps.RUNS.values(), steps.AGAIN]
    for name in ("cut", "compact"):
        found = kept["runs"][steps.RUNS[name]]
        assert len(found["history"]) > 1 and found["history"][-1]["kept"]["0.heads"] == heads
        assert found["history"][-1]["kept"]["0.neurons"] == 32
        for part in ("before", "after"):
            assert len(found[part]["seconds"]["rounds"]) == 3
    figures = kept["over PEFT"]
    assert figures.keys() == {steps.RUNS[name] for name in ("dense", "cut", "compact")}
    assert all(figure["step"] > 0 for figure in figures.values())
    shown = capsys.readouterr().out
    assert "PEFT again" in shown and f"kept heads {heads}, neurons 32" in shown and "Liger" in shown


def test_a_run_of_whole_steps_that_fails_costs_no_other(steps, monkeypatch, tmp_path):
    def broken(*arguments):
        raise OSError("no memory")

    monkeypatch.setattr(steps, "dense_run", broken)
    with pytest.raises(SystemExit, match="apt_ext failed: OSError: no memory"):
        run(steps, monkeypatch, "roberta", "--quick", "--only", "peft,dense", "--out", tmp_path)
    kept = json.loads((tmp_path / "steps-roberta.json").read_text())
    assert list(kept["runs"]) == ["PEFT", steps.AGAIN] and list(kept["failed"]) == ["apt_ext"]


def test_unknown_runs_of_whole_steps_are_refused(steps, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(steps, monkeypatch, "llama", "--quick", "--only", "peft,lora")
    assert "expected some of peft, dense, cut, compact, got lora" in capsys.readouterr().err
