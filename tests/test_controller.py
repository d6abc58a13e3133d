"""Controller: a training run in which blocks go and ranks grow, by the optimizer's own steps."""

import pytest
import torch
from families import EVERY, FAMILIES

import apt_ext
from apt_ext import APTConfig, Controller, Growth, Schedule, adapters, get_apt_model


def batch_for(family, seed):
    """A batch with labels, for whatever head the model has."""
    inputs = family.inputs(seed)
    if "SequenceClassification" in family.kind:
        return {**inputs, "labels": torch.tensor([0, 1, 2])}
    return {**inputs, "labels": inputs["decoder_input_ids" if family.alike else "input_ids"]}


def built(family, **config):
    torch.manual_seed(0)
    apt = get_apt_model(family.model(), APTConfig(**{"r": 2, "density": 0.65, "round_to": 4, **config})).train()
    return apt, torch.optim.AdamW(apt_ext.adapter_parameters(apt), lr=1e-3)


def train(apt, optimizer, controller, family, steps, first=0):
    for seed in range(first, first + steps):
        apt(**batch_for(family, seed)).loss.backward()
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()


@EVERY
@pytest.mark.parametrize("kinds", [["heads", "neurons"], ["heads", "neurons", "hidden"]], ids=["layers", "hidden"])
def test_a_run_ends_at_its_density_with_masks_of_zeros_and_ones(family, kinds):
    apt, optimizer = built(family, prune=kinds)
    lines = []
    controller = Controller(apt, optimizer, 16, schedule={"start": 2, "end": 14, "events": 3}, log=lines.append, growth=Growth(2.0))
    train(apt, optimizer, controller, family, 16)
    assert controller.done and 0.3 < controller.density <= 0.65
    for name in apt.blocks:
        mask = apt.get_block_mask(name)
        assert bool((mask * (1 - mask) == 0).all()) and bool(mask.any())
    assert len(lines) == 3 and "density" in lines[-1]
    assert controller.adapter_parameters > 1.5 * 2 * sum(a.in_features + a.out_features for _, a in adapters(apt) if a.rank)
    apt_ext.shrink(apt)


def test_it_warns_when_it_is_forgotten():
    apt, optimizer = built(FAMILIES["bert"])
    controller = Controller(apt, optimizer, 100)
    with pytest.warns(UserWarning, match=r"20 optimizer steps without Controller.step\(\)"):
        for _ in range(20):
            optimizer.step()
    controller.remove()


def test_a_forgotten_observe_is_an_error():
    apt, optimizer = built(FAMILIES["bert"])
    controller = Controller(apt, optimizer, 100, schedule=Schedule(start=2, end=90))
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"expected observe\(\) before"):
        controller.step()
