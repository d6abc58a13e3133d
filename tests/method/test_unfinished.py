"""A model that a Controller has not finished: no call makes an ordinary model of it by mistake, wherever it was saved, copied or loaded."""

import copy
import gc
import io
import json
import re

import pytest
import torch
from families import FAMILIES, adapted
from torch import nn
from training import SHORT, batch_for, begun, built, train, trained

import apt_ext
from apt_ext import APTModel, Controller, export, get_apt_model, shrink
from apt_ext.method import one_shot
from apt_ext.pruning.target import Target

BERT = FAMILIES["bert"]
CALLS = {
    "shrink": lambda apt, path, **more: shrink(apt, **more),
    "export": lambda apt, path, **more: export(apt, path / "small", per_layer=True, **more),
    "merge_and_unload": lambda apt, path, **more: apt.merge_and_unload(**more),
}


def is_refused(apt):
    try:
        apt.refuse_unfinished("test")
    except RuntimeError:
        return True
    return False


@pytest.mark.usefixtures("loaded_here")
@pytest.mark.parametrize(("name", "steps"), [("bert", 2), ("llama", 13), ("t5", 5)])  # before, after and within the first windows
def test_a_model_under_training_is_refused_with_both_densities(name, steps, tmp_path):
    apt, controller, _ = begun(name, steps)
    before = {key: value.clone() for key, value in apt.state_dict().items()}
    present = re.escape(f"{controller.density:.4f}")
    for call, make in CALLS.items():
        words = rf"^{call}: .* keep {present} of .* density of 0\.65 \(parameters\), has not made its last event; .*unfinished=True"
        with pytest.raises(RuntimeError, match=words):
            make(apt, tmp_path)
        with pytest.raises(TypeError, match="unfinished must be a bool, got int"):
            make(apt, tmp_path, unfinished=1)
    assert not list(tmp_path.iterdir()) and all(torch.equal(value, before[key]) for key, value in apt.state_dict().items())
    for make in CALLS.values():
        assert make(apt, tmp_path, unfinished=True) is not None


@pytest.mark.parametrize("call", ["shrink", "merge_and_unload"])
def test_a_model_that_no_controller_pruned_is_not_refused(call, tmp_path):
    assert CALLS[call](adapted(BERT), tmp_path) is not None
    apt, optimizer = built(BERT)
    Controller(apt, optimizer, 16, **SHORT)  # which has made no step
    assert apt.target_density is None and apt.target_reached
    assert CALLS[call](apt, tmp_path) is not None
    apt, _, _ = begun(density=1.0)  # ranks alone
    assert apt.target is None and CALLS[call](apt, tmp_path) is not None
    apt = adapted(BERT)
    one_shot(apt, [batch_for(BERT, 0)], {"neurons": 8})
    assert CALLS[call](apt, tmp_path) is not None


@pytest.mark.parametrize("steps", [13, 14, 16])
def test_the_last_event_finishes_it(steps):
    apt, controller, _ = begun(steps=steps)
    assert apt.target_density == 0.65 and apt.target_reached == controller.done == (steps >= 14)
    assert is_refused(apt) == (steps < 14)


def test_it_stays_unfinished_whoever_holds_the_controller():
    apt, controller, optimizer = begun(steps=3)
    controller.remove()
    assert is_refused(apt)
    del controller, optimizer
    gc.collect()
    assert is_refused(apt)
    optimizer = torch.optim.AdamW(apt_ext.adapter_parameters(apt), lr=1e-3)
    second = Controller(apt, optimizer, 16, density=0.8, **SHORT)  # another target, from its first step on
    train(apt, optimizer, second, BERT, 1)
    assert apt.target == Target(0.8)
    train(apt, optimizer, second, BERT, 13, first=1)
    assert apt.target == Target(0.8, reached=True) and not is_refused(apt)


def test_a_forgotten_step_leaves_it_unfinished():
    apt, optimizer = built(BERT)
    controller = Controller(apt, optimizer, 16, **SHORT)
    apt(**batch_for(BERT, 0)).loss.backward()
    optimizer.step()
    assert controller.now == 0 and is_refused(apt)


@pytest.mark.parametrize("budget", ["flops", "memory"])
def test_the_density_of_another_budget_is_named_as_such(budget):
    apt, optimizer = built(BERT)
    controller = Controller(apt, optimizer, 16, budget=budget, **SHORT)
    train(apt, optimizer, controller, BERT, 1)
    with pytest.raises(RuntimeError, match=rf"density of 0\.65 \({budget}\)"):
        shrink(apt)


# -- saved, copied, loaded ----------------------------------------------------------------------------------------------------------------


def by_deepcopy(apt, path):
    return copy.deepcopy(apt)


