"""A Distiller's loss in a CUDA graph: each replay has its own weight of the teacher and its own layers, as the eager lines have."""

import pytest
import torch
from distilled_runs import distilled
from families import FAMILIES
from graphed_runs import exact, on, same
from training import batch_for, built

import apt_ext
from apt_ext import GraphedStep
from apt_ext.method import Distiller

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def both(name, **arguments):
    plain, _, _ = distilled(FAMILIES[name], name, False, **arguments)
    graphed, step, distiller = distilled(FAMILIES[name], name, True, **arguments)
    return plain, graphed, step, distiller


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
@pytest.mark.parametrize("shrink", ["cut", "none"])
def test_a_run_with_its_own_self_as_teacher_is_the_eager_run(name, shrink):
    plain, graphed, step, _ = both(name, refresh=(4, 13), controller={"shrink": shrink})
    assert same(plain, graphed) is None
    assert step.captures >= 3 and step.reason is None, step.reason


@pytest.mark.parametrize("settings", [{}, {"layers": 0}, {"logits": 0.0, "layers": 0.5}], ids=str)
def test_a_run_with_a_given_teacher_is_the_eager_run(settings):
    plain, graphed, step, _ = both("bert", teacher="given", **settings)
    assert same(plain, graphed) is None
    assert step.captures >= 3
    without = settings.get("logits") == 0.0  # what no drawn layer reaches has no gradient at the end: that is no graph
    assert (step.reason is None) is not without and (not without or "logits=0" in step.reason)


def test_hidden_dimensions_that_were_cut():
    def cut(model, optimizer, distiller):
        kept = torch.ones(model.blocks["hidden"].count)
        kept[1::3] = 0
        model.set_block_mask("hidden", kept)
        model.cut(optimizer)

    plain, graphed, step, _ = both("llama", at={8: cut}, controller={"shrink": "cut", "schedule": {"start": 4, "end": 20, "events": 2}})
    assert same(plain, graphed) is None
    assert step.reason is None, step.reason


def test_a_layer_of_which_a_block_is_gone_is_eager_from_then_on():
    def prune(model, optimizer, distiller):
        model.set_block_mask("1.heads", torch.zeros(model.blocks["1.heads"].count))

    plain, graphed, step, _ = both("bert", at={12: prune}, controller={"prune": ["neurons"], "shrink": "none", "density": 0.9})
    assert same(plain, graphed) is None
    assert step.captures >= 1 and "pruned whole" in step.reason


def test_masks_that_reach_zero_within_a_window_are_noticed():
    """No standing changes then: the graph serves all values of masks that move."""
    model, _ = built(FAMILIES["bert"], sizes={"num_hidden_layers": 4})
    model.cuda().float()
    distiller = Distiller(model, "self")
    step = GraphedStep(model, lambda model, batch: distiller.loss(batch, model(**batch, **distiller.asks), lambda: 0.5))
    count = model.blocks["2.neurons"].count
    for value in (0.5, 0.4, 0.3, 0.2):
        model.set_block_mask("2.neurons", torch.full((count,), value))
        step(**on("cuda", batch_for(FAMILIES["bert"], 0)))
    assert step.captures == 1 and step.reason is None
    model.set_block_mask("2.neurons", torch.zeros(count))
    for _ in range(2):
        step(**on("cuda", batch_for(FAMILIES["bert"], 0)))
    assert step.captures == 1 and "pruned whole" in step.reason
    model.set_block_mask("2.neurons", torch.full((count,), 0.5))
    step.reset()  # what was refused is not tried again on the same model
    for _ in range(2):
        step(**on("cuda", batch_for(FAMILIES["bert"], 0)))
    assert step.captures == 2 and step.reason is None


def test_a_teacher_that_is_refreshed_or_loaded_is_noticed():
    model, optimizer = built(FAMILIES["bert"], sizes={"num_hidden_layers": 4})
    model.cuda().float()
    distiller, batch = Distiller(model, "self", logits=1.0, layers=0), on("cuda", batch_for(FAMILIES["bert"], 0))
    step = GraphedStep(model, lambda model, batch: distiller.loss(batch, model(**batch, **distiller.asks), lambda: 1.0))

    def loss():
        with exact():
            for _ in range(3):
                found = step(**batch)
            assert torch.equal(found, distiller.loss(batch, model(**batch), 1.0).detach())
        model.zero_grad()
        return found

    assert loss() == 0 and step.captures == 1
    with torch.no_grad():
        for parameter in apt_ext.adapter_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    assert loss() != 0 and step.captures == 1
    state = distiller.state_dict()
    distiller.refresh()
    assert loss() == 0 and step.captures == 2
    distiller.load_state_dict(state)  # into the same memory
    assert loss() != 0 and step.captures == 2
    distiller.teacher.train()
    loss()
    assert step.captures == 3


def test_a_number_as_progress_runs_eagerly():
    model, _ = built(FAMILIES["bert"])
    model.cuda().float()
    distiller = Distiller(model, FAMILIES["bert"].model(torch.float32, seed=3).cuda(), layers=0)
    step = GraphedStep(model, lambda model, batch: distiller.loss(batch, model(**batch, **distiller.asks), 0.5))
    for _ in range(3):
        assert torch.isfinite(step(**on("cuda", batch_for(FAMILIES["bert"], 0))))
    assert step.captures == 0 and "as a function" in step.reason
