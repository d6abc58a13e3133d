"""What one_shot, a Distiller, schedules and averages do not take: each an error in words, after which all is bitwise as before."""

import copy

import pytest
import torch
from families import FAMILIES
from training import SHORT, assert_equal, batch_for, built, hooks, state_of, train

from apt_ext import Controller, adapters
from apt_ext.method import (
    AdapterImportance,
    Distiller,
    Group,
    Latency,
    Products,
    Salience,
    block_scores,
    cubic_density,
    distill_weight,
    linear_budget,
    measure_latency,
    one_shot,
    search,
    step_mask,
    within_density,
)

BERT = FAMILIES["bert"]
NAN, INF = float("nan"), float("inf")

# -- one_shot -----------------------------------------------------------------------------------------------------------------------------

GOOD = [batch_for(BERT, 0)]


class NoLength:
    """An iterable that is no list."""

    def __iter__(self):
        return iter(GOOD)


@pytest.mark.parametrize(
    ("batches", "keep", "options", "kind", "words"),
    [
        (GOOD, 0, {}, ValueError, r"keep: expected a density of at least 0\.\d+, which is what always stays, got 0$"),
        (GOOD, {}, {}, ValueError, "keep: expected numbers for some of heads, neurons, hidden, got none"),
        (GOOD, 0.7, {"kurtosis": NAN}, ValueError, "kurtosis must be a finite number, got nan"),
        (GOOD, 0.7, {"kurtosis": INF}, ValueError, "kurtosis must be a finite number, got inf"),
        (GOOD, 0.7, {"kurtosis": -1}, ValueError, "kurtosis must be at least 0, got -1"),
        (GOOD, 0.7, {"kurtosis": "x"}, TypeError, "kurtosis must be a number, got str"),
        ([*GOOD, 3], 0.7, {}, TypeError, r"batches\[1\]: expected a dict, got int"),
        ("ab", 0.7, {}, TypeError, r"batches\[0\]: expected a dict, got str"),
        (GOOD[0], 0.7, {}, TypeError, "batches: expected an iterable of dicts of the model's arguments, got dict"),
        (3, 0.7, {}, TypeError, "batches: expected an iterable of dicts of the model's arguments, got int"),
    ],
)
def test_arguments_of_one_shot(batches, keep, options, kind, words):
    apt, optimizer = built(BERT)
    before, listening = state_of(apt), hooks(apt, optimizer)
    with pytest.raises(kind, match=words):
        one_shot(apt, batches, keep, **options)
    assert_equal(state_of(apt), before)
    assert hooks(apt, optimizer) == listening and apt.training and all(p.grad is None for p in apt.parameters())


def test_any_iterable_of_batches_will_do():
    (first, _), (second, _) = built(BERT), built(BERT)
    assert_equal(one_shot(first, NoLength(), 0.7), one_shot(second, iter(GOOD), 0.7))


def test_one_shot_masks_nothing_by_a_loss_or_salience_that_is_not_finite():
    apt, _ = built(BERT)
    with torch.no_grad():
        apt.model.classifier.bias.fill_(NAN)
    before = {name: apt.get_block_mask(name) for name in apt.blocks}
    for call in (lambda: one_shot(apt, GOOD, 0.7), lambda: block_scores(apt, ["heads"], GOOD)):
        with pytest.raises(ValueError, match=r"batches\[0\]: expected a finite loss, got nan"):
            call()
    apt, _ = built(BERT)
    apt.get_submodule(apt.blocks["1.heads"].reader).register_full_backward_hook(lambda module, grads, _: tuple(g * INF for g in grads))
    with pytest.raises(RuntimeError, match=r"batches: expected finite salience, got (nan|inf) for block '\d.heads'"):
        one_shot(apt, GOOD, 0.7)
    assert_equal({name: apt.get_block_mask(name) for name in apt.blocks}, before)


