"""apt-ext results: damaged cells, directories without any, options that cannot be meant, missing data; and what times are of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from apt_ext.tools.checkout.evidence import cell, packing, report, runner, store, training
from apt_ext.tools.checkout.evidence.cell import Place
from apt_ext.tools.checkout.evidence.command import cells_of
from apt_ext.tools.checkout.evidence.store import Cell
from apt_ext.tools.checkout.evidence.tasks import TASKS
from small_cells import command, made, trial_of, written

from apt_ext.tools.cli import main
from apt_ext.tools.data import Missing, joined

pytest.importorskip("transformers")
pytestmark = pytest.mark.evidence


@pytest.fixture
def cells(tmp_path):
    return written(tmp_path / "cells", made("lora", 0, 80.0), made("lora", 1, 81.0), made("apt", 0, 78.0, 0.4))


def reported(cells, to):
    return main(["results", "--output", str(cells), "--report", str(to)])


@pytest.fixture
def kept(tmp_path):
    file = tmp_path / "results.md"
    file.write_text("as it was")
    return file


# -- files that are no cells -------------------------------------------------------------------------------------------


def put(file, index, text):
    """Put `text` in the place of a line."""
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"".join(line + b"\n" for line in [*lines[:index], text, *lines[index + 1 :]]))


def without(result, *keys):
    inner = result
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return result


DAMAGES = {
    "cut off": (lambda text: text[: len(text) // 2], "a line that cannot be read"),
    "no text": (lambda text: b"\xff\xfe", "a line that cannot be read"),
    "no object": (lambda text: "[]", "expected a cell of format 1"),
    "nothing in it": (lambda text: "{}", "expected a cell of format 1"),
    "another format": (lambda text: '{"format": 0}', "expected a cell of format 1"),
    "format alone": (lambda text: '{"format": 1}', "without its task"),
    "no test": (lambda text: json.dumps(without(json.loads(text), "scores", "test")), "without its scores"),
    "text for a number": (lambda text: text.replace('"test": 80.0', '"test": "80"'), "without its scores"),
    "history": (lambda text: json.dumps(without(json.loads(text), "history", 0, "seconds")), "without its history"),
    "inference": (lambda text: json.dumps({**json.loads(text), "inference": {"speedup": 1.0}}), "without its inference"),
    "another seed": (
        lambda text: text.replace('"seed": 0', '"seed": 5'),
        "the cell that the line and the file name, got movies.lora.seed-5",
    ),
    "another row": (lambda text: text.replace('"row": "lora"', '"row": "best"'), "a task and a row of this version, got movies, best"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_cell_is_named_and_the_report_stays(cells, kept, capsys, damage, words):
    file = store.file_of(cells, "movies")
    before = file.read_text().splitlines()
    content = damage(before[1])
    put(file, 1, content if isinstance(content, bytes) else content.encode())
    assert reported(cells, kept) == 1
    said = capsys.readouterr().err
    assert f"{file}:2: " in said and words in said and f"{file}:3" not in said and kept.read_text() == "as it was"
    with pytest.raises(Missing):
        store.lines(file)[1].result()


def test_a_stray_file_is_named(cells, kept, capsys):
    (cells / "cells-notes.jsonl").write_text("{}\n")
    assert reported(cells, kept) == 1 and "cells-notes.jsonl:1: " in capsys.readouterr().err and kept.read_text() == "as it was"


def test_a_file_that_is_not_there_is_no_error(tmp_path):
    assert store.read(tmp_path, Cell("movies", "lora", 0)) is None


def test_the_cells_that_are_kept_are_whole():
    for found in report.load_cells(Path(__file__).parents[2] / "benchmarks/results").values():
        assert found.task.name == "shakespeare" or found.found


@pytest.mark.parametrize("content", [", {", "}", None])
def test_a_running_command_makes_a_damaged_or_quick_cell_anew_and_says_so(pack, tmp_path, monkeypatch, capsys, content):
    place = Place(pack, tmp_path / "cells", "cpu", "here")
    one = Cell("movies", "lora", 0)
    for trial in cell.trials(one.of()[0], "lora"):
        store.write(place.output, trial, trial_of(trial))
    store.write(place.output, one, made("lora", 0, 80.0, quick=True))
    file = store.file_of(place.output, "movies")
    if content is not None:
        put(file, 0, b'{"cell": "movies.lora.seed-0"' + content.encode())
    ran = []
    monkeypatch.setattr(runner, "_tried", lambda where, one: ran.append(one) or made("lora", 0, 80.0, measure="m", seconds={"total": 1.0}))
    assert runner.run_cells(place, [one]) == [] and ran == [one]
    said = capsys.readouterr().err
    assert (
        (f"{file}:1: " in said or f"{one.name}: in {place.output} of" in said)
        and "it is made anew" in said
        and ("a quick run" in said) == (content is None)
    )
    store.write(place.output, one, made("lora", 0, 80.0))
    assert runner.run_cells(place, [one]) == [] and ran == [one] and "anew" not in capsys.readouterr().err


# -- directories -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False])
def test_without_cells_nothing_is_written(tmp_path, kept, capsys, there):
    folder = tmp_path / "none"
    if there:
        written(folder, made("random", 0, 99.0, 0.2, quick=True), trial_of(Cell("movies", "lora", 1000, None, 5e-4)))
    assert reported(folder, kept) == 1
    assert (
        f"output: expected a directory with cells (trials and quick ones are not counted), found none in '{folder}'"
        in capsys.readouterr().err
    )
    assert kept.read_text() == "as it was"


def test_in_an_empty_directory_nothing_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["results"]) == 1 and not list(tmp_path.iterdir())


def test_a_report_or_output_that_cannot_be_written_is_said_first(cells, place, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    assert (
        reported(cells, tmp_path / "file" / "deep" / "r.md") == 1 and "report: expected a directory to write in" in capsys.readouterr().err
    )
    assert reported(cells, cells) == 1 and "report: expected a file's name, got the directory" in capsys.readouterr().err
    monkeypatch.setattr(runner, "_tried", lambda *them: pytest.fail("it ran"))
    with pytest.raises(Missing, match="output: expected a directory to write in, got '.*file': Not a directory"):
        runner.run_cells(Place(place.pack, tmp_path / "file", "cpu", "here", quick=True), [Cell("movies", "lora", 0)])


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--seed", "4-0"], "seed: expected at most 1000 numbers below 2^63, the first of a range first, got '4-0'"),
        (["--seed", "0-99999999999"], "seed: expected at most 1000"),
        (["--seed", "99999999999999999999999"], "seed: expected at most 1000"),
        (["--minutes", "-1"], "minutes: expected more than 0, got -1"),
        (["--minutes", "nan"], "minutes: expected more than 0, got nan"),
    ],
)
def test_numbers_that_cannot_be_meant(place, capsys, more, words):
    assert command(place, "--task", "movies", *more) == 2
    assert words in capsys.readouterr().err and not place.output.exists()


@pytest.mark.parametrize(
    ("once", "twice"),
    [
        (["--task", "movies"], ["--task", "movies,movies"]),
        (["--task", "movies", "--row", "apt"], ["--task", "movies", "--row", "apt,apt"]),
        (["--task", "movies", "--densities", "40"], ["--task", "movies", "--densities", "40,40.0"]),
        (["--task", "movies", "--seed", "1"], ["--task", "movies", "--seed", "1,1-1"]),
    ],
)
def test_what_is_named_twice_is_meant_once(once, twice):
    from apt_ext.tools.cli import _parser

    found = [cells_of(_parser().parse_args(["results", *words])) for words in (once, twice)]
    assert found[0] == found[1] and len(set(found[0])) == len(found[0]) > 0


# -- data and failures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["*", "pack.json", "movies.safetensors", "minilm/config.json", "minilm/*.safetensors"])
def test_data_that_is_missing_is_said_once_and_nothing_runs(pack, tmp_path, monkeypatch, capsys, lost):
    here = tmp_path / "pack"
    shutil.copytree(pack, here)
    for file in here.glob(lost):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    monkeypatch.setattr(runner, "_tried", lambda *them: pytest.fail("it ran"))
    place = Place(here, tmp_path / "cells", "cpu", "here", quick=True)
    assert command(place, "--task", "movies") == 1
    said = capsys.readouterr().err
    assert said.count("data: expected") == 1 and f"--prepare {here}" in said and not place.output.exists()


def test_cells_without_transformers_are_said_once(place, monkeypatch):
    def missing():
        raise Missing("no transformers")

    monkeypatch.setattr(runner, "transformers_offline", missing)
    with pytest.raises(Missing, match="no transformers"):
        runner.run_cells(place, [])


def test_texts_are_read_before_the_model_is_packed(tmp_path, monkeypatch):
    sources = packing.Sources(tmp_path, tmp_path / "plays.tar.gz", tmp_path)
    for name in ("load", "load_tokenizer"):
        monkeypatch.setattr(packing, name, lambda *_: pytest.fail("it loads"))
    monkeypatch.setattr(packing, "package_file", lambda name: tmp_path)
    with pytest.raises(Missing, match="the plays are not at"):
        packing._pack_decoder(tmp_path, sources, [])
    sources.plays.write_bytes(b"no archive")
    with pytest.raises(Missing, match="is not the source distribution of shakespeare"):
        packing._pack_decoder(tmp_path, sources, [])


def test_a_directory_to_prepare_that_cannot_be_written_is_said_first(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["results", "--prepare", str(tmp_path / "file" / "deep")]) == 1
    assert "prepare: expected a directory to write in" in capsys.readouterr().err


def test_a_damaged_model_is_said_before_anything_runs(pack, tmp_path, monkeypatch):
    shutil.copytree(pack, tmp_path / "pack")
    file = next((tmp_path / "pack" / "minilm").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    monkeypatch.setattr(runner, "_tried", lambda *them: pytest.fail("it ran"))
    with pytest.raises(Missing, match="is not the file that pack.json lists"):
        runner.run_cells(Place(tmp_path / "pack", tmp_path / "cells", "cpu", "here", quick=True), [Cell("movies", "lora", 0)])


def test_of_many_failures_the_first_few_and_the_number_are_said(place, monkeypatch, capsys):
    monkeypatch.setattr(runner, "_tried", lambda where, one: "failed: RuntimeError: out of luck")
    assert command(place, "--task", "movies", "--row", "lora", "--seed", "0-9") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("apt-ext: movies.lora.seed-0: failed") and last.count("out of luck") == 3 and last.endswith("; and 7 more of 10")
    assert joined(["a"]) == "a" and joined(["a", "b", "c"]) == "a; b; c"


@pytest.mark.parametrize(
    "row, density, words",
    [("apt", None, "a density between 0 and 1"), ("apt", 2.0, "a density"), ("apt", 0.0, "a density"), ("lora", 0.4, "no density")],
)
def test_a_density_that_the_row_has_not_is_said(tmp_path, row, density, words):
    folder = written(tmp_path / "cells", made("full", 0, 80.0), made(row, 0, 80.0, density))
    with pytest.raises(Missing, match=f"expected {words}.* in a cell of {row}, got {density}"):
        report.write_report(folder, tmp_path / "r.md")


def test_densities_that_are_not_the_tasks_are_lines_too(tmp_path):
    folder = written(tmp_path / "cells", made("lora", 0, 80.0), made("apt", 0, 77.0, 0.33), made("apt", 0, 78.0, 0.4))
    report.write_report(folder, tmp_path / "r.md")
    rows = [line.split("|")[1].strip() for line in (tmp_path / "r.md").read_text().splitlines() if line.startswith("| ")]
    assert "APT, 33 %" in rows and rows.index("APT, 33 %") > rows.index("APT with a LoRA teacher, 10 %")
    assert "LoRA, one-shot prune, recovery, 33 %" not in rows


def test_bools_are_no_numbers_nested_files_no_cells_and_a_score_of_0_no_divisor(tmp_path):
    cells = written(tmp_path / "cells", made("lora", 0, 0.0), made("apt", 0, 77.0, 0.4))
    report.write_report(cells, tmp_path / "r.md")
    assert "nan %" in (tmp_path / "r.md").read_text()
    for key, value in {"warmed": "no", "cudnn_attention": 1, "seed": True}.items():
        store.write(cells, Cell("movies", "lora", 0), made("lora", 0, 80.0) | {key: value})
        with pytest.raises(Missing, match=f"without its {key}"):
            report.write_report(cells, tmp_path / "r.md")
    put(store.file_of(cells, "movies"), 1, b"[" * 100_000)
    with pytest.raises(Missing, match="a line that cannot be read"):
        report.write_report(cells, tmp_path / "r.md")
    with pytest.raises(Missing, match="expected a directory with cells, got the file"):
        report.write_report(tmp_path / "r.md", tmp_path / "other.md")


def test_a_picture_that_cannot_be_written_costs_no_table(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "r-movies.png").mkdir()
    (said,) = report.write_report(written(tmp_path / "cells", made("lora", 0, 80.0)), tmp_path / "r.md")
    assert "r-movies.png" in said and "dense LoRA" in (tmp_path / "r.md").read_text()


def test_nan_is_the_worst_of_two_trials_in_either_order(tmp_path, pack):
    place, task = Place(pack, tmp_path, "cpu", "here"), TASKS["shakespeare"]
    one, other = cell.trials(task, "lora")
    for first, second in ((float("nan"), 30.0), (30.0, float("nan"))):
        for trial, score in ((one, first), (other, second)):
            store.write(place.output, trial, trial_of(trial, score))
        assert cell.chosen_rate(place, Cell("shakespeare", "lora", 0)) == (one if first == 30.0 else other).rate


def test_a_quick_teacher_teaches_quick_pupils_alone_and_a_damaged_one_is_made_anew(place, trainings):
    data = cell.load_data(place.pack, place.task(Cell("movies", "lora", 0)), torch.device("cpu"), True)
    lora = Cell("movies", "lora", 0)
    cell._teacher(place, lora, data)
    ran = len(trainings)
    cell._teacher(place, lora, data)
    assert len(trainings) == ran  # it was there
    (kept,) = (place.output / "teachers").glob("*/seconds.json")
    slow = Place(place.pack, place.output, "cpu", "here")
    assert cell._teacher_directory(slow, lora, 5e-4) != cell._teacher_directory(place, lora, 5e-4)
    kept.write_text("{")
    cell._teacher(place, lora, data)
    assert len(trainings) > ran and float(kept.read_text()) > 0


# -- times -------------------------------------------------------------------------------------------------------------


def test_rows_without_times_are_one_line(tmp_path):
    folder = written(
        tmp_path / "cells",
        made("lora", 0, 80.0, warmed=True),
        made("lora", 1, 80.0, alone=False),
        made("apt", 0, 78.0, 0.4, inference={"speedup": 2.0, "batch": 32, "length": 64, "dtype": "float32"}),
        made("apt", 0, 78.0, 0.2, alone=False),
    )
    report.write_report(folder, tmp_path / "r.md")
    movies, bbc = (tmp_path / "r.md").read_text().split("\n## ")[2:4]
    times = movies[movies.index("| row | n |") :]
    assert [line.split("|")[1:3] for line in times.splitlines() if line.startswith("| ")][2:] == [
        [" dense LoRA ", " 1 "],
        [" APT, 40 % ", " 1 "],
    ]
    assert "missing" not in times and "The first use of each kernel is within the times of: APT, 40 %.\n" in times
    (line,) = [line for line in times.splitlines() if line.startswith("Not measured alone: ")]
    assert "full fine-tuning; LoRA, one-shot prune, recovery, 40, 20, 10 %;" in line and "; APT, 20, 10 %;" in line
    assert "dense LoRA" not in line and line.endswith("APT with a LoRA teacher, 40, 20, 10 %.")
    assert "| row | n |" not in bbc and "Measured on" not in bbc and "Not measured alone: full fine-tuning; dense LoRA; " in bbc


@pytest.fixture
def trainings(monkeypatch):
    """(steps, what the generator gave before it) of each training."""
    ran = []
    real = training.train

    def heard(task, row, stock, data, *more):
        ran.append((task.steps, task.batch, row, id(stock), len(data.parts["validation"])))
        return real(task, row, stock, data, *more)

    monkeypatch.setattr(cell, "train", heard)
    return ran


@pytest.mark.parametrize("row", ["apt", "oneshot", "apt-lora", "full"])
def test_a_cell_that_runs_alone_is_warmed_up_and_is_the_same(place, tmp_path, trainings, row):
    one = Cell("movies", row, 0, None if row == "full" else 0.4)
    alone = cell.run_cell(place, one)
    real = [call for call in trainings if call[4] == 16]
    warm = [call for call in trainings if call[4] == 4]
    assert [call[2] for call in warm] == [call[2] for call in real] and len(warm) == len(real) == (2 if row == "apt-lora" else 1)
    assert all(call[:2] == (6, 4) for call in warm) and not {call[3] for call in warm} & {call[3] for call in real[-1:]}
    trainings.clear()
    beside = cell.run_cell(Place(place.pack, tmp_path / "beside", "cpu", "here", alone=False, quick=True), one)
    assert len(trainings) == len(real)
    assert alone["warmed"] is True and beside["warmed"] is False
    for key in ("scores", "kept", "ranks", "adapter_parameters"):
        assert alone[key] == beside[key]
    for mine, theirs in zip(alone["history"], beside["history"], strict=True):
        assert mine["validation"] == theirs["validation"] and mine["step"] == theirs["step"]


def test_cells_train_without_cudnns_attention_and_give_it_back(place, monkeypatch):
    def enabled():
        return torch.backends.cuda.cudnn_sdp_enabled()

    before, seen = enabled(), []
    monkeypatch.setattr(cell, "_inference", lambda *them: seen.append(enabled()) or {})
    real = training.train
    monkeypatch.setattr(cell, "train", lambda *them: seen.append(enabled()) or real(*them))
    assert cell.run_cell(place, Cell("movies", "apt", 0, 0.4))["cudnn_attention"] is False
    assert seen == [False, False, before] and enabled() is before
    monkeypatch.setattr(cell, "train", lambda *them: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cell.run_cell(place, Cell("movies", "apt", 0, 0.4))
    assert enabled() is before


def test_a_trial_whose_times_nobody_reads_is_not_warmed_up(place, trainings):
    assert cell.run_cell(place, Cell("movies", "apt", cell.TRIAL_SEED, 0.4, 1e-3))["warmed"] is False and len(trainings) == 1


def test_a_warm_up_is_a_few_steps_whatever_the_task(pack, tmp_path, trainings):
    place = Place(pack, tmp_path, "cpu", "here")
    task = place.task(Cell("movies", "apt", 0, 0.4))
    data = cell.load_data(pack, task, torch.device("cpu"))
    data = cell.replace(data, parts={**data.parts, "train": data.parts["train"] * 8})
    cell._warm_up(place, Cell("movies", "apt", 0, 0.4), 1e-3, data)
    assert [(steps, batch) for steps, batch, *_ in trainings] == [(6, 32)]
