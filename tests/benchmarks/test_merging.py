"""The benchmark of merges and exports runs, on a CPU at a tiny size, and keeps what it measured."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(monkeypatch, tmp_path):
    for library in ("peft", "transformers"):
        pytest.importorskip(library)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import merging

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["merging.py", *map(str, arguments), "--out", str(tmp_path)])
        merging.main()
        return {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}

    return run


def test_merges_beside_peft_are_kept(run, capsys):
    found = run("merge", "tiny", "--layers", 1, "--rounds", 2)["merging-tiny.json"]
    assert list(found["runs"]) == ["PEFT", "apt_ext", "apt_ext, half masked"] and found["layers"] == 1 and found["commit"]
    assert all(len(one["seconds"]["rounds"]) == 2 and one["over PEFT"] > 0 for one in found["runs"].values())
    assert "of PEFT's" in capsys.readouterr().out


@pytest.mark.usefixtures("loaded_here")
def test_parts_of_an_export_are_kept_and_its_files_are_not(run):
    files = run("export", "tiny", "--half")
    found = files.pop("export-tiny.json")
    assert not files and found["half"] and found["bytes"] > 50_000 and found["plain file"] > 0
    parts = {"shrink", "save_stock", "probe", "seal", "digests", *(f"fresh process: {part}" for part in ("load", "output", "hash"))}
    assert parts < found["parts"].keys() and all(0 <= found["parts"][part] <= found["seconds"] for part in parts)


def test_a_benchmark_of_no_merge_is_refused(run, capsys):
    with pytest.raises(SystemExit):
        run("merge", "tiny", "--rounds", 0)
    assert "rounds: expected at least 1, got 0" in capsys.readouterr().err