def by_pickle(apt, path):
    for module in apt.modules():  # hooks of a Controller at work are not for pickle
        module._forward_pre_hooks.clear()
    file = io.BytesIO()
    torch.save(apt, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_directory(apt, path):
    apt.save_pretrained(path)
    return APTModel.from_pretrained(BERT.model(), path)


def by_state_dict(apt, path):
    fresh = get_apt_model(BERT.model(), apt.apt_config)
    fresh.load_state_dict(apt.state_dict())
    return fresh


def by_state_dict_of_a_wrapper(apt, path):
    fresh = nn.ModuleDict({"inner": get_apt_model(BERT.model(), apt.apt_config)})
    fresh.load_state_dict(nn.ModuleDict({"inner": apt}).state_dict())
    return fresh["inner"]


@pytest.mark.parametrize("steps", [7, 14])
@pytest.mark.parametrize("way", [by_deepcopy, by_pickle, by_directory, by_state_dict, by_state_dict_of_a_wrapper])
def test_a_copy_is_as_finished_as_the_model(way, steps, tmp_path):
    apt, _, _ = begun(steps=steps)
    copied = way(apt, tmp_path)
    assert copied is not apt and copied.target == apt.target == Target(0.65, reached=steps == 14)
    assert is_refused(copied) == (steps < 14)


def test_a_checkpoint_of_before_the_end_takes_the_model_back():
    """As `load_best_model_at_end` does, which loads the model's state alone."""
    apt, optimizer = built(BERT, max_rank=8)
    before = copy.deepcopy(apt.state_dict())  # of before the Controller: it says nothing of a target
    controller = Controller(apt, optimizer, 16, **SHORT)
    train(apt, optimizer, controller, BERT, 7)
    early = copy.deepcopy(apt.state_dict())
    train(apt, optimizer, controller, BERT, 9, first=7)
    late, share = copy.deepcopy(apt.state_dict()), controller.density
    head = {key: value for key, value in late.items() if "classifier" in key}
    for state, finished in ((early, False), (late, True), (before, False), (late, True)):
        apt.load_state_dict(state)
        assert apt.target == Target(0.65, reached=finished)
        apt.load_state_dict(head, strict=False)  # no masks: it changes nothing here
        assert apt.target_reached == finished and (controller.density == share) == finished


@pytest.mark.parametrize("steps", [7, 14])
@pytest.mark.parametrize("keeps", [True, False])  # False: a model's state that an older version saved
def test_a_resumed_run_is_as_finished_as_its_checkpoint(steps, keeps):
    apt, controller, optimizer = begun(steps=steps, max_rank=8)
    state = {key: value for key, value in apt.state_dict().items() if keeps or key != "target"}
    again, other = built(BERT, max_rank=8)
    second = Controller(again, other, 16, **SHORT)
    again.load_state_dict(state)
    other.load_state_dict(optimizer.state_dict())
    second.load_state_dict(controller.state_dict())
    assert again.target == Target(0.65, reached=steps == 14)
    train(again, other, second, BERT, 16 - steps, first=steps)
    assert again.target_reached


def test_files_without_a_target_load_and_damaged_ones_are_refused(tmp_path):
    adapted(BERT).save_pretrained(tmp_path)
    assert "target" not in json.loads((tmp_path / "apt_config.json").read_text())
    assert APTModel.from_pretrained(BERT.model(), tmp_path).target is None
    apt, _, _ = begun(steps=2)
    apt.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "apt_config.json").read_text())["target"] == {"density": 0.65, "budget": "parameters", "reached": False}


@pytest.mark.parametrize(
    ("values", "kind", "words"),
    [
        ([1], TypeError, "target: expected a dict, got list"),
        ({"density": 0.5}, ValueError, "target: expected the keys"),
        ({"density": 2.0, "budget": "flops", "reached": True}, ValueError, r"target.density must lie in \[0, 1\], got 2.0"),
        ({"density": "x", "budget": "flops", "reached": True}, TypeError, "target.density must be a number, got str"),
        ({"density": 0.5, "budget": "time", "reached": True}, ValueError, "target.budget must be 'parameters' or 'flops'"),
        ({"density": 0.5, "budget": "flops", "reached": 1}, TypeError, "target.reached must be a bool, got int"),
    ],
)
def test_a_target_of_a_file_is_checked(values, kind, words):
    with pytest.raises(kind, match=words):
        Target.of_dict(values)


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        (0.5, TypeError, "^target must be a Tensor of torch.int64, got float"),
        (torch.ones(3), TypeError, "^target must be a Tensor of torch.int64, got torch.float32"),
        (torch.ones(2, dtype=torch.int64), ValueError, r"^target must have shape \[3\], got \[2\]"),
        (torch.tensor([0, 9, 0]), ValueError, r"^target must hold a density, the number of a budget, and 0 or 1, got \[0, 9, 0\]"),
        (torch.tensor([0, 0, 2]), ValueError, r"0 or 1, got \[0, 0, 2\]"),
        (torch.tensor([-1, 0, 0]), ValueError, "target.density must be a finite number, got nan"),
    ],
)
def test_a_damaged_target_of_a_state_loads_nothing(value, kind, words):
    apt, _, _ = begun(steps=7)
    before = {key: tensor.clone() for key, tensor in apt.state_dict().items()}
    with pytest.raises(kind, match=words):
        apt.load_state_dict({**adapted(BERT, r=2).state_dict(), "target": value})
    assert all(torch.equal(tensor, before[key]) for key, tensor in apt.state_dict().items())


def test_a_target_is_its_tensor_whatever_its_density():
    for density in (0.0, 0.1, 1 / 3, 1.0):
        for budget in ("parameters", "latency"):
            for reached in (False, True):
                target = Target(density, budget, reached)
                assert Target.of_tensor(target.to_tensor()) == Target.of_dict(target.to_dict()) == target


def test_a_finished_model_goes_every_way():
    apt, controller, _ = trained("bert")
    assert controller.done and shrink(apt) is not None and apt.merge_and_unload() is not None
