"""What a Controller, one_shot and a Distiller do not take: each an error in words, after which all is bitwise as before."""

import copy
import gc

import pytest
import torch
from families import FAMILIES
from test_controller import assert_equal, state_of
from test_resume import all_of
from training import SHORT, batch_for, built, train, trained

import apt_ext
from apt_ext import Controller, adapters
from apt_ext.method import (
    AdapterImportance,
    Distiller,
    Salience,
    block_scores,
    cubic_density,
    distill_weight,
    linear_budget,
    measure_latency,
    one_shot,
    step_mask,
    within_density,
)

BERT = FAMILIES["bert"]
NAN, INF = float("nan"), float("inf")


def hooks(apt, optimizer):
    return [len(module._forward_pre_hooks) for module in apt.modules()], len(optimizer._optimizer_step_post_hooks)


TABLES = {"heads": {0: 0.0, 3: 1.0}, "neurons": {0: 0.0, 20: 1.0}}


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"log": 3}, TypeError, "log: expected a function of one line, or None, got int"),
        ({"compact": 1}, TypeError, "compact must be a bool, got int"),
        ({"joint": "no"}, TypeError, "joint must be a bool, got str"),
        ({"kurtosis": -1}, ValueError, "kurtosis must be at least 0, got -1"),
        ({"kurtosis": NAN}, ValueError, "kurtosis must be a finite number, got nan"),
        ({"kurtosis": "1"}, TypeError, "kurtosis must be a number, got str"),
        ({"seed": "x"}, TypeError, "seed must be an int, got str"),
        ({"seed": 1.5}, TypeError, "seed must be an int, got float"),
        ({"seed": True}, TypeError, "seed must be an int, got bool"),
        ({"seed": 2**64}, ValueError, r"seed must lie in \[-2\^63, 2\^64\), got 18446744073709551616"),
        ({"latency": 3}, TypeError, "latency: expected a dict, got int"),
        ({"latency": {**TABLES, "heads": 3}}, TypeError, r"latency\['heads'\]: expected a dict, got int"),
        ({"latency": {**TABLES, "heads": {0: "a", 3: 1.0}}}, TypeError, r"latency\['heads'\]\[0\] must be a number, got str"),
        ({"latency": {**TABLES, "heads": {0: INF, 3: 1.0}}}, ValueError, r"latency\['heads'\]\[0\] must be a finite number, got inf"),
        ({"latency": {**TABLES, "heads": {"0": 1.0, "3": 1.0}}}, TypeError, "number of heads in latency must be an int, got str"),
        ({"growth": 0.5}, ValueError, "growth.budget must be at least 1, got 0.5"),
    ],
)
def test_arguments_of_the_controller(options, kind, words):
    apt, optimizer = built(BERT)
    before = hooks(apt, optimizer)
    with pytest.raises(kind, match=words):
        Controller(apt, optimizer, 16, budget="latency" if "latency" in options else "parameters", **SHORT, **options)
    assert hooks(apt, optimizer) == before
    Controller(apt, optimizer, 16, **SHORT)  # nothing of the other one is left


# -- observe ------------------------------------------------------------------------------------------------------------------------------

NONE = r"observe: expected gradients of adapters, got none; call observe\(\) after backward\(\), .* before zero_grad\(\)"
UNHEARD = "observe: expected a backward since the last step that reached a block to be pruned, got none"


@pytest.mark.parametrize("config", [{}, {"density": 1.0}])
def test_observe_without_gradients_is_refused_and_the_run_goes_on_as_if_it_had_not_been(config):
    """Before any backward, and after zero_grad()."""
    plain, expected, its = trained("bert", **config)
    apt, optimizer = built(BERT, **config)
    controller = Controller(apt, optimizer, 16, **SHORT)
    for step in range(16):
        if step < 14:
            with pytest.raises(RuntimeError, match=NONE):
                controller.observe()
        apt(**batch_for(BERT, step)).loss.backward()
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        if step < 14:
            with pytest.raises(RuntimeError, match=NONE):
                controller.observe()
        controller.step()
    assert controller.done
    assert_equal(all_of(apt, optimizer, controller), all_of(plain, its, expected))


