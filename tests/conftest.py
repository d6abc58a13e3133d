"""Fixtures and hooks; what tests import is in helpers."""

from __future__ import annotations

import gc
import json
import os
import pathlib
import shutil
import subprocess
import sys
import warnings
from contextlib import nullcontext

import pytest
import torch
from hypothesis import settings

import apt_ext

HELPERS = pathlib.Path(__file__).with_name("helpers")
pytest.register_assert_rewrite(*(file.stem for file in HELPERS.glob("*.py")))
from problems import DTYPES  # noqa: E402
from proofs import OUTCOMES, missing  # noqa: E402

# HYPOTHESIS_PROFILE=nightly searches longer. Failures are kept in .hypothesis, which git ignores.
settings.register_profile("default", deadline=None)
settings.register_profile("nightly", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]),
]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name == "test_reliability_doc.py")


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        name = "::".join(report.nodeid.partition("[")[0].split("::")[:2])
        OUTCOMES.setdefault(name, set()).add(report.outcome)


def pytest_sessionfinish(session):
    """Where processes test together, each sees a part: the one that controls them says which proofs did not run."""
    together = getattr(session.config.option, "dist", "no") not in ("no", None)
    if together and not hasattr(session.config, "workerinput"):
        missed = missing(session.config, {name.partition("::")[0] for name in OUTCOMES})
        if missed:
            print(f"\ndocs/reliability.md names tests that did not run: {missed}")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture(scope="session")
def fused_is_guarded():
    """Without the guard a fused step crashes this process, so another one tries it first."""
    program = HELPERS / "fused_steps.py"
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session", autouse=True)
def _cuda_context():
    """torch warns once where the first thing its backward thread does is a cuBLAS call; let that be here."""
    if torch.cuda.is_available():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            leaf = torch.ones(2, 2, device="cuda", requires_grad=True)
            (leaf @ leaf).sum().backward()


@pytest.fixture(scope="module", autouse=True)
def _imports_are_no_garbage():
    """No collection looks again at what is there before a file's tests: at all imports it takes 0.4 s, and accelerate asks for many."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan(request):
    """torch fills what it allocates with NaN, at::empty in C++ too: a read of it shows.

    On CUDA, where that switch rules cuBLAS too, what the allocator will hand out is filled instead: blocks of its two kinds of segment.
    """
    on_cuda = request.node.get_closest_marker("cuda") is not None
    torch.use_deterministic_algorithms(not on_cuda)
    if on_cuda and torch.cuda.is_available():
        torch.cuda.empty_cache()
        blocks = [torch.full((size,), float("nan"), device="cuda") for size in (*[1 << 18] * 8, 5 << 20)]
        del blocks
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _isolated():
    """Each test starts from the same generator and an empty compile cache; a leaked one hides recompilations."""
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in __import__("sys").modules:
        torch._dynamo.reset()


@pytest.fixture
def loaded_here(monkeypatch):
    """Exports load what they wrote in this process, with the same script and in no seconds; test_reload.py does it in another."""
    from apt_ext.exporting import directories, peft_directories, reload

    def reloaded(directory, loader, exchange):
        with monkeypatch.context() as patch:
            patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(exchange.with_name("modules")))
            patch.setattr(sys, "path", sys.path[:])
            patch.setitem(sys.modules, "apt_ext", apt_ext if loader == "apt_ext" else None)
            lines = []
            patch.setattr("builtins.print", lines.append)
            try:
                reload.main(str(directory), loader, str(exchange))
            except (ValueError, RuntimeError, ZeroDivisionError, TypeError) as error:
                return {"error": f"{type(error).__name__}: {error}"}
        return json.loads(lines[0].removeprefix(reload.MARK))

    for module in (directories, peft_directories):
        monkeypatch.setattr(module, "started", lambda kind: nullcontext(reloaded))


@pytest.fixture
def unpainted(monkeypatch):
    """Pages have no pictures, which take a second of each run of apt-ext train; those of test_train.py and of tests/reporting have them."""
    monkeypatch.setattr("apt_ext.reporting.figures.as_png", lambda draw, theme: b"")


@pytest.fixture
def shared():
    """Layers share inputs wherever it is right: on the CPU it saves nothing."""
    from apt_ext.adapter import shared_inputs

    shared_inputs.this_thread.held = None
    with shared_inputs.sharing("always"):
        yield


@pytest.fixture
def calls(monkeypatch, shared):
    """How many layers each computation of layers that share an input had; on the CPU they do where they can."""
    found = []
    real = apt_ext._C.shared_linear

    def counted(x, layers, always, rng):
        found.append(len(layers))
        return real(x, layers, always, rng)

    monkeypatch.setattr(apt_ext._C, "shared_linear", counted)
    return found


@pytest.fixture(scope="module")
def own_source(tmp_path_factory):
    """A tiny classifier of 3 labels with its tokenizer."""
    from own_source import classifier

    return classifier(tmp_path_factory.mktemp("classifier"), num_labels=3)


@pytest.fixture(scope="module")
def own_data(tmp_path_factory):
    """A table of two classes that it can learn."""
    from own_source import table

    return table(tmp_path_factory.mktemp("data"))


@pytest.fixture
def out(tmp_path):
    """A directory that is not there yet."""
    return tmp_path / "out"


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """What apt-ext results learns from, tiny, as tests/evidence/small_cells.py packs it."""
    from small_cells import packed

    return packed(tmp_path_factory.mktemp("pack"))


@pytest.fixture
def place(pack, tmp_path, monkeypatch):
    """Quick cells of it, whose rounds of the clock last no time."""
    from apt_ext.tools.checkout.evidence.cell import Place

    from apt_ext.common import clock

    monkeypatch.setattr(clock, "_ROUND", 0.0)
    return Place(pack, tmp_path / "cells", "cpu", "here", quick=True)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint as tests/helpers/forged.py saves it."""
    from forged import save_good

    return save_good(tmp_path_factory.mktemp("good"))


@pytest.fixture
def bad(good, tmp_path):
    """A copy of it to damage."""
    shutil.copytree(good, tmp_path / "bad")
    return tmp_path / "bad"