def test_one_shot_without_gradients_is_refused():
    apt, _ = built(BERT)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"got a call within torch.inference_mode\(\), which has none"):
        one_shot(apt, GOOD, 0.7)
    with pytest.raises(ValueError, match=r"kinds: expected kinds of blocks that the model has, got \['lanes'\]"):
        block_scores(apt, ["lanes"], GOOD)
    dead, _ = built(BERT)
    with torch.no_grad():
        dead.model.classifier.weight.zero_()  # nothing comes back from it
    with pytest.raises(RuntimeError, match="batches: expected salience above 0 for some block, got 0 for all"):
        one_shot(dead, GOOD, 0.7)
    with torch.no_grad():  # which it turns on again
        assert one_shot(apt, GOOD, 0.7)


def test_one_shot_sets_all_masks_or_none():
    apt, _ = built(BERT)
    adapter = next(adapter for name, adapter in adapters(apt) if name.endswith("1.output.dense"))
    before = {name: apt.get_block_mask(name) for name in apt.blocks}

    def scored_and_then_merged():
        yield from GOOD
        adapter.merge_weights()

    with pytest.raises(RuntimeError, match="1.output.dense of block '1.neurons' is merged"):
        one_shot(apt, scored_and_then_merged(), 0.5)
    assert_equal({name: apt.get_block_mask(name) for name in apt.blocks}, before)


@pytest.mark.parametrize("all_of_them", [True, False])
def test_a_merged_model_is_not_scored(all_of_them):
    """No gradient would come to what lies before the merged adapters, silently."""
    apt, _ = built(BERT)
    found = list(adapters(apt))
    for _, adapter in found if all_of_them else found[:1]:
        adapter.merge_weights()
    for call in (lambda: one_shot(apt, GOOD, 0.7), lambda: block_scores(apt, ["heads"], GOOD)):
        with pytest.raises(
            RuntimeError, match=rf"expected adapters that gradients go through, got {found[0][0]} merged; .*unmerge_weights\(\)"
        ):
            call()
    for _, adapter in found:
        adapter.unmerge_weights()
    assert block_scores(apt, ["heads"], GOOD)


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_has_its_own_mode_again(fails):
    apt, _ = built(BERT)
    apt.model.bert.eval()
    apt.model.bert.pooler.train()
    modes = [module.training for module in apt.modules()]
    assert len(set(modes)) == 2
    if fails:
        with pytest.raises(TypeError, match=r"batches\[1\]"):
            block_scores(apt, ["heads"], [*GOOD, 3])
    else:
        block_scores(apt, ["heads"], GOOD)
    assert [module.training for module in apt.modules()] == modes


def test_while_a_controller_is_at_work_nobody_else_scores_or_masks():
    apt, optimizer = built(BERT)
    controller = Controller(apt, optimizer, 16, **SHORT)
    train(apt, optimizer, controller, BERT, 2)
    before, state = copy.deepcopy(state_of(apt)), copy.deepcopy(controller.state_dict())
    for call in (lambda: one_shot(apt, GOOD, 0.7), lambda: block_scores(apt, ["heads"], GOOD)):
        with pytest.raises(
            RuntimeError, match=r"model: expected no Controller at work on it, got one at step 2 of 14; call its remove\(\) first"
        ):
            call()
    assert_equal(state_of(apt), before)
    assert str(controller.state_dict()) == str(state) and not controller.scores.salience.heard
    train(apt, optimizer, controller, BERT, 12, first=2)
    assert controller.done and block_scores(apt, ["heads"], GOOD)  # it listens no more