def test_gradients_of_an_earlier_step_are_none():
    """Without zero_grad() they are still there, but nothing new came."""
    apt, optimizer = built(BERT)
    controller = Controller(apt, optimizer, 16, **SHORT)
    apt(**batch_for(BERT, 0)).loss.backward()
    for _ in range(3):  # of one backward, as often as one likes
        controller.observe()
    optimizer.step()
    controller.step()
    before = copy.deepcopy(controller.state_dict())
    with pytest.raises(RuntimeError, match=UNHEARD):
        controller.observe()
    assert str(controller.state_dict()) == str(before)


def test_a_step_after_a_refused_observe_is_an_error_and_counts_nothing():
    apt, optimizer = built(BERT)
    controller = Controller(apt, optimizer, 16, **SHORT)
    optimizer.step()
    with pytest.raises(RuntimeError, match=NONE):
        controller.observe()
    before = copy.deepcopy(controller.state_dict())
    with pytest.raises(RuntimeError, match=r"step: expected observe\(\) before the optimizer's step"):
        controller.step()
    assert str(controller.state_dict()) == str(before)


def test_adapters_that_a_step_does_not_use_and_frozen_ones_are_fine():
    apt, _ = built(BERT)
    for name, adapter in adapters(apt):
        if ".0." in name:
            adapter.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in apt_ext.adapter_parameters(apt) if p.requires_grad], lr=1e-3)
    controller = Controller(apt, optimizer, 16, **SHORT)
    idle = next(adapter for name, adapter in adapters(apt) if name.endswith("1.attention.self.query"))
    for step in range(16):
        apt(**batch_for(BERT, step)).loss.backward()
        idle.lora_A.grad = idle.lora_B.grad = None
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
    assert controller.done and controller.density <= 0.65


def test_only_the_head_trains():
    """Every adapter is frozen: blocks are still scored by what the head sends back."""
    apt, _ = built(BERT, target_modules=["query"], modules_to_save=["intermediate.dense", "classifier"])
    for _, adapter in adapters(apt):
        for factor in (adapter.lora_A, adapter.lora_B):
            factor.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in apt.parameters() if p.requires_grad], lr=1e-3)
    controller = Controller(apt, optimizer, 16, growth=1.0, **SHORT)
    train(apt, optimizer, controller, BERT, 16)
    assert controller.done and controller.density <= 0.65


def test_after_remove_a_loop_may_go_on_calling_it():
    apt, optimizer = built(BERT)
    controller = Controller(apt, optimizer, 16, **SHORT)
    train(apt, optimizer, controller, BERT, 2)
    controller.remove()
    controller.remove()
    train(apt, optimizer, controller, BERT, 3)
    assert controller.now == 2 and not controller.listening


# -- optimizer, second Controller ---------------------------------------------------------------------------------------------------------


def test_an_optimizer_without_the_adapters_is_refused_and_named():
    apt, optimizer = built(BERT)
    stranger = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    before = hooks(apt, stranger)
    name = "bert.encoder.layer.0.attention.self.query"
    with pytest.raises(ValueError, match=rf"optimizer: expected the factors of all adapters .* got 26 of 26 missing, {name}\.lora_A first"):
        Controller(apt, stranger, 16, **SHORT)
    assert hooks(apt, stranger) == before
    some = torch.optim.AdamW([p for p in apt_ext.adapter_parameters(apt) if p is not dict(adapters(apt))[name].lora_B])
    with pytest.raises(ValueError, match=rf"got 1 of 26 missing, {name}\.lora_B first; add them, or requires_grad_\(False\)"):
        Controller(apt, some, 16, **SHORT)
    dict(adapters(apt))[name].lora_B.requires_grad_(False)
    Controller(apt, some, 16, **SHORT)


