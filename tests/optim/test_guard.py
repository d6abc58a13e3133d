"""apt_ext.guard: an optimizer whose state no longer fits its Parameter raises and touches nothing."""

import copy
import io

import pytest
import torch
from low_rank_pair import OPTIMIZERS, Pair, refused
from small_adapter import make
from torch import nn
from torch.optim import Adafactor, AdamW

from apt_ext.optim import step_guard as guarding
from apt_ext.optim.step_guard import guard


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "sgd"])
def test_stale_state_is_refused_by_every_optimizer(name, fused_is_guarded):
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


def test_fused_steps_never_touch_memory_behind_stale_tensors(fused_is_guarded):
    """The fixture runs fused_steps.py; every test that leaves a fused step to the guard asks for it first."""
    assert fused_is_guarded == "fine\n"


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "sgd"])
@pytest.mark.parametrize("old, new", [(4, 7), (7, 4)])
def test_an_optimizer_loaded_from_another_rank_is_refused(name, old, new, fused_is_guarded):
    make = OPTIMIZERS[name][0]
    source, pair = Pair(rank=old), Pair(rank=new)
    saved = make(source.parameters())
    source.train_steps(saved)
    optimizer = make(pair.parameters())
    guard(*pair.parameters())
    pair.train_steps(optimizer, 1)
    optimizer.load_state_dict(saved.state_dict())
    pair.loss().backward()
    expected = rf"state '\w+' has shape \({old}, 6\), expected the Parameter's \({new}, 6\)"
    refused(pair, [optimizer], RuntimeError, expected, optimizer.step)
    again = make(pair.parameters())
    pair.train_steps(again)


# -- closures: they run within the step, after the hook has looked ------------------------------------------------------------------------


def closures(pair):
    """(a closure that breaks the rule, the message)"""

    def grows():
        pair.zero_grad()
        pair.loss().backward()
        pair.grow()
        return 1.0

    kept = (pair.lora_A * 3.0).sum()  # a graph that has not saved lora_A, so torch lets its gradient of the old shape in

    def stale_gradient():
        pair.zero_grad()
        with torch.no_grad():
            pair.lora_A.set_(torch.ones(7, 6))
        kept.backward()
        pair.lora_B.grad = torch.ones_like(pair.lora_B)
        return 1.0

    return [(grows, "within an optimizer's closure"), (stale_gradient, r"the gradient has shape \(4, 6\)")]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_cannot_change_sizes_behind_the_step(which, by_name, fused_is_guarded):
    pair = Pair()
    optimizer = AdamW(pair.parameters(), fused=True)
    guard(*pair.parameters())
    closure, match = closures(pair)[which]
    B = pair.lora_B.detach().clone()
    with pytest.raises(RuntimeError, match=match):
        optimizer.step(closure=closure) if by_name else optimizer.step(closure)
    assert torch.equal(pair.lora_B, B) and not optimizer.state
    if pair.lora_A.shape == (4, 6):
        pair.grow(optimizer)  # between steps again
        pair.train_steps(optimizer)


def test_a_closure_may_grow_within_max_rank_and_is_called_as_often_as_ever():
    adapter, calls = make(max_rank=6), []
    optimizer = torch.optim.LBFGS([adapter.lora_A, adapter.lora_B], lr=0.01, max_iter=4)

    def closure():
        optimizer.zero_grad()
        calls.append(adapter.rank)
        if len(calls) == 2:
            adapter.increase_rank(5)
        loss = adapter(torch.ones(2, 10, dtype=torch.float64)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(calls) == 4 and not adapter.lora_A[5:].any() and not adapter.lora_B[:, 5:].any()


# -- reserved rows ------------------------------------------------------------------------------------------------------------------------


def trained(optimizer_name, rank):
    adapter = make(rank=rank, max_rank=6, scaling=0.5)
    optimizer = OPTIMIZERS[optimizer_name][0]([adapter.lora_A, adapter.lora_B])
    train(adapter, optimizer)
    return adapter, optimizer


def train(adapter, optimizer, count=3):
    for _ in range(count):
        optimizer.zero_grad()
        (adapter(torch.ones(2, 10, dtype=torch.float64)) - 0.3).square().mean().backward()
        optimizer.step()


def nothing_reserved_moved(adapter, optimizer):
    rank, y = adapter.rank, adapter(torch.ones(2, 10, dtype=torch.float64)).detach()
    train(adapter, optimizer)
    assert not adapter.lora_A[rank:].any() and not adapter.lora_B[:, rank:].any()
    assert not torch.equal(adapter(torch.ones(2, 10, dtype=torch.float64)), y)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_smaller_rank_loaded_under_a_live_optimizer_stays_smaller(name):
    """Momentum of rows that are not in use any more would bring them back, and nothing would say so."""
    adapter, optimizer = trained(name, 6)
    adapter.load_state_dict(make(rank=3, max_rank=6).state_dict())
    assert not adapter.lora_A.grad[3:].any() and not adapter.lora_B.grad[:, 3:].any()
    optimizer.step()  # with the gradients of before, whose rows in use are as they were
    nothing_reserved_moved(adapter, optimizer)
    for p, dim in ((adapter.lora_A, 0), (adapter.lora_B, 1)):
        for key, start in OPTIMIZERS[name][1].items():
            if key in ("exp_avg", "momentum_buffer", "square_avg", "sum"):
                assert (optimizer.state[p][key].narrow(dim, 3, 3) == start).all()
    adapter.increase_rank(6)
    train(adapter, optimizer)
    assert adapter.Wb[:, 3:].any()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_loaded_from_a_larger_rank_moves_no_reserved_row(name):
    _, saved = trained(name, 6)
    adapter, optimizer = trained(name, 3)
    optimizer.load_state_dict(saved.state_dict())
    nothing_reserved_moved(adapter, optimizer)


def test_state_in_use_is_left_alone():
    adapter, optimizer = trained("adamw", 3)
    fresh = AdamW([adapter.lora_A, adapter.lora_B], lr=0.01)
    fresh.load_state_dict(optimizer.state_dict())
    other, its_own = copy.deepcopy((adapter, optimizer))
    train(adapter, fresh)
    train(other, its_own)
    assert torch.equal(adapter.lora_A, other.lora_A) and torch.equal(adapter.lora_B, other.lora_B)


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
