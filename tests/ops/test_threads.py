"""Threads run ops together, the interpreter goes on meanwhile, forked workers work, and there is one OpenMP runtime."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from small_adapter import make, masks

from apt_ext import _C, ops


@pytest.fixture
def switching():
    """Threads take turns as often as the interpreter can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def together(count, function):
    """function(0), ... function(count - 1), begun at one moment."""
    barrier = threading.Barrier(count)

    def run(index):
        barrier.wait()
        return function(index)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def step(adapter, x):
    """(y, gradients): bitwise the same whoever computes it."""
    leaf = x.clone().requires_grad_()
    y = adapter(leaf)
    return y.detach(), *torch.autograd.grad(y.square().sum(), (leaf, adapter.lora_A, adapter.lora_B))


@pytest.mark.usefixtures("switching")
def test_eight_threads_compute_what_one_does(device, dtype):
    adapter = make(device, dtype)
    adapter.set_masks(*masks(device))
    inputs = [torch.randn(5, 10, device=device).to(dtype) for _ in range(8)]
    alone = [step(adapter, x) for x in inputs]
    for index, results in enumerate(together(8, lambda i: [step(adapter, inputs[i]) for _ in range(25)])):
        for result in results:
            assert all(map(torch.equal, result, alone[index])), index


@pytest.mark.usefixtures("switching")
def test_threads_that_merge_and_mask_their_own(dtype):
    """Eight adapters, one a thread: what they share is the library."""
    adapters = [make(dtype=dtype) for _ in range(8)]
    before = [adapter.weight.detach().clone() for adapter in adapters]

    def cycles(index):
        adapter, x = adapters[index].eval(), torch.ones(3, 10, dtype=dtype)
        for _ in range(10):
            adapter.set_masks(*masks())
            y = adapter(x)
            y.sum().backward()
            adapter.merge_weights()
            torch.testing.assert_close(adapter(x), y, rtol=0.05, atol=0.05)
            adapter.unmerge_weights()
            adapter.increase_rank(min(adapter.rank + 1, 7))
            adapter.apply_grad_mask()

    together(8, cycles)
    for adapter, weight in zip(adapters, before, strict=True):
        assert torch.equal(adapter.weight, weight)


@pytest.mark.usefixtures("switching")
def test_a_change_during_forwards_never_crashes():
    """Whose result a forward gets is the caller's business; that it is a result, and what stands after, is ours."""
    adapter, x = make(), torch.randn(16, 10, dtype=torch.float64)
    before = adapter.weight.detach().clone()

    def work(index):
        for _ in range(50):
            with torch.no_grad():
                if index == 0:
                    adapter.set_masks(torch.rand(10))
                    adapter.merge_weights()
                    adapter.unmerge_weights()
                else:
                    assert torch.isfinite(adapter.eval()(x)).all()

    together(8, work)
    assert torch.equal(adapter.weight, before) and not adapter.merged


class Counter(threading.Thread):
    """Counts while it gets the interpreter."""

    def __init__(self):
        super().__init__(daemon=True)
        self.count, self.stop = 0, False

    def run(self):
        while not self.stop:
            self.count += 1
            time.sleep(0.001)


def turns_during(prepare):
    """How often another thread got the interpreter during the call that prepare(rows) returns, with rows for at least 60 ms."""
    counter = Counter()
    counter.start()
    try:
        rows = 500
        while True:
            call = prepare(rows)
            before, start = counter.count, time.perf_counter()
            call()
            if time.perf_counter() - start > 0.06:
                return counter.count - before
            rows *= 2
    finally:
        counter.stop = True
        counter.join()


def operands(rows):
    return torch.ones(rows, 1000), torch.ones(64, 1000), torch.ones(rows, 64)


BIG = {
    "apt_linear": lambda door, W, A, B: door.apt_linear(
        W, torch.ones(1000, 1000), None, A, torch.ones(1000, 64), None, None, 1.0, 0.0, None
    ),
    "merge_": lambda door, W, A, B: door.merge_(W, A, B, 0.0, None, None, True),
    "mask_grads_": lambda door, W, A, B: door.mask_grads_([W], [torch.ones(len(W))], [0]),
}


@pytest.mark.parametrize("name", BIG)
@pytest.mark.parametrize("door", ["torch.ops", "_C"])
def test_the_interpreter_goes_on_during_a_long_op(name, door):
    door = torch.ops.apt_ext if door == "torch.ops" else _C
    assert turns_during(lambda rows: partial(BIG[name], door, *operands(rows))) >= 3  # one if the op held the lock


def test_the_interpreter_goes_on_during_a_backward():
    def prepare(rows):
        x, A, B = (t.requires_grad_() for t in operands(rows))
        return ops.apt_linear(x, torch.randn(rows, 1000), None, A, B).sum().backward

    assert turns_during(prepare) >= 3


FORKING = """
import signal, torch
signal.alarm(60)
from torch.utils.data import DataLoader, Dataset
from apt_ext import APTAdapter, ops
torch.set_num_threads(2)
adapter = APTAdapter.from_linear(torch.nn.Linear(700, 600), 4)
x = torch.randn(500, 700)
def work():
    y = adapter(x)
    y.sum().backward()
    adapter.merge_weights()
    adapter.unmerge_weights()
    ops.mask_grads_([torch.ones(700, 700)], [torch.ones(700)], [1])
    return y.detach()
class Data(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        signal.alarm(60)
        return work()
want = work()  # with two threads, before the fork
for got in DataLoader(Data(), batch_size=None, num_workers=2, multiprocessing_context="fork"):
    torch.testing.assert_close(got, want)
torch.testing.assert_close(work(), want)
print("works")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_after_a_threaded_op():
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", FORKING], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "works\n", done.stderr


OPENMP = """
import re, torch
from apt_ext import APTAdapter
adapter = APTAdapter.from_linear(torch.nn.Linear(700, 600), 4)
adapter(torch.randn(500, 700)).sum().backward()
adapter.merge_weights()
mapped = open("/proc/self/maps").read()
print(sorted(set(re.findall(r"/[^ \\n]*/lib(?:gomp|omp|iomp5)[^/\\n]*", mapped))))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux")
def test_one_openmp_runtime():
    done = subprocess.run(
        [sys.executable, "-c", OPENMP], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(eval(done.stdout)) == 1, done.stdout  # noqa: S307
