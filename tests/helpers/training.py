"""A short training run of a tiny model under a Controller."""

import functools

import torch
from families import FAMILIES

import apt_ext
from apt_ext import APTConfig, Controller, adapters, get_apt_model

SCHEDULE = {"schedule": {"start": 2, "end": 14, "events": 3}}
SHORT = {**SCHEDULE, "shrink": "compact"}  # the model keeps its sizes, so that masks can be looked at


def batch_for(family, seed):
    """A batch with labels, for whatever head the model has."""
    inputs = family.inputs(seed)
    if "SequenceClassification" in family.kind:
        return {**inputs, "labels": torch.tensor([0, 1, 2])}
    return {**inputs, "labels": inputs["decoder_input_ids" if family.alike else "input_ids"]}


def built(family, seed=0, sizes=None, **config):
    """A model (of these sizes) to be pruned to 65 %, without dropout, and its optimizer."""
    torch.manual_seed(seed)
    dropouts = {
        "BertConfig": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
        "GPT2Config": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        "T5Config": ("dropout_rate",),
    }
    none = dict.fromkeys(dropouts.get(family.config, ()), 0.0)
    model = family.model(seed=seed, **none, **(sizes or {}))
    apt = get_apt_model(model, APTConfig(**{"r": 2, "prune": ["heads", "neurons"], "density": 0.65, "round_to": 4, **config})).train()
    return apt, torch.optim.AdamW(apt_ext.adapter_parameters(apt), lr=1e-3)


def train(apt, optimizer, controller, family, steps, first=0):
    for seed in range(first, first + steps):
        apt(**batch_for(family, seed)).loss.backward()
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()


def trained(name, log=None, **config):
    """(model, controller, optimizer) after a whole run."""
    apt, optimizer = built(FAMILIES[name], **config)
    controller = Controller(apt, optimizer, 16, log=log, **SHORT)
    train(apt, optimizer, controller, FAMILIES[name], 16)
    return apt, controller, optimizer


@functools.cache
def finished(name, **config):
    """What `trained` returns, once for all tests that only look at it."""
    return trained(name, **config)


def state_of(apt):
    """All that training changes."""
    state = {name: value.clone() for name, value in apt.state_dict().items()}
    return {**state, **{f"{name}.rank": torch.tensor(adapter.rank) for name, adapter in adapters(apt)}}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []


def all_of(apt, optimizer, controller):
    """Parameters, masks, ranks, optimizer state, averages, generator."""
    flat = {**state_of(apt), "generator": controller.generator.get_state()}
    for i, state in enumerate(optimizer.state.values()):
        flat |= {f"optimizer.{i}.{key}": value for key, value in state.items()}
    for name, average in controller.importance.averages.items():
        flat[f"importance.{name}"] = average
    for name, score in controller.scores.salience.scores.items():
        flat[f"score.{name}"] = score
    return flat


def begun(name="bert", steps=7, **config):
    """(model, Controller, optimizer) after some steps of 16, the last event being at 14."""
    family = FAMILIES[name]
    apt, optimizer = built(family, **config)
    controller = Controller(apt, optimizer, 16, **SHORT)
    train(apt, optimizer, controller, family, steps)
    return apt, controller, optimizer


def hooks(apt, optimizer):
    return [len(module._forward_pre_hooks) for module in apt.modules()], len(optimizer._optimizer_step_post_hooks)
