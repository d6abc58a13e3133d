"""Saving and loading runs no code from a file and reads no pickle, not even where nothing else is left."""

import pickle
import shutil
import sys

import pytest
import torch
from forged import CONFIG, TENSORS, load, refused, same

from apt_ext.config import APTConfig

_found = None


def _hook(event, args):
    if _found is not None and (
        event.startswith("pickle.") or event in ("marshal.loads", "os.system", "subprocess.Popen", "exec", "compile")
    ):
        _found.append((event, args[:1]))


@pytest.fixture
def watched(monkeypatch):
    """The events of code and of pickle while the test runs; torch's own readers raise."""
    global _found
    sys.addaudithook(_hook)  # for life; it looks only while a test asks

    def never(*_, **__):
        raise AssertionError("pickle")

    class Unpickler(pickle.Unpickler):
        __init__ = never

    for module, name in ((torch, "load"), (torch, "save"), (pickle, "load"), (pickle, "loads"), (pickle, "dump")):
        monkeypatch.setattr(module, name, never)
    monkeypatch.setattr(pickle, "Unpickler", Unpickler)
    _found = []
    yield _found
    _found = None


def test_the_watch_sees_pickle(watched, monkeypatch):
    monkeypatch.undo()
    pickle.loads(pickle.dumps(APTConfig))  # noqa: S301
    assert any(event == "pickle.find_class" for event, _ in watched)


def test_nothing_is_pickled_or_run(good, bad, watched, monkeypatch):
    assert same(bad, good)
    load(bad).save_pretrained(bad)
    evil = b"cos\nsystem\n(S'exit 1'\ntR."
    for name in ("pytorch_model.bin", "adapter_model.bin", "apt_model.bin", "apt_model.pt", "apt_model.pkl"):
        (bad / name).write_bytes(evil)
    assert same(bad, good)
    (bad / TENSORS).unlink()
    refused(bad, TENSORS, "found none")  # no other file stands in
    for file in (bad / name for name in (TENSORS, CONFIG)):
        shutil.copytree(good, bad, dirs_exist_ok=True)
        file.write_bytes(evil)
        refused(bad, file.name, ".")
    assert [event for event in watched if event[0] != "compile"] == []


def test_an_export_is_not_pickled_either(tmp_path, watched):
    pytest.importorskip("transformers")
    from tiny_bert import MASKS, masked

    from apt_ext.exporting.directories import export

    model = masked(MASKS["half"])
    watched.clear()
    export(model, tmp_path / "small")
    assert not [event for event in watched if event[0].startswith("pickle.")]
    assert {file.suffix for file in (tmp_path / "small").iterdir()} == {".json", ".md", ".safetensors"}
