"""What code within a step has done on the host before each replay, without a GPU: the graphs are stand-ins."""

import gc
import weakref

import pytest
import torch
from families import FAMILIES
from torch import nn
from training import batch_for, built

from apt_ext import GraphedStep
from apt_ext.common import own_capture
from apt_ext.method import Distiller
from apt_ext.pruning.wrappers import StreamCarrier
from apt_ext.steps import replayer as replaying
from apt_ext.steps.capture import CaptureFailed
from apt_ext.steps.standing import Standing


def test_outside_of_a_step_nothing_is_kept():
    class Kept:
        def __call__(self):
            return None

    one = Kept()
    gone = weakref.ref(one)
    own_capture.before_each_replay(one, check=one)
    with own_capture.recording() as part:
        assert own_capture.is_recording()
        own_capture.before_each_replay(one, check=one)
    assert part.updates == [one] and part.checks == [one] and not own_capture.is_recording()
    del one, part
    gc.collect()
    assert gone() is None
    with own_capture.recording(captured=False):
        assert not own_capture.is_recording()


def test_an_error_ends_a_recording():
    with pytest.raises(ZeroDivisionError), own_capture.recording():
        raise ZeroDivisionError
    assert not own_capture.is_recording()


class Rerun:
    """A stand-in for a graph: a replay runs the lines again, as they were at the capture."""

    made = 0

    def __init__(self, lines, batch, device, parameters, listeners, pool, around):
        with own_capture.recording() as self._host:
            try:
                lines(batch)
            except Exception as error:
                raise CaptureFailed(str(error)) from error
        for parameter in parameters:
            parameter.grad = None
        self._lines, self.gradients = lines, {}
        Rerun.made += 1

    def outdated(self):
        return self._host.outdated()

    def replay(self, batch, device):
        for update in self._host.updates:
            update()
        with own_capture.recording():
            return self._lines(batch)


@pytest.fixture
def stand_ins(monkeypatch):
    """GraphedStep on the CPU, with stand-ins for graphs."""
    monkeypatch.setattr(replaying, "Recording", Rerun)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    known = replaying.Replayer._known

    def as_on_a_gpu(self, inputs, batch, fixed):
        known(self, inputs, batch, fixed)
        self.reason = None
        standing = Standing(self.model, self._volatile)
        if self._standing is None or standing != self._standing:
            self._begin(standing)
        return (str(sorted(batch)), fixed, False), (inputs, batch)  # all of it, for the stand-in

    monkeypatch.setattr(replaying.Replayer, "_known", as_on_a_gpu)
    monkeypatch.setattr(Rerun, "made", 0)


def test_checks_come_first_and_updates_before_each_replay(stand_ins):
    model, x, calls, why = nn.Linear(2, 1), torch.ones(1, 2), [], [None]

    def loss(model, batch):
        own_capture.before_each_replay(lambda: calls.append("update"), check=lambda: calls.append("check") or why[0])
        return model(batch["x"]).sum()

    step = GraphedStep(model, loss)
    step(x=x)
    assert calls == []
    step(x=x)  # whether the eager step before is still to be captured; the first replay
    assert calls == ["check", "update"] and step.captures == 1
    step(x=x)
    assert calls == ["check", "update"] * 2
    why[0] = "another"
    step(x=x)
    assert calls == ["check", "update"] * 2 + ["check"] and not step.graphed  # eagerly
    step(x=x)
    assert step.captures == 1  # still another: eagerly again
    why[0] = None
    step(x=x)
    assert step.captures == 2 and calls[-2:] == ["check", "update"]


@pytest.mark.parametrize("where", ["check", "update"])
def test_an_error_reaches_the_caller_before_the_replay(stand_ins, where):
    model, ran, broken = nn.Linear(2, 1), [], []

    def fail():
        if broken:
            raise KeyError("host")

    def loss(model, batch):
        ran.append(1)
        own_capture.before_each_replay(**{where: fail})
        return model(batch["x"]).sum()

    step = GraphedStep(model, loss)
    for _ in range(3):
        step(x=torch.ones(1, 2))
    before = len(ran)
    broken.append(1)
    with pytest.raises(KeyError, match="host"):
        step(x=torch.ones(1, 2))
    assert len(ran) == before
    broken.clear()
    step(x=torch.ones(1, 2))
    assert len(ran) == before + 1 and step.captures == 1


# -- a Distiller -----------------------------------------------------------------------------------------------------------


def pair(**settings):
    model, _ = built(FAMILIES["bert"], sizes={"num_hidden_layers": 4})
    teacher = FAMILIES["bert"].model(seed=5, num_hidden_layers=4)
    torch.manual_seed(1)
    distiller = Distiller(model, teacher, quarters=2, **settings)
    if distiller.transform is not None:
        with torch.no_grad():
            distiller.transform.lora_B.normal_()
    return model, distiller


