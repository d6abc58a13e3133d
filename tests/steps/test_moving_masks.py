"""While one mask of a Controller moves, all that it prunes are noted as moving."""

import copy

import pytest
from families import FAMILIES
from training import batch_for, built

from apt_ext import Controller, adapters


def flags(model):
    return {adapter.placed.moving for _, adapter in adapters(model)}


@pytest.mark.parametrize("shrink", ["cut", "none"])
def test_masks_move_together_within_a_window(shrink):
    family = FAMILIES["llama"]
    model, optimizer = built(family)
    controller = Controller(model, optimizer, 16, schedule={"start": 2, "end": 14, "events": 3}, shrink=shrink, growth=1)
    seen = []
    for i in range(16):
        model(**batch_for(family, i)).loss.backward()
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
        ones = all(bool((mask == 1).all()) for _, adapter in adapters(model) for mask in adapter.get_masks())
        assert flags(model) == {not ones and controller.now < controller.steps.end}, i
        seen.append(flags(model))
        if i == 9:
            state = (
                {key: value.clone() for key, value in model.state_dict().items()},
                copy.deepcopy(optimizer.state_dict()),
                controller.state_dict(),
            )
    assert {True} in seen and {False} in seen
    other, others = built(family)
    other.load_state_dict(state[0])
    others.load_state_dict(state[1])
    again = Controller(other, others, 16, schedule={"start": 2, "end": 14, "events": 3}, shrink=shrink, growth=1)
    again.load_state_dict(state[2])
    assert flags(other) == seen[9]
    again.remove()
    assert flags(other) == {False}


def test_what_is_not_pruned_is_not_noted():
    model, optimizer = built(FAMILIES["llama"], prune=["neurons"])
    controller = Controller(model, optimizer, 8, schedule={"start": 1, "end": 7, "events": 1}, shrink="none")
    for i in range(4):
        model(**batch_for(FAMILIES["llama"], i)).loss.backward()
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
    found = {name.rpartition(".")[2]: adapter.placed.moving for name, adapter in adapters(model)}
    assert found["down_proj"] and found["up_proj"] and not found["q_proj"] and not found["o_proj"]
