"""A short training run of a tiny model under a Controller."""

import torch
from families import FAMILIES

import apt_ext
from apt_ext import APTConfig, Controller, get_apt_model

SHORT = {"schedule": {"start": 2, "end": 14, "events": 3}}


def batch_for(family, seed):
    """A batch with labels, for whatever head the model has."""
    inputs = family.inputs(seed)
    if "SequenceClassification" in family.kind:
        return {**inputs, "labels": torch.tensor([0, 1, 2])}
    return {**inputs, "labels": inputs["decoder_input_ids" if family.alike else "input_ids"]}


def built(family, seed=0, sizes=None, **config):
    """A model (of these sizes) to be pruned to 65 %, without dropout, and its optimizer."""
    torch.manual_seed(seed)
    dropouts = {"BertConfig": ("hidden_dropout_prob", "attention_probs_dropout_prob"), "T5Config": ("dropout_rate",)}
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