def test_masks_that_others_set_are_noticed_before_the_controller_moves_them():
    apt, optimizer = built(BERT)
    controller = Controller(apt, optimizer, 16, **SHORT)
    train(apt, optimizer, controller, BERT, 2)
    mask = apt.get_block_mask("1.neurons")
    apt.set_block_mask("1.neurons", mask * 0.5)
    with pytest.raises(RuntimeError, match=r"step: expected block '1.neurons' under the mask that this Controller gave it, got another"):
        train(apt, optimizer, controller, BERT, 1, first=2)
    assert torch.equal(apt.get_block_mask("1.neurons"), mask * 0.5) and bool(apt.get_block_mask("0.neurons").all())
    optimizer.zero_grad()
    apt.set_block_mask("1.neurons", mask)
    train(apt, optimizer, controller, BERT, 2, first=3)
    assert apt.get_block_mask("1.neurons").min() < 1


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"density": NAN}, ValueError, "density must be a finite number, got nan"),
        ({"density": 1.5}, ValueError, r"density: expected a density in \[0, 1\], got 1.5"),
        ({"joint": 1}, TypeError, "joint must be a bool, got int"),
        ({"floor": -1}, ValueError, "floor must be at least 0, got -1"),
        ({"model": 3}, TypeError, "model: expected an APTModel, got int"),
        ({"scores": 3}, TypeError, "scores: expected a dict, got int"),
        ({"scores": {}}, ValueError, "scores: expected those of some blocks of this model, got none"),
        ({"scores": {"9.heads": torch.ones(3)}}, ValueError, "name: expected a block of this model, got '9.heads'"),
        ({"scores": {"0.heads": [1, 1, 1]}}, TypeError, r"scores\['0.heads'\]: expected a floating tensor, got list"),
        ({"scores": {"0.heads": torch.ones(4)}}, ValueError, r"scores\['0.heads'\]: expected 3 finite numbers, got tensor"),
        ({"scores": {"0.heads": torch.tensor([1, NAN, 1])}}, ValueError, r"scores\['0.heads'\]: expected 3 finite numbers, got .*nan"),
    ],
)
def test_arguments_of_within_density(changes, kind, words):
    apt, _ = built(BERT)
    with pytest.raises(kind, match=words):
        within_density(**{"model": apt, "scores": {"0.heads": torch.ones(3)}, "density": 0.9, **changes})


