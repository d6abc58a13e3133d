"""What a Controller says of the density and counts as kept: every entry of the model's own masks that is above 0."""

import copy
import json

import pytest
import torch
from families import FAMILIES, keep_first
from training import SHORT, batch_for, begun, built, train

from apt_ext import Controller, Schedule, adapters

BERT = FAMILIES["bert"]


def share(apt, controller):
    """Computed from the masks that the model has."""
    kept = {name: int((apt.get_block_mask(name) != 0).sum()) for name in apt.blocks}
    return controller.cost.total(kept) / controller.cost.total({name: block.count for name, block in apt.blocks.items()})


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_density_is_of_the_masks_that_the_model_has(name):
    family = FAMILIES[name]
    apt, optimizer = built(family, prune=["neurons"], density=0.9)
    controller = Controller(apt, optimizer, 16, **SHORT)
    early = copy.deepcopy(apt.state_dict())
    keep_first(apt, heads=1)  # what it does not prune, others may
    assert controller.density == share(apt, controller) < 1
    assert torch.equal(controller.state_dict()["masks"]["hidden"], torch.ones(24))
    apt.load_state_dict(early)
    assert controller.density == 1
    keep_first(apt, neurons=8)
    assert controller.density == share(apt, controller) < 1
    before = controller.density
    apt.cut(optimizer)
    assert controller.density == before


def test_what_others_mask_counts_towards_the_target():
    """Nothing else has to go where their heads are enough; and a state of that moment loads."""
    config = {"prune": ["neurons"], "density": 0.78, "max_rank": 4}
    apt, controller, optimizer = begun(steps=1, **config)
    keep_first(apt, heads=2)
    train(apt, optimizer, controller, BERT, 6, first=1)
    state = copy.deepcopy(controller.state_dict())
    assert [int(state["masks"][name].sum()) for name in ("0.heads", "1.heads")] == [2, 2] and not state["live"]["0.heads"][2]
    again, other = built(BERT, **config)
    second = Controller(again, other, 16, **SHORT)
    again.load_state_dict(apt.state_dict())
    second.load_state_dict(state)
    train(again, other, second, BERT, 9, first=7)
    assert second.density == controller.density == share(again, second) <= 0.78
    assert int(again.get_block_mask("0.neurons").sum()) == 20


def test_a_merge_leaves_the_density_that_is_in_the_weights():
    apt, controller, _ = begun(steps=16)
    before = controller.density
    apt.merge_and_unload()
    assert controller.density == before < 1


# -- fractions are kept -------------------------------------------------------------------------------------------------------------------


def test_a_small_fraction_counts_as_kept():
    """In a window in which masks have fallen below a half."""
    apt, optimizer = built(BERT, uniform=False)
    controller = Controller(apt, optimizer, 40, schedule=Schedule(start=0, end=10, events=1), shrink="none")
    train(apt, optimizer, controller, BERT, 8)
    fractions = torch.cat([apt.get_block_mask(name) for name in apt.blocks])
    assert bool(((fractions > 0) & (fractions < 0.5)).any()) and bool((fractions > 0).all())
    assert controller.density == 1
    train(apt, optimizer, controller, BERT, 2, first=8)
    assert controller.density == share(apt, controller) <= 0.65


def steered(controller, apt, monkeypatch, kept):
    """Scores by which the neurons that are `kept` stay."""
    monkeypatch.setattr(controller.scores, "scores", lambda: {name: torch.where(kept, 2.0, 1.0) for name in controller.blocks})


def test_what_is_above_0_at_an_event_may_rise_again(monkeypatch):
    """Masks that move at every step are fractions at an event before the last."""
    apt, optimizer = built(BERT, prune=["neurons"], uniform=False, density=0.8)
    schedule = Schedule(start=0, end=16, events=2, window=8, per_step=True)
    controller = Controller(apt, optimizer, 40, schedule=schedule, shrink="none")
    first = torch.arange(20) < 10
    steered(controller, apt, monkeypatch, first)
    train(apt, optimizer, controller, BERT, 8)
    low = apt.get_block_mask("0.neurons")
    low = (low > 0) & (low <= 0.5)
    assert bool(low.any()) and torch.equal(controller.state_dict()["live"]["0.neurons"], apt.get_block_mask("0.neurons") != 0)
    steered(controller, apt, monkeypatch, ~first)  # from here on the others count more
    train(apt, optimizer, controller, BERT, 8, first=8)
    assert bool((apt.get_block_mask("0.neurons")[low] == 1).any())


