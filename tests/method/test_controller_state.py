"""A Controller's state that is damaged or not its own: an error in words, before anything changes."""

import copy

import pytest
import torch
from families import FAMILIES, keep_first
from training import SHORT, all_of, assert_equal, built, train, trained

from apt_ext import Controller, adapters

BERT, NAN = FAMILIES["bert"], float("nan")

QUERY = "bert.encoder.layer.0.attention.self.query"


def halfway():
    apt, optimizer = built(BERT, prune=["heads", "neurons", "hidden"])
    controller = Controller(apt, optimizer, 16, kurtosis=1.0, **SHORT)
    train(apt, optimizer, controller, BERT, 7)
    return apt, optimizer, controller


def paths(value, at=()):
    yield at
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths(inner, (*at, key))


def changed(state, path, change):
    """A copy in which `change` has made another value of the one at `path`; a change to nothing takes it away."""
    if not path:
        return change(state)
    inner, copied = changed(state[path[0]], path[1:], change), dict(state)
    del copied[path[0]]
    return copied if inner is nothing else {**copied, path[0]: inner}


def nothing(_):
    return nothing


def test_every_entry_of_a_state_is_looked_at_before_anything_changes():
    """Each in turn is taken away, None, a list, text, a tensor of another size; and one more key is put beside it."""
    apt, optimizer, controller = halfway()
    state, before = copy.deepcopy(controller.state_dict()), all_of(apt, optimizer, controller)
    everywhere = list(paths(state))
    assert len(everywhere) > 60
    changes = [lambda _: None, lambda _: [1], lambda _: "x", lambda _: torch.ones(7, 3), lambda old: {**old, "more": 1}, nothing]
    for path in everywhere:
        found = controller.state_dict()
        for part in path:
            found = found[part]
        for change in changes:
            optional = path[:1] == ("scores",) and len(path) > 2  # a site that no gradient has reached has no score
            if (change is nothing and (not path or optional)) or (change is changes[4] and not isinstance(found, dict)):
                continue
            with pytest.raises((TypeError, ValueError), match="state"):
                controller.load_state_dict(changed(state, path, change))
            assert str(controller.state_dict()) == str(state), path
    assert_equal(all_of(apt, optimizer, controller), before)
    controller.load_state_dict(state)
    train(apt, optimizer, controller, BERT, 9, first=7)
    whole, its, other = halfway()
    train(whole, its, other, BERT, 9, first=7)
    assert_equal(all_of(apt, optimizer, controller), all_of(whole, its, other))


@pytest.mark.parametrize(
    ("path", "value", "kind", "words"),
    [
        ((), [1], TypeError, "state: expected a dict, got list"),
        ((), None, TypeError, "state: expected a dict, got NoneType"),
        ((), {}, ValueError, "state: expected the keys of a state_dict.* got 11 missing, 'step' first"),
        (("step",), -1, ValueError, r"state\['step'\] must be at least 0, got -1"),
        (("step",), 17, ValueError, r"state\['step'\]: expected at most total_steps = 16, got 17"),
        (("step",), 3.0, TypeError, r"state\['step'\] must be an int, got float"),
        (("live",), {}, ValueError, r"state\['live'\]: expected the keys .* got 5 missing, '0.heads' first"),
        (
            ("live", "0.heads"),
            torch.zeros(3, dtype=torch.bool),
            ValueError,
            r"state\['live'\]: expected all that a mask keeps, got False .*'0.h",
        ),
        (("generator",), torch.zeros(3), TypeError, r"state\['generator'\]: expected a tensor of torch.uint8, got torch.float32"),
        (("generator",), torch.zeros(3, dtype=torch.uint8), ValueError, r"state\['generator'\]: expected shape"),
        (
            ("generator",),
            torch.full((5056,), 255, dtype=torch.uint8),
            ValueError,
            r"state\['generator'\]: expected the state of a generator",
        ),
        (("initial", "density"), NAN, ValueError, r"state\['initial'\]\['density'\] must be a finite number, got nan"),
        (("initial", "density"), 2.0, ValueError, r"state\['initial'\]\['density'\] must lie in \[0, 1\], got 2.0"),
        (
            ("initial", "ranks", QUERY),
            2**70,
            ValueError,
            r"\['ranks'\]\['.*query'\] must be at most the rank \d of now, got 1180591620717411303424",
        ),
        (
            ("initial", "parameters"),
            2**70,
            ValueError,
            r"state\['initial'\]\['parameters'\]: expected \d+ of these initial ranks, got 11805",
        ),
        (("scores", "salience", "scores"), {}, ValueError, r"state\['scores'\]: expected the salience of blocks after 7 steps, got none"),
        (("initial", "ranks"), {}, ValueError, r"state\['initial'\]\['ranks'\]: expected the keys"),
        (("ranks",), {}, ValueError, "state: expected the ranks of the model"),
        (("scores",), {}, ValueError, "state: expected the keys .* got 2 missing, 'salience' first"),
        (
            ("scores", "salience", "means", "0.heads"),
            torch.ones(7),
            ValueError,
            "state: expected a multiple of 3 means for '0.heads', got 7",
        ),
        (("scores", "outliers"), {"0.heads": torch.ones(4)}, ValueError, r"state: expected 3 outliers for '0.heads', got shape \[4\]"),
    ],
)
def test_what_is_wrong_with_a_state_is_said(path, value, kind, words):
    apt, optimizer, controller = halfway()
    state, before = copy.deepcopy(controller.state_dict()), all_of(apt, optimizer, controller)
    assert torch.Generator().get_state().shape == (5056,)
    with pytest.raises(kind, match=words):
        controller.load_state_dict(changed(state, path, lambda _: value))
    assert str(controller.state_dict()) == str(state)
    assert_equal(all_of(apt, optimizer, controller), before)