TWO = torch.ones(2)
SEARCH = {
    "scores": {"a": TWO, "b": TWO},
    "live": {"a": TWO.bool(), "b": TWO.bool()},
    "groups": [Group(("a",), "x"), Group(("b",), "x")],
    "cost": Products({("a",): 1.0, ("b", "c"): 1.0}),
    "counts": {"a": 2, "b": 2, "c": 5},
    "budget": 4.0,
}


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"scores": {"a": TWO}}, ValueError, "scores: expected those of every block of the groups, got none of 'b'"),
        ({"live": {"b": TWO.bool()}}, ValueError, "live: expected those of every block of the groups, got none of 'a'"),
        ({"scores": 3}, TypeError, "scores: expected a dict, got int"),
        ({"scores": {"a": [1, 1], "b": TWO}}, TypeError, r"scores\['a'\]: expected a tensor, got list"),
        ({"live": {"a": TWO, "b": TWO}}, TypeError, r"live\['a'\]: expected a tensor of torch.bool, got torch.float32"),
        ({"live": {"a": TWO.bool(), "b": torch.ones(3).bool()}}, ValueError, r"live\['b'\]: expected \[count\] twice, got \[2\], \[3\]"),
        ({"groups": []}, ValueError, "groups: expected at least one, got none"),
        ({"counts": {"a": 2, "b": 2}}, ValueError, "counts: expected numbers of every block that the cost knows, got none of 'c'"),
        (
            {"cost": Latency({"a": "x"}, {"x": {0: 0.0, 2: 1.0}})},
            ValueError,
            "cost: expected one that knows the blocks of the groups, got one that does not know 'b'",
        ),
    ],
)
def test_arguments_of_the_search(changes, kind, words):
    assert search(**SEARCH).keep.keys() == {"a", "b"}
    with pytest.raises(kind, match=words):
        search(**{**SEARCH, **changes})


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: Group((), "x"), ValueError, "blocks: expected at least one, got none"),
        (lambda: Group(("a",), "x", 0), ValueError, "chunk must be at least 1, got 0"),
        (lambda: Group(("a",), "x", 1, 0.5), TypeError, "floor must be an int, got float"),
        (lambda: distill_weight("x", 0, 5), TypeError, "step must be a number, got str"),
        (lambda: distill_weight(NAN, 0, 5), ValueError, "step must be a finite number, got nan"),
        (lambda: cubic_density(0, 0, 5, NAN), ValueError, "target must be a finite number, got nan"),
        (lambda: cubic_density(0, 0, 5, 0.5, "x"), TypeError, "initial must be a number, got str"),
        (lambda: linear_budget(0, 0, 5, 9, NAN), ValueError, "factor must be a finite number, got nan"),
        (lambda: linear_budget(0, 0, 5, 9.5, 2.0), TypeError, "initial must be an int, got float"),
        (lambda: step_mask(torch.ones(2), torch.ones(2).bool(), 0), ValueError, "window must be at least 1, got 0"),
        (lambda: AdapterImportance([], "x"), TypeError, "decay must be a number, got str"),
        (lambda: Salience(torch.nn.Identity(), {}, NAN), ValueError, "decay must be a finite number, got nan"),
    ],
)
def test_numbers_of_schedules_and_averages(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


def test_a_density_of_0_is_below_what_stays():
    apt, _ = built(BERT)
    with pytest.raises(ValueError, match=r"keep: expected a density of at least 0\.\d+, which is what always stays, got 0.0"):
        within_density(apt, {name: torch.ones(block.count) for name, block in apt.blocks.items() if block.kind != "hidden"}, 0.0)


def test_latency_of_what_is_no_model():
    with pytest.raises(TypeError, match="model: expected an APTModel, got Linear"):
        measure_latency(torch.nn.Linear(2, 2))


# -- Distiller ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"rank": 1.5}, TypeError, "rank must be an int, got float"),
        ({"rank": 25}, ValueError, "rank .*25"),
        ({"logits": "x"}, TypeError, "logits must be a number, got str"),
        ({"layers": "x"}, TypeError, "layers must be a number, got str"),
        ({"temperature": "x"}, TypeError, "temperature must be a number, got str"),
        ({"temperature": INF}, ValueError, "temperature must be a finite number, got inf"),
        ({"quarters": 1.5}, TypeError, "quarters must be an int, got float"),
        ({"seed": "x"}, TypeError, "seed must be an int, got str"),
    ],
)
def test_arguments_of_the_distiller(options, kind, words):
    apt, _ = built(BERT)
    with pytest.raises(kind, match=words):
        Distiller(apt, "self", **options)


def test_what_a_distillers_loss_is_of():
    apt, _ = built(BERT)
    distiller, batch = Distiller(apt, "self"), GOOD[0]
    outputs = apt(**batch, **distiller.asks)
    state = distiller.state_dict()
    with pytest.raises(TypeError, match="batch: expected a dict, got int"):
        distiller.loss(3, outputs)
    for wrong in ("x", None, torch.tensor(0.5)):
        with pytest.raises(TypeError, match=f"progress: expected a number, got {type(wrong).__name__}"):
            distiller.loss(batch, outputs, wrong)
    assert_equal(distiller.state_dict(), state)  # no layer was drawn
    expected = distiller.loss(batch, outputs, 1.0)
    distiller.load_state_dict(state)
    assert torch.equal(distiller.loss(batch, outputs, 2.0), expected)  # taken into [0, 1]


def test_a_distillers_state_is_looked_at_before_anything_changes():
    apt, _ = built(BERT)
    distiller = Distiller(apt, "self", seed=1)
    with torch.no_grad():
        distiller.transform.lora_B.normal_()
    state = distiller.state_dict()
    other = {key: torch.zeros_like(value) if key != "generator" else value for key, value in state.items()}
    for key, wrong, kind in (
        ("generator", torch.zeros(3), TypeError),
        ("generator", torch.zeros_like(state["generator"]), ValueError),
        ("transform.lora_A", None, TypeError),
    ):
        with pytest.raises(kind, match=rf"state\['{key}'\]"):
            distiller.load_state_dict({**other, key: wrong})
        assert_equal(distiller.state_dict(), state)
    with pytest.raises(TypeError, match="state: expected a dict, got NoneType"):
        distiller.load_state_dict(None)
