"""What report refuses, before anything is written, and what it leaves where writing fails."""

import errno
import json
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, adapted
from reports import numbers_in
from training import begun, finished

import apt_ext
from apt_ext.reporting import figures
from apt_ext.storage import atomic_file

pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """One picture for all."""
    png = figures.as_png(figures.before_and_after([]), figures.LIGHT)
    monkeypatch.setattr(figures, "as_png", lambda draw, theme: png)


@pytest.fixture(scope="module")
def apt():
    return adapted(FAMILIES["bert"])


def refused(kind, words, tmp_path, model, controller=None, path="new/deep/report.html", **options):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind, match=words):
        apt_ext.report(model, controller, tmp_path / path if isinstance(path, str) else path, **{"rounds": 0, **options})
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"path": 3}, TypeError, "path: expected a str or an os.PathLike, got int"),
        ({"rounds": -1}, ValueError, "rounds must be at least 0, got -1"),
        ({"rounds": 1.5}, TypeError, "rounds must be an int, got float"),
        ({"title": 3}, TypeError, "title: expected a str or None, got int"),
        ({"losses": 3}, TypeError, r"losses: expected \(step, loss\) pairs"),
        ({"metrics": [1]}, TypeError, "metrics: expected a dict of names and numbers, got list"),
        ({"metrics": {"a": [1]}}, TypeError, r"metrics\['a'\]: expected a number or text under a name, got list"),
        ({"exported": "nowhere"}, ValueError, "exported: expected a directory that export wrote, with a config.json in it, got 'nowhere'"),
        ({"exported": 3}, TypeError, "exported: expected the directory that export wrote, got int"),
        ({"controller": "yes"}, TypeError, "controller: expected a Controller or None, got str"),
        ({"example": [1]}, TypeError, "example: expected a dict of tensors, .* got list"),
        ({"example": {"input_ids": [1]}}, TypeError, r"example\['input_ids'\]: expected a Tensor, got list"),
        ({"example": {"labels": torch.ones(1)}}, ValueError, r"example: expected inputs of the model, got \['labels'\]"),
        ({"example": {"pixels": torch.ones(1)}, "rounds": 1}, ValueError, r"example: expected inputs that BertForSeq.*got \['pixels'\]"),
    ],
)
def test_arguments(apt, options, kind, words, tmp_path):
    refused(kind, words, tmp_path, apt, **options)


def test_models(apt, tmp_path):
    refused(TypeError, "model: expected an APTModel, a model without adapters .* got int", tmp_path, 3)
    refused(TypeError, "expected an APTModel, got a BertForSequenceClassification with adapters in it", tmp_path, apt.model)
    refused(ValueError, "model: expected a directory that export wrote", tmp_path, str(tmp_path / "missing"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"architectures": ["NoClass"]}')
    refused(ValueError, "expected the name of a class of transformers in .*config.json, got 'NoClass'", tmp_path, tmp_path / "other")


def test_a_controller_of_another_model(apt, tmp_path):
    _, controller, _ = finished("bert")
    words = "controller: expected the one that was made for this model, or None, got that of another model"
    refused(ValueError, words, tmp_path, apt, controller)
    refused(ValueError, words, tmp_path, FAMILIES["bert"].model(), controller)


def test_what_is_in_the_way(apt, tmp_path):
    (tmp_path / "page.html").mkdir()
    refused(ValueError, "path: expected a file's name where it ends in .html, got the directory", tmp_path, apt, path="page.html")
    (tmp_path / "file").write_text("mine")
    refused(ValueError, "path: expected a name that ends in .html, or a directory, got the file", tmp_path, apt, path="file")
    refused(ValueError, "path: expected directories above it, got the file", tmp_path, apt, path="file/report.html")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_page_or_a_directory(apt, tmp_path):
    assert apt_ext.report(apt, None, tmp_path / "a" / "b" / "page.html", rounds=0) == str(tmp_path / "a" / "b" / "page.html")
    assert [file.name for file in (tmp_path / "a" / "b").iterdir()] == ["page.html"]
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "mine.txt").write_text("mine")
    for _ in range(2):  # the second takes the place of the first
        assert apt_ext.report(apt, None, tmp_path / "all", rounds=0) == str(tmp_path / "all" / "report.html")
    pictures = {f"{name}.png" for name in ("before-after", "density", "kept", "loss", "ranks")}
    assert {file.name for file in (tmp_path / "all").iterdir()} == {"report.html", "report.json", "mine.txt", *pictures}
    assert json.loads((tmp_path / "all" / "report.json").read_text()) == numbers_in(tmp_path / "all" / "report.html")
    assert all((tmp_path / "all" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


@pytest.mark.parametrize("path", ["old", "old/report.html", "new/deep/report.html", "new"])
def test_a_full_disk_leaves_what_was_there(apt, path, tmp_path, monkeypatch):
    apt_ext.report(apt, None, tmp_path / "old", rounds=0, title="old")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    kept, calls = atomic_file.os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == (3 if "html" not in path else 1):
            raise OSError(errno.ENOSPC, "No space left on device")
        kept(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(atomic_file.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            apt_ext.report(apt, None, tmp_path / path, rounds=0, title="new")
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert {file.name for file in tmp_path.iterdir()} == {"old"}


def test_what_is_missing_is_named_with_its_extra(apt, tmp_path, monkeypatch):
    for module in ("matplotlib.figure", "jinja2"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            refused(ImportError, rf'{module.partition(".")[0]}; run: python -m pip install "apt_ext\[report\]"', tmp_path, apt)


def test_importing_apt_ext_imports_neither():
    program = "import apt_ext, sys; print([name for name in ('matplotlib', 'jinja2', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
    assert "report" in dir(apt_ext)


def test_losses_that_the_controller_has_are_taken(tmp_path):
    model, controller, _ = begun("bert")
    controller.losses = [(1, 0.5), (2, float("nan")), (3, 0.25)]
    apt_ext.report(model, controller, tmp_path / "page.html", rounds=0)
    assert numbers_in(tmp_path / "page.html")["losses"] == {"training": [[1, 0.5], [2, None], [3, 0.25]]}
    apt_ext.report(model, controller, tmp_path / "page.html", rounds=0, losses=[(1, 2.0)])
    assert numbers_in(tmp_path / "page.html")["losses"] == {"training": [[1, 2.0]]}


def test_names_cannot_end_the_script_or_the_page(apt, tmp_path):
    evil = "</script><script>alert(1)</script>&amp;"
    apt_ext.report(apt, None, tmp_path / "page.html", rounds=0, title=evil, metrics={evil: evil})
    text = (tmp_path / "page.html").read_text()
    assert text.count("<script") == 1 and text.count("</script>") == 1
    assert numbers_in(tmp_path / "page.html")["title"] == evil
