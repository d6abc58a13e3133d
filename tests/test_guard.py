"""apt_ext.guard: an optimizer whose state no longer fits its Parameter raises and touches nothing."""

import copy
import io
import subprocess
import sys
import textwrap

import pytest
import torch
from low_rank_pair import OPTIMIZERS, Pair, refused
from torch import nn
from torch.optim import Adafactor, AdamW

from apt_ext import guard as guarding
from apt_ext.guard import guard


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "sgd"])
def test_stale_state_is_refused_by_every_optimizer(name):
    """In a child process for the fused ones, see below; here too, as the guard comes before the step."""
    pair = Pair()
    first = nn.Parameter(torch.ones(3, 3))  # stepped before the stale one, were there no guard
    optimizer = OPTIMIZERS[name][0]([first, *pair.parameters()])
    first.grad = torch.ones(3, 3)
    pair.loss().backward()
    optimizer.step()
    pair.grow()
    optimizer.zero_grad()
    first.grad = torch.ones(3, 3)
    pair.loss().backward()
    before = first.detach().clone()
    refused(pair, [optimizer], RuntimeError, rf"{type(optimizer).__name__}: state '\w+' has shape .*increase_rank", optimizer.step)
    assert torch.equal(first, before)


def test_stale_adafactor_is_refused_before_it_moves_anything():
    pair = Pair()
    optimizer = Adafactor(pair.parameters())
    pair.train_steps(optimizer)
    pair.grow()
    optimizer.zero_grad()
    pair.loss().backward()
    refused(pair, [optimizer], RuntimeError, r"Adafactor: state 'row_var' has shape \(4, 1\)", optimizer.step)


def test_unknown_optimizer_may_keep_tensors_of_any_shape():
    class Projected(torch.optim.Optimizer):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                self.state[p]["projection"] = torch.ones(2, 6)

    pair = Pair()
    pair.grow()
    optimizer = Projected(pair.parameters(), {})
    for _ in range(2):
        optimizer.step()


FUSED_CHILD = """
import torch, sys
from torch import nn
from apt_ext.growth import Resize, resize_parameters
from apt_ext.guard import guard
P = torch.optim
for make in (
    lambda p: P.AdamW(p, fused=True), lambda p: P.Adam(p, fused=True, amsgrad=True),
    lambda p: P.SGD(p, lr=0.1, momentum=0.9, fused=True), lambda p: P.Adagrad(p, fused=True),
):
    for how in ("growth", "load", "grad"):
        p = nn.Parameter(torch.ones(64, 64))
        optimizer = make([p])
        p.grad = torch.ones(64, 64)
        optimizer.step()
        guard(p)
        if how == "growth":
            resize_parameters([Resize(p, torch.ones(4096, 64), 0)])
        elif how == "load":
            saved = optimizer.state_dict()
            p = nn.Parameter(torch.ones(4096, 64))
            guard(p)
            optimizer = make([p])
            optimizer.load_state_dict(saved)
        else:
            resize_parameters([Resize(p, torch.ones(4096, 64), 0)], optimizer)
            with torch.no_grad():  # another size behind our back, the gradient stays
                p.set_(torch.ones(64, 64))
                p.grad = torch.ones(64, 64)
                p.set_(torch.ones(4096, 64))
        if how != "grad":
            p.grad = torch.ones(4096, 64)
        value, state = p.detach().clone(), {k: torch.as_tensor(v).clone() for k, v in optimizer.state.get(p, {}).items()}
        try:
            optimizer.step()
        except RuntimeError as error:
            assert "expected the Parameter's (4096, 64)" in str(error), error
        else:
            raise SystemExit(f"{type(optimizer).__name__} stepped after {how}")
        assert torch.equal(p, value)
        assert all(torch.equal(torch.as_tensor(v), state[k]) for k, v in optimizer.state.get(p, {}).items())
print("fine")
"""


def child(code):
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)


def test_fused_steps_never_touch_memory_behind_stale_tensors():
    done = child(FUSED_CHILD)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


def test_guard_after_optimizer_load_state_dict_of_another_rank():
    small, large = Pair(rank=4), Pair(rank=7)
    old = AdamW(small.parameters())
    small.train_steps(old)
    optimizer = AdamW(large.parameters(), fused=True)
    guard(*large.parameters())
    optimizer.load_state_dict(old.state_dict())
    large.loss().backward()
    refused(large, [optimizer], RuntimeError, r"state 'exp_avg' has shape \(4, 6\), expected the Parameter's \(7, 6\)", optimizer.step)


def test_guard_is_lost_by_deepcopy_and_taken_again():
    pair = copy.deepcopy(Pair())
    guard(*pair.parameters(), *pair.parameters())
    assert getattr(pair.lora_A, guarding._FORMER) == ((4, 6),)
    twin = copy.deepcopy(pair)
    assert not hasattr(twin.lora_A, guarding._FORMER)
    again = torch.load(_saved(pair.lora_A), weights_only=True)
    assert torch.equal(again, pair.lora_A)


def _saved(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return buffer


def test_one_global_hook():
    from torch.optim.optimizer import _global_optimizer_pre_hooks as hooks

    guard(nn.Parameter(torch.ones(1)))
    guard(nn.Parameter(torch.ones(1)))
    assert list(hooks.values()).count(guarding._before_step) == 1


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own import of its compiler
def test_compiled_step():
    pair = Pair()
    guard(*pair.parameters())
    optimizer = AdamW(pair.parameters())
    step = torch.compile(optimizer.step, backend="eager")
    for grown in (False, True):
        if grown:
            pair.grow(optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            pair.loss().backward()
            step()
    pair.grow(rank=8)
    optimizer.zero_grad()
    pair.loss().backward()
    with pytest.raises(RuntimeError, match="has shape"):
        step()
