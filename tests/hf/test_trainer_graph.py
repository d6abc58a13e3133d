"""APTTrainer's `graph`: what it takes, and a GPU run that equals the eager one."""

import logging

import pytest
import torch
from graphed_runs import exact
from hf_runs import built, losses, trainer

import apt_ext
from apt_ext import Schedule
from apt_ext.hf import APTTrainer
from apt_ext.method import Distiller
from apt_ext.tools import train_run

on_gpu = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def graphed(path, graph="auto", kind=APTTrainer, **options):
    return trainer(path, kind=kind, more={"graph": graph}, **options)[0]


def test_without_a_gpu_steps_are_eager(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run = graphed(tmp_path)
        run.train()
        plain = graphed(tmp_path, graph=False)
        plain.train()
    assert losses(run) == losses(plain)
    assert not run.graphed and "GPU" in run.graph_reason and plain.graph_reason == "graph=False"
    assert not [r for r in caplog.records if "eagerly" in r.message]
    with pytest.raises(RuntimeError, match="graph=True"):
        graphed(tmp_path, graph=True).train()
    with pytest.raises(ValueError, match='graph: expected "auto", True or False'):
        graphed(tmp_path, graph="always")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bf16": True},
        {"fp16": True},
        {"gradient_accumulation_steps": 3},
        {"label_smoothing_factor": 0.1},
        {"max_grad_norm": 0.01, "optim": "adamw_torch_fused"},
        {"eval_strategy": "steps", "eval_steps": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_graphed_run_is_the_eager_run(tmp_path, options, name):
    found = []
    for graph in (False, "auto"):
        with exact():
            torch.manual_seed(0)
            run = graphed(tmp_path, graph, name=name, use_cpu=False, **options)
            run.train()
        found.append((losses(run), [p.detach().clone() for p in apt_ext.adapter_parameters(run.model)], run.controller.history))
    assert run.graph_reason is None and (run.graphed or "fp16" in options)  # steps that are skipped shift the last event
    assert found[0][0] == found[1][0] and found[0][2] == found[1][2]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


test_a_graphed_run_is_the_eager_run.pytestmark += on_gpu


def test_a_loss_of_ones_own_is_eager_unless_it_is_allowed(tmp_path, caplog):
    class Own(APTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **_):
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    run = graphed(tmp_path, kind=Own, use_cpu=False)
    run.train()
    assert not run.graphed and "compute_loss is yours" in run.graph_reason
    assert len([r for r in caplog.records if "compute_loss is yours" in r.message]) == 1
    run = graphed(tmp_path, graph=True, kind=Own, use_cpu=False)
    run.train()
    assert run.graphed


test_a_loss_of_ones_own_is_eager_unless_it_is_allowed.pytestmark = on_gpu


def test_a_graphed_run_goes_on_from_a_checkpoint(tmp_path):
    with exact():
        run = graphed(tmp_path / "a", use_cpu=False, save_strategy="steps", save_steps=4)
        run.train()
        other = graphed(tmp_path / "b", use_cpu=False)
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert losses(other, 4) == losses(run, 4)


test_a_graphed_run_goes_on_from_a_checkpoint.pytestmark = on_gpu


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_a_graphed_run_with_a_teacher_is_the_eager_run(tmp_path, options):
    """Tr learns too, whose Parameters the model does not hold."""
    found = []
    for graph in (False, "auto"):
        with exact():
            torch.manual_seed(0)
            model = built("bert", sizes={"num_hidden_layers": 4}).cuda()  # Tr is made where the model is
            distiller = Distiller(model, "self", quarters=2)
            schedule = Schedule(start=3, warm_up=1, end=20, events=2)
            more = {"graph": graph, "distiller": distiller}
            kind = train_run._distilling(APTTrainer)
            run, _ = trainer(tmp_path, "bert", model, {"schedule": schedule}, kind=kind, more=more, use_cpu=False, max_steps=32, **options)
            run.train()
        trained = [*apt_ext.adapter_parameters(run.model), *distiller.parameters()]
        found.append((losses(run), [p.detach().clone() for p in trained], distiller.state_dict()["generator"]))
    assert run.graphed and run.graph_reason is None and run.refreshed
    assert found[0][0] == found[1][0] and torch.equal(found[0][2], found[1][2])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
    assert found[0][1][-1].any()  # lora_B of Tr


test_a_graphed_run_with_a_teacher_is_the_eager_run.pytestmark += on_gpu


def test_a_loss_may_say_that_it_is_graphable(tmp_path):
    class Own(APTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **_):
            return super().compute_loss(model, inputs, return_outputs)

    class Graphable(Own):
        loss_is_graphable = True

    for kind, words in ((Own, "compute_loss is yours"), (Graphable, None)):
        run = graphed(tmp_path, kind=kind)
        run.args._n_gpu, run.args.__dict__["_setup_devices"] = 1, torch.device("cuda")
        assert (run._why_eager() is None) == (words is None) and (words is None or words in run._why_eager())
    assert train_run._distilling(APTTrainer).loss_is_graphable
