"""What a Controller does with each of its arguments."""

import pytest
import torch
from families import EMPTY_HEADS, FAMILIES
from training import SHORT, batch_for, built, train

import apt_ext
from apt_ext import Controller, Growth
from apt_ext.method import cost_of, grown_ranks, search


@pytest.mark.parametrize("growth", [Growth(3.0), Growth(3.0, limit=5, rule="paper", importance="paper")], ids=["code", "paper"])
def test_growth_is_what_its_argument_says(monkeypatch, growth):
    """At each event: the budget, the limits, the paper's rate or none, and the importance since the event before."""
    family, calls = FAMILIES["bert"], []
    apt, optimizer = built(family)
    controller = Controller(apt, optimizer, 16, growth=growth, **SHORT)
    start, found = controller.adapter_parameters, controller.importance.adapters
    monkeypatch.setattr(apt_ext.method.select.rank_growth, "grown_ranks", lambda *args: calls.append(args) or grown_ranks(*args))
    factor, expected = ("lora_A", {}) if growth.importance == "signed" else ("lora_B", {})
    for step in range(1, 17):
        apt(**batch_for(family, step)).loss.backward()
        for name, adapter in found.items():
            products = getattr(adapter, factor) * getattr(adapter, factor).grad
            now = products.sum(1).abs().mean() if growth.importance == "signed" else products.abs().sum()
            expected[name] = 0.85 * expected.get(name, 0) + 0.15 * now.item()
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
        if step in controller.steps.events:
            ranks, sizes, importance, budget, limits, rate = calls[-1]
            part = controller.steps.events.index(step) + 1
            assert budget == int(start * (1 + 2 * part / 3)) and controller.adapter_parameters <= budget
            assert rate == (None if growth.rule == "budget" else pytest.approx(budget / int(start * (1 + 2 * (part - 1) / 3))))
            assert limits == {name: min(growth.limit or 16, a.in_features, a.out_features) for name, a in found.items()}
            assert importance == pytest.approx(expected, rel=1e-4)
            expected = {}
    assert len(calls) == 3 and controller.adapter_parameters > start


def test_outliers_count_in_decoders_unless_told_otherwise():
    weights = {"bert": 0.0, "roberta": 0.0, "bert-decoder": 1.0, "llama": 1.0, "gpt2": 1.0, "t5": 1.0}
    for name, weight in weights.items():
        apt, optimizer = built(FAMILIES[name])
        for given, expected in (({}, weight), ({"kurtosis": 0.5}, 0.5), ({"kurtosis": 0.0}, 0.0)):
            controller = Controller(apt, optimizer, 16, **given)
            assert controller.scores.kurtosis == expected
            controller.remove()


def test_decay_is_of_both_averages():
    """They start at 0, so what is first seen counts 1 - decay; for importance that is in the second step, as B is 0 in the first."""
    scores, importance = [], []
    for options in ({"decay": 0.0}, {"decay": 0.5}, {}):
        apt, optimizer = built(FAMILIES["bert"])
        controller = Controller(apt, optimizer, 16, **SHORT, **options)
        train(apt, optimizer, controller, FAMILIES["bert"], 1)
        scores.append(controller.scores.scores())
        assert not any(controller.importance.importance().values())
        train(apt, optimizer, controller, FAMILIES["bert"], 1, first=1)
        importance.append(controller.importance.importance())
    for share, found, values in zip((0.5, 0.15), scores[1:], importance[1:], strict=True):
        for name, score in scores[0].items():
            assert bool(score.any())
            torch.testing.assert_close(found[name], share * score)
        assert all(importance[0].values())
        assert values == pytest.approx({name: share * value for name, value in importance[0].items()})


@pytest.mark.parametrize(("joint", "floor"), [(True, 1), (False, 2), pytest.param(True, 0, marks=EMPTY_HEADS)])
def test_the_search_is_told_whether_kinds_compete_and_what_stays(monkeypatch, joint, floor):
    calls, before = [], []
    monkeypatch.setattr(apt_ext.method.controller, "search", lambda *args: calls.append(args) or search(*args))
    monkeypatch.setattr(apt_ext.method.outlook, "search", lambda *args: before.append(args) or search(*args))
    apt, optimizer = built(FAMILIES["bert"])
    controller = Controller(apt, optimizer, 16, joint=joint, floor=floor, **SHORT)
    assert before  # of what will be left
    train(apt, optimizer, controller, FAMILIES["bert"], 6)
    assert len(calls) == 4  # at each step of the first window
    calls += before
    assert {(call[-1], *{group.floor for group in call[2]}) for call in calls} == {(joint, floor)}


def test_costs_are_of_the_length_and_rows_of_the_seed():
    apt, optimizer = built(FAMILIES["bert"])
    for length in (7, 128):
        controller = Controller(apt, optimizer, 16, budget="flops", length=length, seed=length)
        assert controller.cost == cost_of(apt.model, apt.blocks, "flops", length) and controller.generator.initial_seed() == length
        controller.remove()
