"""Which batches share a graph, and what a replay is given: without a GPU, by a stand-in for the graph."""

import pytest
import torch
from torch import nn

from apt_ext import GraphedStep
from apt_ext.steps import recording, replayer


class Replayed:
    """In the place of a Recording: it keeps what each replay was given, by the graph."""

    made: list = []

    def __init__(self, lines, batch, *_):
        self.gradients, self.batch, self.given = {}, batch, []
        Replayed.made.append(self)

    def outdated(self):
        return None

    def replay(self, tensors, device):
        self.given.append(list(tensors))
        return "replayed"


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are made, as if the CPU had some."""
    monkeypatch.setattr(replayer, "Recording", Replayed)
    monkeypatch.setattr(replayer.Replayer, "_place", lambda self: vars(self).update(_device=torch.device("cpu")))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(Replayed, "made", [])
    return Replayed.made


class Scaled(nn.Module):
    """Its loss is of two tensors and a number, by name."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 1)

    def forward(self, x, y, by=1.0):
        return {"loss": (self.inner(x) - y).sum() * by}


def batch(value=1.0, **more):
    return {"x": torch.full((3, 2), value), "y": torch.zeros(3, 1), **more}


def test_a_batch_is_looked_through_once_a_step(graphs, monkeypatch):
    looked = []
    for module in (replayer, recording):
        real = module.signature
        monkeypatch.setattr(module, "signature", lambda *arguments, real=real: (looked.append(1), real(*arguments))[1])
    step = GraphedStep(Scaled())
    for number in range(4):
        looked.clear()
        given = batch(float(number))
        found = step(**given)
        assert looked == [1]
    assert found == "replayed" and step.captures == 1 and len(graphs[0].given) == 3
    assert [id(one) for one in graphs[0].given[-1]] == [id(given["x"]), id(given["y"])], (
        "the tensors themselves, in the order of the graph's"
    )


def test_nan_is_a_number_like_others(graphs):
    step = GraphedStep(Scaled())
    for _ in range(4):
        step(**batch(by=float("nan")))
    assert step.captures == 1 and len(graphs[0].given) == 3
    for _ in range(3):
        step(**batch(by=0.0))
    step(**batch(by=-0.0))  # another step: the sign goes into the gradients
    assert step.captures == 2 and len(graphs[1].given) == 2


def test_the_order_of_names_makes_no_other_graph(graphs):
    step = GraphedStep(Scaled())
    for number in range(6):
        given = batch(float(number))
        step(**(given if number % 2 else {"y": given["y"], "x": given["x"]}))
        assert number == 0 or graphs[0].given[-1][0] is given["x"] and graphs[0].given[-1][1] is given["y"]
    assert step.captures == 1


def test_a_forward_may_read_the_order_of_what_it_has_no_name_for():
    class Joined(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(6, 1)

        def forward(self, scale, **features):
            return {"loss": scale * self.linear(torch.cat(list(features.values()), -1)).sum()}

    model, given = Joined(), {"text": torch.ones(1, 3), "scale": 2.0, "image": torch.zeros(1, 3)}
    assert torch.equal(GraphedStep(model)(**given)["loss"], model(**given)["loss"].detach())


def test_a_loss_may_read_the_order_of_its_batch(graphs):
    step = GraphedStep(Scaled(), lambda model, batch: model(*batch.values())["loss"])
    shape = (3, 2)
    for _ in range(3):
        step(a=torch.ones(shape), b=torch.zeros(shape))
    assert step.captures == 1
    eager = step(b=torch.full(shape, 2.0), a=torch.ones(shape))
    assert eager != "replayed" and step.captures == 1
