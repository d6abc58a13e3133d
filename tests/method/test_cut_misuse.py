"""Blocks that an event cuts to nothing, and cuts by hand at moments that a Controller does not expect."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from families import FAMILIES, ONE_EACH
from training import SCHEDULE, all_of, assert_equal, batch_for, built, train

from apt_ext import APTModel, Controller, adapter_parameters
from apt_ext.method.score.kurtosis import kurtosis

LEAST = {"prune": ["heads", "neurons", "hidden"], "density": 0.2, "round_to": 1, "uniform": False}


def run(name, shrink="cut", steps=16, **options):
    """(model, optimizer, Controller) of a run in which whole blocks go."""
    apt, optimizer = built(FAMILIES[name], **LEAST)
    options = {"floor": 0, "shrink": shrink, "log": lambda _: None, **SCHEDULE, **options}
    controller = Controller(apt, optimizer, 16, **options)
    train(apt, optimizer, controller, FAMILIES[name], steps)
    return apt, optimizer, controller


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_block_that_is_cut_to_nothing_is_as_one_masked_to_nothing(name):
    (cut, _, ours), (masked, _, theirs) = run(name, kurtosis=1.0), run(name, "none", kurtosis=1.0)
    if name != "gpt2":
        assert 0 in ours.history[-1]["kept"].values()
    for event, other in zip(ours.history, theirs.history, strict=True):
        assert event.pop("threshold") == pytest.approx(other.pop("threshold"), rel=1e-6)
        assert event == other
    assert all(torch.equal(ours.original(block), theirs.original(block)) for block in theirs.blocks)
    inputs = FAMILIES[name].inputs()
    with torch.no_grad():
        logits = cut.eval()(**inputs).logits, masked.eval()(**inputs).logits
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_run_with_empty_blocks_stops_and_goes_on(name):
    family, stopped = FAMILIES[name], run(name, steps=11, kurtosis=1.0)
    assert 0 in [block.count for block in stopped[0].blocks.values()]
    states = [copy.deepcopy(part.state_dict()) for part in stopped]
    other = run(name, steps=0, kurtosis=1.0)
    for part, state in zip(other, states, strict=True):
        part.load_state_dict(state)
    for parts in (stopped, other):
        train(*parts, family, 5, first=11)
    assert_equal(all_of(*other), all_of(*stopped))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_model_with_empty_blocks_takes_a_new_controller(name, tmp_path):
    """Its empty factors are in no optimizer that adapter_parameters() fills."""
    family, (apt, _, controller) = FAMILIES[name], run(name, steps=11)
    apt.save_pretrained(tmp_path)
    controller.save(tmp_path)
    again = APTModel.from_pretrained(family.model(), tmp_path).train()
    optimizer = torch.optim.AdamW(adapter_parameters(again))
    empty = [p for p in again.parameters() if p.requires_grad and not p.numel()]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert empty and held.isdisjoint(map(id, empty))
    options = {"floor": 0, "log": lambda _: None, **SCHEDULE}
    second = Controller(again, optimizer, 16, config=apt.apt_config, **options)
    second.load(tmp_path)
    train(again, optimizer, second, family, 5, first=11)
    assert second.done and second.density <= LEAST["density"]


def test_the_kurtosis_of_no_values_is_zero():
    assert kurtosis(torch.ones(3, 0)).tolist() == [0, 0, 0]
    assert kurtosis(torch.ones(0, 4)).shape == (0,)


def masked_run():
    """A Controller that has masked and not cut, after step 7: a cut by hand has something to take."""
    apt, optimizer = built(FAMILIES["bert"])
    controller = Controller(apt, optimizer, 16, shrink="none", log=lambda _: None, **SCHEDULE)
    train(apt, optimizer, controller, FAMILIES["bert"], 7)
    return apt, optimizer, controller


@pytest.mark.parametrize("when", ["before observe", "before the optimizer", "before step"])
def test_a_cut_by_hand_after_a_backward_is_told_and_the_run_goes_on(when):
    family, (apt, optimizer, controller) = FAMILIES["bert"], masked_run()
    apt(**batch_for(family, 7)).loss.backward()
    words = "the model was cut between a backward and this call"
    if when == "before observe":
        apt.cut(optimizer)
        with pytest.raises(RuntimeError, match=rf"^observe: {words}.*and run the backward again"):
            controller.observe()
        optimizer.zero_grad()
        apt(**batch_for(family, 7)).loss.backward()
        controller.observe()
        optimizer.step()
    else:
        controller.observe()
        if when == "before the optimizer":
            apt.cut(optimizer)
        optimizer.step()
        if when == "before step":
            apt.cut(optimizer)
        with pytest.raises(RuntimeError, match=rf"^step: {words}.*zero_grad\(\), and call step\(\) again"):
            controller.step()
        assert controller.now == 7
    optimizer.zero_grad()
    controller.step()  # as the words say
    assert controller.now == 8
    train(apt, optimizer, controller, family, 8, first=8)
    assert controller.done and controller.density <= 0.65
    for parameter, state in optimizer.state.items():
        assert {value.shape for key, value in state.items() if key != "step"} == {parameter.shape}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_event_within_no_grad_or_inference_mode_leaves_what_trains_trainable(mode):
    family = FAMILIES["bert"]
    runs = []
    for within in (mode, torch.enable_grad):
        apt, optimizer = built(family)
        controller = Controller(apt, optimizer, 16, log=lambda _: None, **SCHEDULE)
        for seed in range(16):
            apt(**batch_for(family, seed)).loss.backward()
            controller.observe()
            optimizer.step()
            optimizer.zero_grad()
            with within():
                controller.step()
        runs.append(all_of(apt, optimizer, controller))
        assert not any(tensor.is_inference() for tensor in [*apt.parameters(), *apt.buffers()])
        assert apt.blocks.origin is not None
    assert_equal(*runs)


def test_an_event_while_merged_changes_nothing_and_comes_after_the_unmerge():
    family = FAMILIES["bert"]
    apt, optimizer = built(family)
    controller = Controller(apt, optimizer, 16, log=lambda _: None, **SCHEDULE)
    train(apt, optimizer, controller, family, 5)
    apt(**batch_for(family, 5)).loss.backward()
    controller.observe()
    optimizer.step()
    optimizer.zero_grad()
    layer = apt.model.bert.encoder.layer[0].output.dense
    layer.merge_weights()
    before = all_of(apt, optimizer, controller)
    with pytest.raises(RuntimeError, match="^step: .*output.dense is merged under its present masks"):
        controller.step()
    assert_equal(all_of(apt, optimizer, controller), before)
    assert controller.now == 5 and apt.blocks.origin is None
    layer.unmerge_weights()
    controller.step()
    assert controller.now == 6 and apt.blocks.origin is not None


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_controller_is_not_copied(copied):
    _, _, controller = masked_run()
    controller.log = None
    with pytest.raises(TypeError, match="^Controller, Salience: expected to stay with the model"):
        copied(controller)


def test_the_model_inside_outlives_its_apt_model_and_saves_what_cuts_left(tmp_path):
    family = FAMILIES["bert"]
    apt = run("bert")[0]
    inner, expected = apt.model, apt.eval()(**family.inputs()).logits
    counts, gone = {name: block.count for name, block in apt.blocks.items()}, weakref.ref(apt)
    del apt
    gc.collect()
    assert gone() is None
    inner.save_pretrained(tmp_path)
    again = APTModel.from_pretrained(family.model(), tmp_path).eval()
    assert {name: block.count for name, block in again.blocks.items()} == counts
    assert torch.equal(again(**family.inputs()).logits, expected)


def test_a_model_that_is_let_go_is_freed_without_a_search_for_cycles():
    """An own self that a Distiller replaces holds as much as a model."""
    apt = built(FAMILIES["bert"])[0]
    weight = apt.model.bert.encoder.layer[0].output.dense.weight
    gone = [weakref.ref(thing) for thing in (apt, apt.model, weight)]
    gc.disable()
    try:
        del apt, weight
        assert [one() for one in gone] == [None] * 3
    finally:
        gc.enable()
