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


# -- on a GPU, where inputs are shared without being told to ----------------------------------------------------------

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}


def on_gpu(dtype=torch.bfloat16):
    """A LLaMA whose widths the passes take, and a batch."""
    apt, _ = built(FAMILIES["llama"], sizes=SIZES, r=4)
    for _, adapter in adapters(apt):
        with torch.no_grad():
            adapter.lora_B.normal_(0, 0.05)
    batch = {name: value.cuda() for name, value in batch_for(FAMILIES["llama"], 0).items()}
    return apt.to("cuda", dtype), batch


def gradients_of(apt):
    return torch.cat([parameter.grad.flatten().double() for parameter in apt.parameters() if parameter.requires_grad])


@pytest.mark.parametrize("how", ["plain", "autocast", "reentrant", "not reentrant", "masks"])
@pytest.mark.cuda
@NO_GPU
def test_on_a_gpu(calls, how):
    """The same logits to the bit; gradients differ by the order in which dx is added up."""
    found = []
    for mode in ("auto", "never"):
        dtype = torch.float32 if how == "autocast" else torch.bfloat16
        apt, batch = on_gpu(dtype)
        if "reentrant" in how:
            enable = getattr(apt, "activation_checkpointing_enable", apt.gradient_checkpointing_enable)
            enable({"use_reentrant": how == "reentrant"})
        if how == "masks":
            apt.set_block_mask("0.neurons", (torch.arange(48) % 3 > 0).float())
            apt.set_block_mask("1.heads", torch.tensor([1.0, 0.5]))
        calls.clear()
        with sharing(mode), torch.autocast("cuda", torch.bfloat16, enabled=how == "autocast"):
            out = apt(**batch)
            out.loss.backward()
        assert len(calls) == (0 if mode == "never" else 8 if "reentrant" in how else 4)
        found.append((out.logits, gradients_of(apt)))
    assert torch.equal(found[0][0], found[1][0])
    ours, theirs = found[0][1], found[1][1]
    assert (ours - theirs).norm() < 2e-2 * theirs.norm()


@pytest.mark.cuda
@NO_GPU
def test_another_stream(calls):
    """What was computed on one stream is not handed out on another."""
    apt, _ = on_gpu()
    q, k = (dict(adapters(apt))[f"model.layers.0.self_attn.{name}_proj"] for name in "qk")
    x = torch.randn(3, 7, 64, device="cuda", dtype=torch.bfloat16)
    with sharing("auto"):
        q(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            k(x)
        torch.cuda.synchronize()
        k(x)
    assert calls == [3, 3, 3]


@pytest.mark.cuda
@NO_GPU
def test_memory_of_steps_is_flat():
    apt, batch = on_gpu()
    peaks = []
    for _ in range(6):
        torch.cuda.reset_peak_memory_stats()
        apt(**batch).loss.backward()
        apt.zero_grad()
        peaks.append((torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()))
    assert len(set(peaks[2:])) == 1
