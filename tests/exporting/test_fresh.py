"""The process that loads what was written: it starts early, answers once, and does not outlive the export."""

import subprocess
from contextlib import nullcontext

import pytest
import torch
from families import FAMILIES, adapted

from apt_ext import export
from apt_ext.exporting import directories, fresh

# What reload.py does of the protocol, without torch.
SCRIPT = """
import json, os, sys
kind = sys.argv[1]
if line := sys.stdin.readline():
    directory, loader, exchange = json.loads(line)
    if directory.endswith("bad"):
        print("a warning", file=sys.stderr)
        raise ValueError("no such tensor")
    print("noise")
    said = {"threads": os.environ["OMP_NUM_THREADS"], "modules": os.environ.get("HF_MODULES_CACHE")}
    if loader == "killed":
        os.kill(os.getpid(), 9)
    if loader != "silent":
        print("apt_ext has loaded: " + json.dumps({"kind": kind, "loader": loader, **said}))
    print("noise of what ends with the process")
"""


@pytest.fixture
def processes(monkeypatch, tmp_path):
    """The processes that were started, of a script that answers at once."""
    script, found = tmp_path / "script.py", []
    script.write_text(SCRIPT)
    real = subprocess.Popen

    def started(*arguments, **options):
        found.append(real(*arguments, **options))
        return found[-1]

    monkeypatch.delenv("HF_MODULES_CACHE", raising=False)
    monkeypatch.setattr(fresh.reload, "__file__", str(script))
    monkeypatch.setattr(fresh.subprocess, "Popen", started)
    return found


def test_it_waits_for_the_first_call_and_each_call_has_its_own(processes, tmp_path):
    with fresh.started("LlamaForCausalLM") as reloaded:
        assert len(processes) == 1 and processes[0].poll() is None
        answers = [reloaded(tmp_path, loader, tmp_path / "exchange") for loader in ("one", "two", "AutoModel")]
        assert len(processes) == 3 and all(process.returncode == 0 for process in processes)
    assert [answer["loader"] for answer in answers] == ["one", "two", "AutoModel"]
    assert {answer["kind"] for answer in answers} == {"LlamaForCausalLM"}
    assert {answer["threads"] for answer in answers} == {str(torch.get_num_threads())}
    assert [answer["modules"] for answer in answers] == [None, None, str(tmp_path / "modules")]


def test_code_of_a_directory_leaves_the_waiting_process_to_the_others(processes, tmp_path):
    with fresh.started("LlamaForCausalLM") as reloaded:
        assert reloaded(tmp_path, "AutoModel", tmp_path / "exchange")["modules"]
        assert processes[0].poll() is None
        assert not reloaded(tmp_path, "apt_ext", tmp_path / "exchange")["modules"] and len(processes) == 2


def test_what_it_raised_is_the_answer(processes, tmp_path):
    (tmp_path / "bad").mkdir()
    with fresh.started("LlamaForCausalLM") as reloaded:
        assert reloaded(tmp_path / "bad", "one", tmp_path / "exchange") == {"error": "ValueError: no such tensor\na warning"}


def test_what_is_not_the_fault_of_the_model_is_said_so(processes, tmp_path):
    with fresh.started("LlamaForCausalLM") as reloaded:
        for loader, words in (("killed", "signal 9 ended it"), ("silent", "got none")):
            with pytest.raises(RuntimeError, match=words):
                reloaded(tmp_path, loader, tmp_path / "exchange")
        with pytest.raises(RuntimeError, match="somebody has removed it"):
            reloaded(tmp_path / "gone", "one", tmp_path / "exchange")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_one_that_nobody_asked_is_ended(processes, error):
    with pytest.raises(error), fresh.started("LlamaForCausalLM"):
        raise error
    assert processes[0].returncode is not None


def test_an_export_that_is_refused_leaves_no_process(processes, tmp_path):
    apt = adapted(FAMILIES["llama"])
    apt.set_block_mask("0.neurons", (torch.arange(apt.blocks["0.neurons"].count) < 3).float())
    with pytest.raises(ValueError, match="expected sizes that a stock config can say"):
        export(apt, tmp_path / "small")
    assert len(processes) == 1 and processes[0].returncode is not None and not (tmp_path / "small").exists()


def test_files_are_hashed_before_load_export_reads_them(monkeypatch, tmp_path):
    """Stock classes read no manifest and load meanwhile; ours does."""
    seen = []

    def reloaded(directory, loader, exchange):
        seen.append((loader, (directory / directories.MANIFEST).is_file()))
        return {"error": "stop"}

    monkeypatch.setattr(directories, "started", lambda kind: nullcontext(reloaded))
    apt = adapted(FAMILIES["llama"])
    apt.set_block_mask("0.neurons", (torch.arange(apt.blocks["0.neurons"].count) < 3).float())
    with pytest.raises(ValueError, match="stop"):
        export(apt, tmp_path / "small", per_layer=True)
    assert seen == [("apt_ext", True)] and not (tmp_path / "small").exists()
