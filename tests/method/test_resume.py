"""A run that stopped at any step goes on from its states, bitwise as if it had never stopped."""

import io

import pytest
import torch
from families import FAMILIES
from low_rank_pair import bits
from training import SHORT, all_of, assert_equal, batch_for, built, train

import apt_ext
from apt_ext import APTModel, Controller, Growth, adapters

OPTIONS = {
    "llama": {"growth": Growth(3.0)},
    "bert": {"joint": False},
    "t5": {"kurtosis": 1.0, "schedule": {"start": 1, "end": 14, "events": 2, "window": 4, "per_step": True}},
}
CONFIG = {"llama": {"max_rank": 5}, "bert": {"prune": ["heads", "neurons", "hidden"]}, "t5": {"uniform": False}}


def fresh(name, seed):
    """A model that was never trained, with other random factors, an optimizer, and its controller."""
    apt, optimizer = built(FAMILIES[name], **CONFIG[name])
    torch.manual_seed(seed)
    with torch.no_grad():
        for _, adapter in adapters(apt):
            adapter.Wa.normal_()
    return apt, optimizer, Controller(apt, optimizer, 16, **{**SHORT, **OPTIONS[name], "seed": 0})


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


# The first event is at 6, the last at 14; every day's run stops before, at and after them, and goes on from 5 to the end.
@pytest.mark.parametrize(
    ("name", "every"), [case for name in OPTIONS for case in ((name, False), pytest.param(name, True, marks=pytest.mark.slow))]
)
def test_stopping_at_any_step_changes_nothing(name, every):
    family = FAMILIES[name]
    whole = fresh(name, 1)
    start = through_a_file(whole[0].state_dict())
    saved, reached = {}, {}
    for step in range(16):
        saved[step] = through_a_file([part.state_dict() for part in whole])
        train(*whole, family, 1, first=step)
        reached[step + 1] = {key: value.clone() for key, value in all_of(*whole).items()}, [a.compacted for _, a in adapters(whole[0])]
    for stop in range(16) if every else (0, 2, 5, 6, 10, 13, 14):
        apt, optimizer, controller = fresh(name, 2 + stop)
        for part, state in zip((apt, optimizer, controller), saved[stop], strict=True):
            part.load_state_dict(state)
        assert bits(controller.state_dict()) == bits(saved[stop][2])
        # From step to step, which is from any step to the end; before, between and after the first events all the way.
        for step in range(stop, 16 if stop == 5 or every and stop in (0, 9) else stop + 1):
            train(apt, optimizer, controller, family, 1, first=step)
            expected, compacted = reached[step + 1]
            assert_equal(all_of(apt, optimizer, controller), expected)
            assert [a.compacted for _, a in adapters(apt)] == compacted
    assert any(not torch.equal(start[key], value) for key, value in whole[0].state_dict().items())
    between = [bool((live & (state["masks"][block] == 0)).any()) for _, _, state in saved.values() for block, live in state["live"].items()]
    assert any(between) == (name == "t5")  # masks at every step: at 0, and not out before the event


def test_from_a_checkpoint_directory(tmp_path):
    """save_pretrained holds the model's part."""
    name, family = "bert", FAMILIES["bert"]
    apt, optimizer, controller = fresh(name, 1)
    train(apt, optimizer, controller, family, 9)
    apt.save_pretrained(tmp_path)
    states = through_a_file([optimizer.state_dict(), controller.state_dict()])
    again = APTModel.from_pretrained(family.model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), tmp_path).train()
    other = torch.optim.AdamW(apt_ext.adapter_parameters(again), lr=1e-3)
    second = Controller(again, other, 16, **SHORT, **OPTIONS[name])
    other.load_state_dict(states[0])
    second.load_state_dict(states[1])
    train(apt, optimizer, controller, family, 7, first=9)
    train(again, other, second, family, 7, first=9)
    assert_equal(all_of(again, other, second), all_of(apt, optimizer, controller))


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    family = FAMILIES["bert"]
    apt, optimizer, controller = fresh("bert", 1)
    train(apt, optimizer, controller, family, 9)
    state = through_a_file(controller.state_dict())
    new, its, second = fresh("bert", 2)
    with pytest.raises(ValueError, match="state: expected the ranks of the model, .*load the model's state first"):
        second.load_state_dict(state)
    new.load_state_dict(apt.state_dict())
    mask = new.get_block_mask("0.neurons")
    new.set_block_mask("0.neurons", torch.ones(20))
    with pytest.raises(ValueError, match="state: expected the masks of the model, got others; load the model's state first"):
        second.load_state_dict(state)
    new.set_block_mask("0.neurons", mask)
    other, others = built(family, **CONFIG["bert"])
    shorter = Controller(other, others, 16, schedule={"start": 2, "end": 12, "events": 3}, **OPTIONS["bert"], shrink="compact")
    other.load_state_dict(apt.state_dict())
    with pytest.raises(ValueError, match="state: expected the schedule .*'end': 12"):
        shorter.load_state_dict(state)
    before = second.state_dict()
    damaged = {**state, "scores": {**state["scores"], "salience": {"scores": {"0.heads": torch.ones(9)}, "means": {}}}}
    with pytest.raises(ValueError, match="state: expected 3 scores for '0.heads', got 9"):
        second.load_state_dict(damaged)
    with pytest.raises(ValueError, match="state: expected adapters of these ranks"):
        second.load_state_dict({**state, "importance": {}})
    assert str(second.state_dict()) == str(before)
    second.load_state_dict(state)
    assert second.now == 9


def test_a_finished_run_listens_no_more():
    family = FAMILIES["bert"]
    apt, optimizer, controller = fresh("bert", 1)
    train(apt, optimizer, controller, family, 16)
    new, its, second = fresh("bert", 2)
    new.load_state_dict(apt.state_dict())
    second.load_state_dict(controller.state_dict())
    assert second.done and not any(module._forward_pre_hooks for module in new.modules())
    new(**batch_for(family, 0)).loss.backward()
    its.step()
    second.step()