def passes(graph, values, **settings):
    """Loss, gradients and the generator of passes with these weights of the teacher."""
    model, distiller = pair(**settings)
    now, found = [0.0], []
    step = GraphedStep(model, lambda model, batch: distiller.loss(batch, model(**batch, **distiller.asks), lambda: now[0]), enabled=graph)
    for i, value in enumerate(values):
        now[0], batch = value, batch_for(FAMILIES["bert"], i)
        if graph:
            loss = step(**batch)
        else:
            loss = distiller.loss(batch, model(**batch, **distiller.asks), value)
            loss.backward()
        gradients = [p.grad for p in (*model.parameters(), *distiller.parameters()) if p.grad is not None]
        found.append([loss.detach(), *(g.clone() for g in gradients), distiller.state_dict()["generator"]])
        model.zero_grad()
        for parameter in distiller.parameters():
            parameter.grad = None
    return found, step


@pytest.mark.parametrize("settings", [{}, {"layers": 0.0}, {"logits": 0.5, "temperature": 1.0}], ids=str)
def test_buffers_give_what_numbers_give(stand_ins, settings):
    values = [0.0, 0.0, 0.0, 0.1, 0.2, 0.3, 0.4, 0.7, 1.0, 1.0, 1.5, 1.0, 0.5, 0.5, 0.5]
    (plain, _), (graphed, step) = passes(False, values, **settings), passes("auto", values, **settings)
    for i, (a, b) in enumerate(zip(plain, graphed, strict=True)):
        assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), i
    assert step.captures == 4  # without a teacher, with both terms, the teacher's alone, and both again


def test_what_no_graph_follows_is_refused(stand_ins):
    model, distiller = pair()
    batch = batch_for(FAMILIES["bert"], 0)

    def reason(progress, distiller=distiller):
        step = GraphedStep(model, lambda model, batch: distiller.loss(batch, model(**batch, **distiller.asks), progress))
        for _ in range(3):  # with the first, transformers puts the hooks in place that collect hidden states
            step(**batch)
        return step.reason

    assert "progress as a function" in reason(0.5)
    assert reason(lambda: 0.5) is None
    distiller.logits = 0.0
    assert "logits=0" in reason(lambda: 1.0) and reason(lambda: 0.9) is None
    distiller.logits = 1.0
    model.set_block_mask("1.neurons", torch.zeros(model.blocks["1.neurons"].count))
    assert "pruned whole" in reason(lambda: 0.5)
    assert reason(0.5, Distiller(model)) is None  # without a teacher it is the task's loss


def test_a_graph_of_another_teacher_or_of_other_settings_is_outdated(stand_ins):
    model, _ = built(FAMILIES["bert"], sizes={"num_hidden_layers": 4})
    distiller, ran = Distiller(model, "self"), []

    def loss(model, batch):
        ran.append(1)
        return distiller.loss(batch, model(**batch, **distiller.asks), lambda: 0.5)

    step = GraphedStep(model, loss)
    changes = [distiller.refresh, lambda: setattr(distiller, "temperature", 1.0), lambda: setattr(distiller, "quarters", 3)]
    for number, change in enumerate([lambda: None, *changes], 1):
        change()
        for _ in range(3):
            step(**batch_for(FAMILIES["bert"], 0))
        assert step.captures == number
    with torch.no_grad():
        next(one for one in model.parameters() if not one.requires_grad).mul_(2.0)
    before = len(ran)
    with pytest.raises(RuntimeError, match="was written since the last refresh"):
        step(**batch_for(FAMILIES["bert"], 0))
    assert len(ran) == before


def test_a_loss_asks_no_device_for_the_mask_of_hidden_dimensions(stand_ins, monkeypatch):
    """It is read from the device each time, which no capture may, and belongs to no layer."""
    model, optimizer = built(FAMILIES["llama"], sizes={"num_hidden_layers": 4})
    distiller = Distiller(model, "self")
    kept = torch.ones(model.blocks["hidden"].count)
    kept[1::3] = 0
    model.set_block_mask("hidden", kept)
    model.cut(optimizer)

    def asked(carrier, name):
        raise AssertionError(name)

    monkeypatch.setattr(StreamCarrier, "host_mask", asked)
    step = GraphedStep(model, lambda model, batch: distiller.loss(batch, model(**batch, **distiller.asks), lambda: 0.5))
    for _ in range(4):
        step(**batch_for(FAMILIES["llama"], 0))
    assert step.captures == 1 and step.reason is None
