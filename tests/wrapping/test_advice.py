"""What a run is told, once: adapters that a fused loss goes round, and growing ranks in a compiled model."""

import logging

import pytest
import torch
from families import FAMILIES
from torch.nn import functional as F
from training import batch_for, built, train

from apt_ext import APTConfig, Controller, adapter_parameters, adapters, get_apt_model

ROUND = "got no gradient although others did"
OUTPUT = "is the output layer, and its adapter learns only where the loss calls it"
AGAIN = "ranks grow in {} adapters without max_rank"


@pytest.fixture
def said(caplog):
    """The lines of the logger so far that hold some words."""
    caplog.set_level(logging.WARNING, "apt_ext")
    return lambda words: [record.getMessage() for record in caplog.records if words in record.getMessage()]


def fused(apt, ids):
    """A loss from the weight of the output layer, as Liger and cut-cross-entropy compute it."""
    states = apt.model.base_model(ids)[0][:, :-1]
    return F.cross_entropy((states @ apt.model.get_output_embeddings().weight.t()).flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize(("name", "head"), [("llama", "lm_head"), ("gpt2", "lm_head"), ("bert-mlm", "decoder")])
def test_an_adapter_on_the_output_layer(said, name, head):
    """Said when the model is made, and again by observe() where a loss goes round the adapter; its factors
    stand still."""
    family = FAMILIES[name]
    inner = {"llama": "q_proj", "gpt2": "c_attn", "bert-mlm": "query"}[name]
    with torch.no_grad():
        stock = family.model(torch.float32, tie_word_embeddings=False)
    get_apt_model(family.model(torch.float32, tie_word_embeddings=False), APTConfig(r=2, target_modules=[inner]))
    assert said(OUTPUT) == []
    apt = get_apt_model(stock, APTConfig(r=2, target_modules=[inner, head], density=1.0))
    (line,) = said(OUTPUT)
    at = next(name for name, module in apt.model.named_modules() if module is apt.model.get_output_embeddings())
    assert line.startswith(f"target_modules: {at} is") and f"exclude_modules=['{head}']" in line
    optimizer = torch.optim.AdamW(adapter_parameters(apt), lr=1e-2)
    controller = Controller(apt, optimizer, 8, growth=1.0)
    ids = family.inputs()["input_ids"]
    for _ in range(3):
        fused(apt, ids).backward()
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
    (line,) = said(ROUND)
    count = sum(adapter.rank > 0 for _, adapter in adapters(apt))
    assert line.startswith(f"observe: 1 of {count} adapters {ROUND}: {at}. ") and "exclude_modules" in line and "expert" in line
    assert not any(bool(adapter.lora_B.any()) for name, adapter in adapters(apt) if name == at)
    assert all(bool(adapter.lora_B.any()) for name, adapter in adapters(apt) if adapter.rank and name != at)


def test_what_the_loss_calls_learns_and_nothing_is_said(said):
    family = FAMILIES["llama"]
    apt = get_apt_model(family.model(), APTConfig(r=2, target_modules=["q_proj", "lm_head"], density=1.0))
    optimizer = torch.optim.AdamW(adapter_parameters(apt), lr=1e-2)
    train(apt, optimizer, Controller(apt, optimizer, 8, growth=1.0), family, 2)
    assert said(ROUND) == []


def test_frozen_and_merged_adapters_are_not_named(said):
    family = FAMILIES["bert"]
    apt, _ = built(family, density=1.0)
    (_, frozen), (_, half), (_, merged), *_ = [(name, adapter) for name, adapter in adapters(apt) if adapter.rank]
    for factor in (frozen.lora_A, frozen.lora_B, half.lora_A):
        factor.requires_grad_(False)
    optimizer = torch.optim.SGD(adapter_parameters(apt), lr=1e-2)
    controller = Controller(apt, optimizer, 8, growth=1.0)
    merged.merge_weights()
    apt.eval()(**batch_for(family, 0)).loss.backward()
    assert merged.lora_B.grad is None and half.lora_B.grad is not None
    controller.observe()
    assert said(ROUND) == []


def test_a_step_in_which_nothing_came_is_the_error_it_was(said):
    apt, optimizer = built(FAMILIES["bert"])
    with pytest.raises(RuntimeError, match="observe: expected gradients of adapters, got none"):
        Controller(apt, optimizer, 8).observe()
    assert said(ROUND) == []


# -- compiled ------------------------------------------------------------------------------------------------


def one_layer(name, **config):
    return built(FAMILIES[name], sizes={"num_hidden_layers": 1}, density=1.0, **config)


@pytest.mark.parametrize("how", ["wrapped", "in place", "inside"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_growth_in_a_model_that_is_known_to_be_compiled_is_said_at_once(said, name, how):
    apt, optimizer = one_layer(name)
    model = torch.compile(apt, backend="eager") if how == "wrapped" else apt
    if how != "wrapped":
        (apt if how == "in place" else apt.model).compile(backend="eager")
    Controller(model, optimizer, 8).remove()
    (line,) = said(AGAIN.format(sum(adapter.rank > 0 for _, adapter in adapters(apt))))
    assert "APTConfig(max_rank=...)" in line
    Controller(model, optimizer, 8, growth=1.0).remove()
    roomy, its = one_layer(name, max_rank=8)
    Controller(torch.compile(roomy, backend="eager"), its, 8).remove()
    assert len(said("is compiled")) == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own, after a hook
@pytest.mark.parametrize("name", ["bert", pytest.param("llama", marks=pytest.mark.slow)])
def test_growth_in_a_model_that_is_compiled_later_is_said_at_the_first_growth(said, name):
    """As Trainer(torch_compile=True) does it: behind the Controller's back."""
    apt, optimizer = one_layer(name)
    controller = Controller(apt, optimizer, 4, density=1.0, schedule={"start": 0, "end": 3, "events": 3})
    model = torch.compile(apt, backend="eager")
    assert said("is compiled") == []
    counts = []
    for step, called in enumerate((model, apt, apt)):
        train(called, optimizer, controller, FAMILIES[name], 1, first=step)
        counts.append(len(said("is compiled")))
    assert counts == [1, 1, 1] and max(adapter.rank for _, adapter in adapters(apt)) > 2