@pytest.mark.parametrize(("steps", "words"), [(2, "with 0 masks between and a density of 1.0000"), (5, r"with \d+ masks between")])
def test_a_state_cannot_say_that_a_run_is_done_which_is_not(steps, words):
    apt, optimizer = built(BERT)
    controller = Controller(apt, optimizer, 16, **SHORT)
    train(apt, optimizer, controller, BERT, steps)
    state = copy.deepcopy(controller.state_dict())
    with pytest.raises(ValueError, match=rf"state\['step'\]: expected less than 14, .* its target 0.65, got 14 {words}"):
        controller.load_state_dict({**state, "step": 14})
    assert str(controller.state_dict()) == str(state) and controller.listening


def test_a_state_cannot_say_that_a_run_is_done_whose_masks_still_move():
    """Fewer blocks than the target, and one of them on its way."""
    apt, optimizer = built(BERT)
    keep_first(apt, heads=1, neurons=4)
    apt.set_block_mask("0.neurons", torch.cat([torch.full((4,), 0.5), torch.zeros(16)]))
    controller = Controller(apt, optimizer, 16, **SHORT)
    assert controller.density < 0.65
    with pytest.raises(ValueError, match=r"state\['step'\]: expected less than 14, .* got 14 with 4 masks between and a density of 0\."):
        controller.load_state_dict({**controller.state_dict(), "step": 14})
    assert controller.listening


@pytest.mark.parametrize("part", ["scores", "importance"])
def test_a_damaged_state_compacts_nothing(part):
    """Which is the one change that may be refused, and so comes first."""
    apt, optimizer, controller = halfway()
    state = controller.state_dict()
    assert any(adapter.compacted for _, adapter in adapters(apt))
    new, its = built(BERT, prune=["heads", "neurons", "hidden"])
    second = Controller(new, its, 16, kurtosis=1.0, **SHORT)
    new.load_state_dict(apt.state_dict())
    inner = state[part] if part == "importance" else state[part]["salience"]["scores"]
    name = next(iter(inner))
    wrong = {**inner, name: torch.ones(99)}
    with pytest.raises(ValueError, match="99"):
        second.load_state_dict(
            {**state, part: wrong if part == "importance" else {**state[part], "salience": {"scores": wrong, "means": {}}}}
        )
    assert second.now == 0 and not any(adapter.compacted for _, adapter in adapters(new))
    second.load_state_dict(state)
    assert second.now == 7 and any(adapter.compacted for _, adapter in adapters(new))


def test_averages_alone_refuse_what_is_not_theirs():
    apt, optimizer, controller = halfway()
    state = copy.deepcopy(controller.state_dict())
    for call, given in (
        (controller.scores.salience.load_state_dict, {"scores": {}}),
        (controller.scores.load_state_dict, {"salience": state["scores"]["salience"]}),
        (controller.importance.load_state_dict, {}),
    ):
        with pytest.raises(ValueError, match="state: expected"):
            call(given)
    assert str(controller.state_dict()) == str(state)


def test_a_run_that_went_on_after_its_last_event_goes_on_again():
    """Steps beyond total_steps are not counted, so that a state never has more."""
    apt, controller, optimizer = trained("bert")
    train(apt, optimizer, controller, BERT, 3)
    assert controller.now == 16
    new, its = built(BERT)
    second = Controller(new, its, 16, **SHORT)
    new.load_state_dict(apt.state_dict())
    second.load_state_dict(controller.state_dict())
    assert second.now == 16 and second.done and not second.listening


def test_a_finished_controller_does_not_go_back():
    """Its hooks are gone, so it would hear nothing."""
    apt, optimizer = built(BERT)
    controller = Controller(apt, optimizer, 16, **SHORT)
    model, early = copy.deepcopy(apt.state_dict()), copy.deepcopy(controller.state_dict())
    train(apt, optimizer, controller, BERT, 2)
    controller.remove()
    apt.load_state_dict(model)
    before = copy.deepcopy(controller.state_dict())
    with pytest.raises(RuntimeError, match="load_state_dict: this Controller listens no more; make another to go on from step 0"):
        controller.load_state_dict(early)
    assert str(controller.state_dict()) == str(before)
