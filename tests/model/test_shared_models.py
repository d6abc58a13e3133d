"""Whole models whose linears share their inputs: which do, and that nothing else changes."""

import copy
import pickle

import pytest
import torch
from checkpointing import REENTRANT
from families import EVERY, FAMILIES
from training import SHORT, batch_for, built, train

from apt_ext import Controller, adapters
from apt_ext.adapter.shared_inputs import sharing

SHARE = {"bert": [(3, 2)], "llama": [(3, 2), (2, 2)], "gpt2": [], "t5": [(3, 4), (2, 2)]}  # (members, how often) a forward


@pytest.mark.parametrize("name", SHARE)
def test_which_layers_of_a_model_share(calls, name):
    apt, _ = built(FAMILIES[name])
    for _ in range(2):
        calls.clear()
        apt(**batch_for(FAMILIES[name], 0))
        assert sorted(calls) == sorted(size for size, often in SHARE[name] for _ in range(often))


@EVERY
def test_a_model(family):
    found = []
    for mode in ("always", "never"):
        apt, _ = built(family)
        for _, adapter in adapters(apt):
            with torch.no_grad():
                adapter.lora_B.normal_(0, 0.2)
        torch.manual_seed(0)
        with sharing(mode):
            loss = apt(**batch_for(family, 0)).loss
            loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in apt.parameters() if parameter.requires_grad)])
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@REENTRANT
def test_a_checkpointed_model(reentrant):
    found = []
    for mode in ("always", "never"):
        apt, _ = built(FAMILIES["llama"])
        enable = getattr(apt, "activation_checkpointing_enable", apt.gradient_checkpointing_enable)
        enable({"use_reentrant": reentrant})
        with sharing(mode):
            apt(**batch_for(FAMILIES["llama"], 0)).loss.backward()
        found.append([parameter.grad for parameter in apt.parameters() if parameter.requires_grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
@pytest.mark.parametrize("shrink", ["cut", "none"])
def test_a_run_with_events(calls, name, shrink):
    found = []
    for mode in ("always", "never"):
        apt, optimizer = built(FAMILIES[name])
        controller = Controller(apt, optimizer, 16, **{**SHORT, "shrink": shrink})
        with sharing(mode):
            train(apt, optimizer, controller, FAMILIES[name], 16)
        found.append((controller.history, [parameter.detach() for parameter in apt.parameters()]))
        assert calls if mode == "always" else True
    for ours, theirs in zip(found[0][0], found[1][0], strict=True):
        assert (ours["kept"], ours["ranks"]) == (theirs["kept"], theirs["ranks"])
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_copies_and_unloaded_models(calls):
    apt, _ = built(FAMILIES["llama"])
    batch = batch_for(FAMILIES["llama"], 0)
    for other in (copy.deepcopy(apt), pickle.loads(pickle.dumps(apt))):  # noqa: S301
        calls.clear()
        other(**batch)
        assert len(calls) == 4
        ours, its = (next(adapters(model))[1].shared[0] for model in (apt, other))
        assert ours is not its
    name, adapter = next((name, adapter) for name, adapter in adapters(apt) if name.endswith("k_proj"))
    apt.model.set_submodule(name, adapter.base_layer)
    with sharing("never"):
        expected = apt(**batch).logits
    calls.clear()
    for _ in range(4):
        assert torch.equal(apt(**batch).logits, expected)
    assert calls[:4] == [3, 2, 3, 2] and calls[-4:] == [2, 2, 3, 2]
    apt.model.set_submodule(name, adapter)
    stock = apt.merge_and_unload()
    calls.clear()
    stock(**batch)
    assert not calls
