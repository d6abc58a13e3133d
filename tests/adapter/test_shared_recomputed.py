"""Adapters that read one x, in forwards that are computed again: what is drawn and what is saved is the same both times."""

import contextlib

import pytest
import torch
from attentions import an_x, attention
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from apt_ext.adapter.shared_inputs import sharing

REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])


pytestmark = pytest.mark.usefixtures("shared")


def freeze(adapter):
    for parameter in adapter.parameters():
        parameter.requires_grad_(False)


def each_in_its_own(adapters, x, run):
    return [run(adapters[name], x) for name in "qkv"]


def all_in_one(adapters, x, run):
    return [run(lambda x: torch.cat([adapters[name](x) for name in "qkv"], -1), x)]


def two_of_three(adapters, x, run):
    return [run(lambda x: torch.cat([adapters["q"](x), adapters["v"](x)], -1), x)]


def one_before(adapters, x, run):
    with torch.no_grad():
        adapters["q"](x)
    return [adapters["q"](x), run(lambda x: torch.cat([adapters[name](x) for name in "kvq"], -1), x)]


@pytest.mark.parametrize("frozen", ["", "q", "k"])
@pytest.mark.parametrize("calls", [each_in_its_own, all_in_one, two_of_three, one_before], ids=lambda one: one.__name__)
@REENTRANT
def test_a_recomputation_drops_what_its_forward_dropped(reentrant, calls, frozen):
    adapters = attention(dropout=0.5)
    for name in frozen:
        freeze(adapters[name])
    for _ in range(4):
        seen = []

        def run(function, x, seen=seen):
            own = []
            seen.append(own)

            def noted(x):
                y = function(x)
                own.append(y.detach().clone())
                return y

            return checkpoint(noted, x, use_reentrant=reentrant)

        with set_checkpoint_early_stop(False):
            sum((y**2).sum() for y in calls(adapters, an_x(requires_grad=True), run)).backward()
        assert seen and all(len(one) == 2 and torch.equal(*one) for one in seen)


@REENTRANT
def test_gradients_of_each_in_its_own_checkpoint_are_those_of_what_was_computed(reentrant):
    found = []
    for mode in ("always", "never"):
        adapters, x = attention(dropout=0.5), an_x(requires_grad=True)
        torch.manual_seed(3)
        with sharing(mode):
            sum((checkpoint(adapters[name], x, use_reentrant=reentrant) ** 2).sum() for name in "qkv").backward()
        found.append([x.grad, *(adapters[name].lora_A.grad for name in "qkv")])
    assert all(torch.allclose(ours, theirs, rtol=1e-5) for ours, theirs in zip(*found, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_frozen_one_beside_an_x_without_gradient_in_a_checkpoint(dropout):
    adapters = attention(dropout=dropout)
    freeze(adapters["k"])
    for _ in range(4):
        checkpoint(lambda x: torch.cat([adapters[name](x) for name in "qkv"], -1), an_x(), use_reentrant=False).sum().backward()


def test_a_frozen_one_is_not_computed_with_others_in_vain(calls):
    adapters = attention(dropout=0.0)
    freeze(adapters["k"])
    x = an_x()
    outputs = [adapters[name](x) for name in "qkv"]
    assert calls == [2] and [y.requires_grad for y in outputs] == [True, False, True]
    with torch.no_grad():
        outputs = [adapters[name](x) for name in "qkv"]
    assert calls == [2, 3] and not any(y.requires_grad for y in outputs)


def test_a_recomputation_takes_nothing_that_its_forward_left():
    adapters = attention(dropout=0.0)
    checkpoint(
        lambda x: torch.cat([adapters[name](x) for name in "kqvq"], -1), an_x(requires_grad=True), use_reentrant=False
    ).sum().backward()


def test_outputs_that_wait_are_not_drawn_for_a_checkpoint():
    adapters, x = attention(dropout=0.5), an_x(requires_grad=True)
    seen = []

    def again(x):
        seen.append(adapters["k"](x))
        return seen[-1]

    with set_checkpoint_early_stop(False):
        (adapters["q"](x).sum() + checkpoint(again, x, use_reentrant=False).sum()).backward()
    assert torch.equal(*(one.detach() for one in seen))


@pytest.mark.parametrize("where", [contextlib.nullcontext, torch.no_grad], ids=["grad", "no_grad"])
def test_what_a_group_remembers_does_not_grow_with_steps(where):
    adapters = attention(dropout=0.1)
    with where():
        for _ in range(20):
            x = an_x(requires_grad=True)
            outputs = [adapters[name](x) for name in "qkv"]
    assert len(outputs) == 3
    assert len(adapters["q"].shared[0]._classes) == 1
