"""The devices, the dtypes and contract's accuracy rule, once."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import settings

import apt_ext
from apt_ext import reference

# HYPOTHESIS_PROFILE=nightly searches longer. Failures are kept in .hypothesis, which git ignores.
settings.register_profile("default", deadline=None)
settings.register_profile("nightly", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

pytest.register_assert_rewrite("low_rank_pair")

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]),
]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

# |error|_2 <= eps * |sum of magnitudes|_2, so that cancellation asks for no digits that nobody has.
EPS = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}


def assert_accurate(actual: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor, dtype: torch.dtype, what: str = "") -> None:
    """``expected`` and ``magnitude`` in float64; NaN and Inf never pass."""
    assert actual.shape == expected.shape, what
    error = torch.linalg.vector_norm(actual.detach().double().cpu() - expected.detach().cpu())
    bound = EPS[dtype] * torch.linalg.vector_norm(magnitude.detach().cpu())
    assert error <= bound, f"{what}: error {error:.3e}, allowed {bound:.3e}"  # false for NaN


class Problem:
    """One random layer with its float64 oracle: forward, gradients and the magnitudes that bound their errors."""

    def __init__(self, shape, N, K, R, dtype, device="cpu", masks="none", weight=True, bias=True, factor_dtype=None, scaling=1.7, seed=0):
        g = torch.Generator().manual_seed(seed)

        def draw(*size, to=dtype):
            return torch.randn(*size, generator=g, dtype=torch.float64).to(to).to(device)

        self.dtype, self.device, self.scaling = dtype, device, scaling
        self.x, self.grad = draw(*shape, K), draw(*shape, N)
        self.weight = draw(N, K) if weight else None
        self.bias = draw(N) if bias else None
        self.lora_A, self.lora_B = draw(R, K, to=factor_dtype or dtype), draw(N, R, to=factor_dtype or dtype)
        self.mask_in, self.mask_out = make_mask(masks, K, g, device), make_mask(masks, N, g, device)

    def run(self, function):
        """(y, dx, dA, dB, db) of ``function``, an apt_linear."""
        leaves = [t.detach().clone().requires_grad_() for t in (self.x, self.lora_A, self.lora_B)]
        bias = None if self.bias is None else self.bias.detach().clone().requires_grad_()
        y = function(leaves[0], self.weight, bias, leaves[1], leaves[2], self.mask_in, self.mask_out, self.scaling)
        inputs = [*leaves, *([] if bias is None else [bias])]
        grads = torch.autograd.grad(y, inputs, self.grad)
        return {"y": y.detach(), **dict(zip(("dx", "dA", "dB", "db"), grads, strict=False))}

    def oracle(self):
        return self._double(lambda t: t).run(reference.apt_linear)

    def magnitudes(self):
        absolute = self._double(torch.abs)
        absolute.scaling = abs(self.scaling)
        return absolute.run(reference.apt_linear)

    def _double(self, change):
        other = object.__new__(Problem)
        other.__dict__.update(self.__dict__)
        for name in ("x", "grad", "weight", "bias", "lora_A", "lora_B", "mask_in", "mask_out"):
            value = getattr(self, name)
            if value is not None and name in ("lora_A", "lora_B"):
                value = value.to(self.dtype)  # float32 factors are rounded once to the compute dtype
            setattr(other, name, None if value is None else change(value.detach().double().cpu()))
        return other

    def poisoned(self):
        """NaN and Inf in every pruned lane of x, grad, lora_A, lora_B and bias."""
        other = object.__new__(Problem)
        other.__dict__.update(self.__dict__)
        for name, mask, dim in (("x", self.mask_in, -1), ("lora_A", self.mask_in, -1), ("grad", self.mask_out, -1)):
            other.__dict__[name] = poison(getattr(self, name), mask, dim)
        other.lora_B = poison(self.lora_B, self.mask_out, 0)
        other.bias = None if self.bias is None else poison(self.bias, self.mask_out, 0)
        return other

    def check(self, got, clean=None):
        expected, magnitude = (clean or self).oracle(), (clean or self).magnitudes()
        assert got.keys() == expected.keys()
        for name, value in got.items():
            assert_accurate(value, expected[name], magnitude[name], self.dtype, name)


def make_mask(kind, size, generator, device):
    if kind == "none":
        return None
    mask = (torch.rand(size, generator=generator) > 0.3).float()
    if kind == "soft":
        mask = mask * torch.rand(size, generator=generator)
    elif kind == "zero":
        mask = torch.zeros(size)
    elif kind == "one":
        mask = torch.zeros(size)
        mask[size // 2 : size // 2 + 1] = 1
    return mask.to(device)


def poison(tensor, mask, dim):
    if mask is None:
        return tensor
    tensor = tensor.clone()
    pruned = (mask == 0).nonzero().flatten()
    bad = torch.full((len(pruned),), float("nan"), dtype=tensor.dtype, device=tensor.device)
    bad[::2] = float("inf")
    shape = [1] * tensor.dim()
    shape[dim] = -1
    tensor.index_copy_(dim % tensor.dim(), pruned, bad.view(shape).expand_as(tensor.index_select(dim % tensor.dim(), pruned)).contiguous())
    return tensor


OUTCOMES: dict[str, set[str]] = {}  # of every test, or class of tests, by its name, for test_reliability_doc.py, which comes last


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
        from test_reliability_doc import missing

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
    program = pathlib.Path(__file__).with_name("helpers") / "fused_steps.py"
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
    from apt_ext.exporting import directories, reload

    def reloaded(directory, loader, exchange):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "apt_ext", apt_ext if loader == "apt_ext" else None)
            lines = []
            patch.setattr("builtins.print", lines.append)
            try:
                reload.main(str(directory), loader, str(exchange))
            except (ValueError, RuntimeError, ZeroDivisionError, TypeError) as error:
                return {"error": f"{type(error).__name__}: {error}"}
        return json.loads(lines[0])

    monkeypatch.setattr(directories, "_reloaded", reloaded)


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """What apt-ext results learns from, tiny, as tests/evidence/small_cells.py packs it."""
    from small_cells import packed

    return packed(tmp_path_factory.mktemp("pack"))


@pytest.fixture
def place(pack, tmp_path, monkeypatch):
    """Quick cells of it, whose rounds of the clock last no time."""
    from apt_ext.tools.checkout.evidence.cell import Place

    from apt_ext.tools import measuring

    monkeypatch.setattr(measuring, "_ROUND", 0.0)
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