def test_a_new_controller_keeps_what_is_a_fraction():
    apt, optimizer = built(BERT, prune=["neurons"], density=0.95)
    mask = torch.cat([torch.full((16,), 0.25), torch.zeros(4)])
    for name in ("0.neurons", "1.neurons"):
        apt.set_block_mask(name, mask)
    controller = Controller(apt, optimizer, 16, **SHORT)
    assert controller.density == share(apt, controller) < 0.95
    apt(**batch_for(BERT, 0)).loss.backward()
    controller.observe()
    optimizer.step()
    controller.step()
    train(apt, optimizer, controller, BERT, 13, first=1)
    assert [int(apt.get_block_mask(name).sum()) for name in ("0.neurons", "1.neurons")] == [16, 16]


# -- history ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_history_is_what_each_event_left(name):
    family, lines, seen = FAMILIES[name], [], []
    apt, optimizer = built(family, max_rank=8)
    controller = Controller(apt, optimizer, 16, log=lines.append, **SHORT)
    for step in range(16):
        train(apt, optimizer, controller, family, 1, first=step)
        if step + 1 in (6, 10, 14):
            seen.append(
                {
                    "step": step + 1,
                    "density": share(apt, controller),
                    "kept": {block: int((apt.get_block_mask(block) != 0).sum()) for block in apt.blocks},
                    "ranks": {name: adapter.rank for name, adapter in adapters(apt) if adapter.rank},
                    "adapter_parameters": sum(adapter.get_parameter_count() for _, adapter in adapters(apt)),
                }
            )
    assert [{key: value for key, value in one.items() if key != "threshold"} for one in controller.history] == seen
    assert json.loads(json.dumps(controller.history)) == controller.history and len(lines) == 3
    for one, words in zip(controller.history, lines, strict=True):
        assert one["threshold"] > 0 and words.endswith(f"last score {one['threshold']:.3g}")


def test_history_goes_on_from_a_state():
    apt, controller, optimizer = begun(steps=7, max_rank=8)
    state = copy.deepcopy(controller.state_dict())
    again, other = built(BERT, max_rank=8)
    second = Controller(again, other, 16, **SHORT)
    again.load_state_dict(apt.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    second.load_state_dict(state)
    for model, its, one in ((apt, optimizer, controller), (again, other, second)):
        train(model, its, one, BERT, 9, first=7)
    assert controller.history == second.history and [one["step"] for one in second.history] == [6, 10, 14]
    assert [one["step"] for one in state["history"]] == [6]  # a copy


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"step": 8}, ValueError, r"state\['history'\]\[0\]\['step'\]: expected events in their order, up to step 7, got 8"),
        ({"step": 0}, ValueError, "must be at least 1, got 0"),
        ({"density": "all"}, TypeError, r"\['density'\] must be a number, got str"),
        ({"threshold": float("nan")}, ValueError, r"\['threshold'\] must be a finite number, got nan"),
        ({"kept": [1]}, TypeError, r"\['kept'\]: expected a dict, got list"),
        ({"ranks": {"query": 1.5}}, TypeError, r"\['ranks'\]\['query'\] must be an int, got float"),
        ({"more": 1}, ValueError, "1 unknown, 'more' first"),
    ],
)
def test_a_damaged_history_is_refused(change, kind, words):
    _, controller, _ = begun(steps=7)
    state = copy.deepcopy(controller.state_dict())
    with pytest.raises(kind, match=words):
        controller.load_state_dict({**state, "history": [{**state["history"][0], **change}]})
    assert str(controller.state_dict()) == str(state)