def test_accelerates_wrapper_holds_what_it_wraps():
    accelerate = pytest.importorskip("accelerate")
    apt, optimizer = built(BERT)
    wrapper = accelerate.optimizer.AcceleratedOptimizer.__new__(accelerate.optimizer.AcceleratedOptimizer)
    wrapper.optimizer = optimizer
    Controller(apt, wrapper, 16, **SHORT)


def test_a_second_controller_waits_until_the_first_is_done():
    apt, optimizer = built(BERT)
    first = Controller(apt, optimizer, 16, **SHORT)
    before, state = hooks(apt, optimizer), copy.deepcopy(first.state_dict())
    train(apt, optimizer, first, BERT, 3)
    state = copy.deepcopy(first.state_dict())
    with pytest.raises(
        RuntimeError, match=r"model: expected no other Controller at work on it, got one at step 3 of 14; call its remove\(\)"
    ):
        Controller(apt, optimizer, 16, **SHORT)
    assert hooks(apt, optimizer) == before and str(first.state_dict()) == str(state)
    other = copy.deepcopy(apt)  # another model
    Controller(other, torch.optim.AdamW(apt_ext.adapter_parameters(other)), 16, **SHORT)
    train(apt, optimizer, first, BERT, 11, first=3)
    assert first.done
    second = Controller(apt, optimizer, 16, density=0.5, **SHORT)
    second.remove()
    Controller(apt, optimizer, 16, density=0.5, **SHORT)


def test_a_controller_that_nobody_holds_is_none():
    apt, optimizer = built(BERT)
    Controller(apt, optimizer, 16, **SHORT)
    del optimizer  # whose hook held it
    gc.collect()
    Controller(apt, torch.optim.AdamW(apt_ext.adapter_parameters(apt)), 16, **SHORT)


# -- scores -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (NAN, "step: expected finite salience, got nan for block '0.heads'"),
        (INF, "step: expected finite salience, got inf for block '0.heads'"),
        (0.0, "step: expected salience above 0 for some block, got 0 for all"),
    ],
)
def test_nothing_is_chosen_by_scores_that_say_nothing(value, words):
    apt, optimizer = built(BERT)
    controller = Controller(apt, optimizer, 16, **SHORT)
    train(apt, optimizer, controller, BERT, 2)
    apt(**batch_for(BERT, 2)).loss.backward()
    controller.observe()
    optimizer.step()
    optimizer.zero_grad()
    for sums in controller.scores.salience._sums.values():
        sums[0].fill_(value)
    if value == 0:
        for score in controller.scores.salience.scores.values():
            score.zero_()
    before = state_of(apt)
    with pytest.raises(RuntimeError, match=words):
        controller.step()
    assert_equal(state_of(apt), before)


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
    adapter.merge_weights()
    before = {name: apt.get_block_mask(name) for name in apt.blocks}
    with pytest.raises(RuntimeError, match="1.output.dense of block '1.neurons' is merged"):
        one_shot(apt, GOOD, 0.5)
    assert_equal({name: apt.get_block_mask(name) for name in apt.blocks}, before)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"density": NAN}, ValueError, "density must be a finite number, got nan"),
        ({"density": 1.5}, ValueError, r"density: expected a density in \[0, 1\], got 1.5"),
        ({"joint": 1}, TypeError, "joint must be a bool, got int"),
        ({"floor": -1}, ValueError, "floor must be at least 0, got -1"),
        ({"model": 3}, TypeError, "model: expected an APTModel, got int"),
        ({"scores": 3}, TypeError, "scores: expected a dict, got int"),
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


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
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


# -- load_state_dict ----------------------------------------------------------------------------------------------------------------------


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
        ((), {}, ValueError, "state: expected the keys of a state_dict.* got 9 missing, 'step' first"),
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
        (("initial", "ranks"), {}, ValueError, r"state\['initial'\]\['ranks'\]: expected the keys"),
        (("ranks",), {}, ValueError, "state: expected the ranks of the model"),
        (("scores",), {}, ValueError, "state: expected the keys .* got 2 missing, 'salience' first"),
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
