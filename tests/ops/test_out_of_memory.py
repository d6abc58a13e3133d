"""An allocation that fails, whichever it is, leaves everything as it was; the next call works."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from failing_allocations import SCENARIOS
from small_adapter import make

# torch's CPU allocator asks here
SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>
static long remaining;
void fail_allocation(long n) { remaining = n; }
long allocations_left(void) { return remaining; }
int posix_memalign(void** out, size_t alignment, size_t size) {
  static int (*real)(void**, size_t, size_t);
  if (!real) real = (int (*)(void**, size_t, size_t))dlsym(RTLD_NEXT, "posix_memalign");
  if (remaining > 0 && --remaining == 0) return ENOMEM;
  return real(out, alignment, size);
}
"""
COMPACT_MODEL = ("compact a model", "put a compact model on the cpu")
WHOLE_MODEL = (
    *COMPACT_MODEL,
    "set_block_mask",
    "set_block_mask of a compact model",
    "set_block_mask of the stream",
    "cut",
    "shrink",
    "merge_and_unload",
)


@pytest.fixture(scope="module")
def failed_in_turn(tmp_path_factory):
    """A function: what failing_allocations.py says of these scenarios."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("needs Linux and a C compiler")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", "shim.so", "shim.c", "-ldl"], cwd=folder, check=True)

    def run(*arguments):
        environment = {**os.environ, "LD_PRELOAD": str(folder / "shim.so"), "PYTHONPATH": os.pathsep.join(sys.path)}
        script = Path(__file__).parents[1] / "helpers" / "failing_allocations.py"
        done = subprocess.run([sys.executable, script, *arguments], env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="module")
def outcomes(failed_in_turn):
    alone = failed_in_turn(*(name for name in SCENARIOS if name not in WHOLE_MODEL))
    return {**alone, **failed_in_turn("--sparse", *WHOLE_MODEL)}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_failed_allocation_changes_nothing(outcomes, name):
    outcome = outcomes[name]
    assert isinstance(outcome, int), outcome
    assert outcome >= (0 if name == "unmerge" else 1)  # unmerge allocates nothing


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE_MODEL)
def test_every_allocation_of_what_changes_a_whole_model(failed_in_turn, name):
    outcome = failed_in_turn(name)[name]
    assert isinstance(outcome, int) and outcome > 10, outcome


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("call", ["merge", "grow", "load"])
def test_out_of_device_memory(call):
    """A limit just above what is in use: the copy of the weight, or the new factors, no longer fit."""
    from torch import nn

    from apt_ext import APTAdapter

    adapter = APTAdapter.from_linear(nn.Linear(4096, 4096, device="cuda"), 256)
    other = APTAdapter(4096, 4096, 2048, device="cpu").state_dict()
    adapter.set_masks(torch.rand(4096, device="cuda"))
    before = {name: value.clone().cpu() for name, value in adapter.state_dict().items()}
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    fillers, reserved = [], torch.cuda.memory_reserved()  # what is reserved and free would serve without asking the device
    while torch.cuda.memory_reserved() == reserved:
        fillers.append(torch.empty(2 << 20, dtype=torch.uint8, device="cuda"))
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            if call == "merge":
                adapter.merge_weights()
            elif call == "grow":
                adapter.increase_rank(2048)
            else:
                adapter.load_state_dict({**adapter.state_dict(), **other})
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        del fillers
    after = adapter.state_dict()
    assert not adapter.merged and adapter.rank == 256 and all(torch.equal(value, after[name].cpu()) for name, value in before.items())
    adapter.merge_weights()


def test_a_merge_that_fails_late_is_undone_by_load(monkeypatch):
    """The weight of the state is loaded by then; rank, factors, masks, weight and merge are those from before."""
    adapter, other = make(dtype=torch.float16), make(dtype=torch.float16, rank=5)
    with torch.no_grad():
        other.lora_A.fill_(200), other.lora_B.fill_(200)
    adapter.merge_weights()
    before = {name: value.clone() for name, value in adapter.state_dict().items()}
    merged = adapter.weight.detach().clone()
    state = {**other.state_dict(), "merged": torch.tensor(True)}
    with pytest.raises(RuntimeError, match="would not be finite"):
        adapter.load_state_dict(state)
    assert adapter.merged and torch.equal(adapter.weight, merged)
    after = adapter.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    with pytest.raises(RuntimeError, match="already carries the merge of another adapter"):
        type(adapter).from_linear(adapter.base_layer, 1).merge_weights()
    adapter.unmerge_weights()
    assert torch.equal(adapter.weight, before["base_layer.weight"])
