"""Test what `make test` runs of the evidence: the command, the kept report, and how cells are written."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from apt_ext.tools.checkout.evidence import pictures, runner, store
from apt_ext.tools.checkout.evidence.store import Cell
from small_cells import command, made, written

from apt_ext.tools.cli import main
from apt_ext.tools.data import Missing

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures are empty files."""

    def axes():
        return MagicMock(**{"get_legend_handles_labels.return_value": ([], [])})

    def figure(**_):
        drawn = MagicMock()
        drawn.subplots.side_effect = lambda rows, columns, **_: [[axes() for _ in range(columns)]]
        drawn.savefig.side_effect = lambda path, dpi: path.touch()
        return drawn

    monkeypatch.setattr(pictures, "figure_class", lambda: figure)


def names(folder, task="movies"):
    return [line.cell for line in store.lines(store.file_of(folder, task))]


# -- the command, and what is kept ---------------------------------------------------------------------------


def test_the_command_trains_a_cell_and_keeps_it(place, capsys):
    pytest.importorskip("transformers")
    assert command(place, "--task", "movies", "--row", "lora", "--jobs", "1") == 0, capsys.readouterr().err
    result = store.read(place.output, Cell("movies", "lora", 0))
    assert result["quick"] and result["scores"].keys() >= {"validation", "test"} and result["commit"]
    before = store.file_of(place.output, "movies").stat().st_mtime_ns
    assert command(place, "--task", "movies", "--row", "lora") == 0
    assert store.file_of(place.output, "movies").stat().st_mtime_ns == before


def test_the_report_of_the_kept_cells_is_the_kept_report(tmp_path, monkeypatch, undrawn):
    monkeypatch.chdir(ROOT)
    assert main(["results", "--report", str(tmp_path / "results.md")]) == 0
    assert (tmp_path / "results.md").read_bytes() == (ROOT / "docs/results.md").read_bytes()
    assert len(list(tmp_path.glob("results-*.png"))) == 4 and (tmp_path / "gain.png").exists()


def test_a_kept_cell_that_is_written_again_changes_no_byte(tmp_path):
    kept = ROOT / "benchmarks/results"
    for file in kept.glob("cells-*.jsonl"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
        for line in (store.lines(file)[0], store.lines(file)[-1]):
            found = line.result()
            cell = Cell(*(found[key] for key in ("task", "row", "seed", "density")), found["config"]["rate"] if found["trial"] else None)
            store.write(tmp_path, cell, found)
            assert store.read(tmp_path, cell) == store.read(kept, cell) == found
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


# -- writing -------------------------------------------------------------------------------------------------


def test_cells_are_sorted_by_name_and_replaced_in_place(tmp_path):
    folder = written(tmp_path / "cells", made("lora", 1, 80.0), made("apt", 0, 78.0, 0.4), made("lora", 0, 81.0))
    assert names(folder) == ["movies.apt.40.seed-0", "movies.lora.seed-0", "movies.lora.seed-1"]
    before = store.file_of(folder, "movies").read_bytes().splitlines()
    store.write(folder, Cell("movies", "lora", 0), made("lora", 0, 82.0))
    after = store.file_of(folder, "movies").read_bytes().splitlines()
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, True]
    assert store.read(folder, Cell("movies", "lora", 0)) == made("lora", 0, 82.0)


def test_cells_that_are_done_at_the_same_time_are_all_kept(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: store.write(tmp_path, Cell("movies", "lora", seed), made("lora", seed, 80.0)), range(60)))
    assert names(tmp_path) == sorted(f"movies.lora.seed-{seed}" for seed in range(60))
    assert [file.name for file in tmp_path.iterdir()] == ["cells-movies.jsonl"] and len(store.load(tmp_path)) == 60


@pytest.mark.parametrize("fault", [OSError("no space"), KeyboardInterrupt()])
def test_a_write_that_fails_changes_nothing_and_leaves_nothing(tmp_path, monkeypatch, fault):
    folder = written(tmp_path / "cells", made("lora", 0, 80.0))
    before = store.file_of(folder, "movies").read_bytes()

    def fails(*_):
        raise fault

    with monkeypatch.context() as patch, pytest.raises(type(fault)):
        patch.setattr(Path, "replace", fails)
        store.write(folder, Cell("movies", "lora", 1), made("lora", 1, 80.0))
    assert store.file_of(folder, "movies").read_bytes() == before
    assert [file.name for file in folder.iterdir()] == ["cells-movies.jsonl"]
    store.write(folder, Cell("movies", "lora", 1), made("lora", 1, 80.0))
    assert len(store.load(folder)) == 2


def test_the_lock_of_a_killed_process_stops_nobody(tmp_path):
    folder = written(tmp_path / "cells")
    (folder / ".cells-movies.jsonl.lock").touch()
    (folder / f".cells-movies.jsonl.{os.getpid() + 1}").write_text("half of a file")
    store.write(folder, Cell("movies", "lora", 0), made("lora", 0, 80.0))
    assert len(store.load(folder)) == 1 and not (folder / ".cells-movies.jsonl.lock").exists()


# -- lines that are no cells ---------------------------------------------------------------------------------


def test_a_line_that_names_no_cell_is_said_by_a_run_kept_by_a_write_and_refused_by_the_report(tmp_path, capsys):
    folder = written(tmp_path / "cells", made("lora", 0, 80.0))
    file = store.file_of(folder, "movies")
    file.write_bytes(b"<<<<<<< ours\n\n" + file.read_bytes())
    runner._say_nameless(file)
    assert f"{file}:1: expected a cell, got a line that names none; it stays there" in capsys.readouterr().err
    store.write(folder, Cell("movies", "lora", 1), made("lora", 1, 80.0))
    assert names(folder) == ["movies.lora.seed-0", "movies.lora.seed-1", None]
    assert main(["results", "--output", str(folder), "--report", str(tmp_path / "r.md")]) == 1
    assert f"{file}:3: expected a cell, got a line that cannot be read" in capsys.readouterr().err


def test_a_cell_that_is_there_twice_is_refused_until_it_is_made_anew(tmp_path):
    folder = written(tmp_path / "cells", made("lora", 0, 80.0))
    file, one = store.file_of(folder, "movies"), Cell("movies", "lora", 0)
    file.write_bytes(file.read_bytes() * 2)
    for reads in (lambda: store.load(folder), lambda: store.read(folder, one)):
        with pytest.raises(Missing, match=r"cells-movies.jsonl:2: expected each cell once, got movies.lora.seed-0 again"):
            reads()
    store.write(folder, one, made("lora", 0, 81.0))
    assert store.load(folder) == [made("lora", 0, 81.0)]


def test_a_cell_in_the_file_of_another_task_is_refused(tmp_path):
    folder = written(tmp_path / "cells", made("lora", 0, 80.0))
    store.file_of(folder, "movies").rename(store.file_of(folder, "bbc"))
    with pytest.raises(Missing, match=r"cells-bbc.jsonl:1: expected the cell that the line and the file name, got movies.lora.seed-0"):
        store.load(folder)


def test_a_line_without_a_name_is_no_cell(tmp_path):
    store.file_of(tmp_path, "movies").write_text(json.dumps(made("lora", 0, 80.0)) + "\n")
    assert store.read(tmp_path, Cell("movies", "lora", 0)) is None
    with pytest.raises(Missing, match="the cell that the line and the file name"):
        store.load(tmp_path)
