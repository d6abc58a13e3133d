"""What a Controller does not take: each an error in words, after which all is bitwise as before."""

import copy
import gc

import pytest
import torch
from families import FAMILIES
from training import SHORT, all_of, assert_equal, batch_for, built, finished, hooks, state_of, train

import apt_ext
from apt_ext import Controller, adapters

BERT = FAMILIES["bert"]
NAN, INF = float("nan"), float("inf")
TABLES = {"heads": {0: 0.0, 3: 1.0}, "neurons": {0: 0.0, 20: 1.0}}


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"log": 3}, TypeError, "log: expected a function of one line, or None, got int"),
        ({"shrink": 1}, ValueError, "shrink must be 'cut' or 'compact' or 'none', got 1"),
        ({"shrink": "release"}, ValueError, "shrink must be .*, got 'release'"),
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
        Controller(apt, optimizer, 16, budget="latency" if "latency" in options else "parameters", **{**SHORT, **options})
    assert hooks(apt, optimizer) == before
    Controller(apt, optimizer, 16, **SHORT)  # nothing of the other one is left


# -- observe ------------------------------------------------------------------------------------------------------------------------------

NONE = r"observe: expected gradients of adapters, got none; call observe\(\) after backward\(\), .* before zero_grad\(\)"
UNHEARD = "observe: expected a backward since the last step that reached a block to be pruned, got none"


@pytest.mark.parametrize("config", [{}, {"density": 1.0}])
def test_observe_without_gradients_is_refused_and_the_run_goes_on_as_if_it_had_not_been(config):
    """Before any backward, and after zero_grad()."""
    plain, expected, its = finished("bert", **config)
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


def test_step_before_the_optimizers_step_is_noticed_at_the_next_observe():
    """Else masks would move between a gradient and the step that uses it, and the first two batches would be one."""
    apt, optimizer = built(BERT)
    controller = Controller(apt, optimizer, 16, **SHORT)
    with pytest.raises(
        RuntimeError, match=r"observe: expected step\(\) after the optimizer's step, .*; call backward\(\), observe\(\), opt"
    ):
        for step in range(2):
            apt(**batch_for(BERT, step)).loss.backward()
            controller.observe()
            controller.step()
            optimizer.step()
            optimizer.zero_grad()
    assert controller.now == 0
    controller.step()
    assert controller.now == 1


def merged(apt, controller):
    _, adapter = next(adapters(apt))
    adapter.merge_weights()
    return adapter.unmerge_weights


def masked(apt, controller):
    name = next(iter(controller.blocks))
    mask = apt.get_block_mask(name)
    apt.set_block_mask(name, torch.ones_like(mask) * 0.75)
    return lambda: apt.set_block_mask(name, mask)


@pytest.mark.parametrize("disturb", [merged, masked])
@pytest.mark.parametrize("at", [4, 5, 13])  # within a window, at the first event, at the last
def test_a_change_that_was_refused_is_made_by_the_next_call(disturb, at):
    """And the run goes on as if nothing had been."""
    plain, expected, its = finished("bert", max_rank=8)
    apt, optimizer = built(BERT, max_rank=8)
    controller = Controller(apt, optimizer, 16, **SHORT)
    for step in range(16):
        apt(**batch_for(BERT, step)).loss.backward()
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        if step == at:
            undo = disturb(apt, controller)
            before = copy.deepcopy(controller.state_dict())
            for _ in range(2):
                with pytest.raises(RuntimeError, match="step: "):
                    controller.step()
                assert controller.now == step and str(controller.state_dict()["masks"]) == str(before["masks"])
            undo()
        controller.step()
        assert controller.now == step + 1
    assert controller.done and not controller.listening
    assert_equal(all_of(apt, optimizer, controller), all_of(plain, its, expected))


@pytest.mark.parametrize("at", [5, 13])
def test_a_refused_event_is_not_lost_by_going_on(at):
    apt, optimizer = built(BERT)
    controller = Controller(apt, optimizer, 16, **SHORT)
    train(apt, optimizer, controller, BERT, at)
    apt(**batch_for(BERT, at)).loss.backward()
    controller.observe()
    optimizer.step()
    optimizer.zero_grad()
    undo = merged(apt, controller)
    with pytest.raises(RuntimeError, match="step: .* is merged"):
        controller.step()
    undo()
    before = controller.density
    train(apt, optimizer, controller, BERT, 1, at + 1)
    assert controller.now == at + 1 and controller.density < before
    train(apt, optimizer, controller, BERT, 15 - at, at + 2)
    assert controller.done and controller.now == 16 and controller.density <= 0.65 and not controller.listening


def test_an_error_of_the_log_comes_after_the_change():
    plain, expected, its = finished("bert")
    apt, optimizer = built(BERT)

    def full(line):
        raise OSError("no space")

    controller = Controller(apt, optimizer, 16, log=full, **SHORT)
    failed = 0
    for step in range(16):
        try:
            train(apt, optimizer, controller, BERT, 1, step)
        except OSError:
            failed += 1
    assert failed == 3
    assert_equal(all_of(apt, optimizer, controller), all_of(plain, its, expected))


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
    for sums in controller.scores.salience.sums().values():
        sums[0].fill_(value)
    if value == 0:
        for score in controller.scores.salience.scores.values():
            score.zero_()
    before = state_of(apt)
    with pytest.raises(RuntimeError, match=words):
        controller.step()
    assert_equal(state_of(apt), before)
