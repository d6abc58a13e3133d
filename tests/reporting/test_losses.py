"""Losses come as pairs or as a Trainer's log; what is neither is named."""

import math

import pytest
import torch
from families import FAMILIES, adapted

from apt_ext.reporting.losses import curves_of, thinned


def test_pairs():
    assert curves_of([(2, 0.5), (1, 0.75), [3, 1]]) == {"training": [(1, 0.75), (2, 0.5), (3, 1.0)]}
    assert curves_of(None) == curves_of([]) == {}


def test_the_log_of_a_trainer():
    log = [
        {"step": 1, "loss": 0.9, "epoch": 0.1},
        {"step": 2, "eval_loss": 0.8},
        {"step": 2, "loss": 0.7},
        {"train_runtime": 3.0, "step": 2},
    ]
    assert curves_of(log) == {"training": [(1, 0.9), (2, 0.7)], "evaluation": [(2, 0.8)]}


def test_a_long_run_is_thinned():
    curve = curves_of([(step, float(step)) for step in range(50_001)])["training"]
    short = thinned(curve)
    assert len(short) < 4_002 and short[0] == (0, 0.0) and short[-1] == (50_000, 50_000.0)
    assert thinned(short[:100]) == short[:100]


def test_what_a_trainer_has_logged(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    apt = adapted(FAMILIES["bert"], dtype=torch.float32)
    rows = [{"input_ids": torch.arange(2, 9), "labels": torch.tensor(i % 3)} for i in range(8)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, logging_steps=2, eval_strategy="steps", eval_steps=4, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(apt, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    curves = curves_of(trainer.state.log_history)
    assert [step for step, _ in curves["training"]] == [2, 4] and [step for step, _ in curves["evaluation"]] == [4]


def test_what_is_not_finite_is_a_gap():
    assert curves_of([(1, 0.5), (2, math.nan), (3, math.inf)]) == {"training": [(1, 0.5), (2, None), (3, None)]}


@pytest.mark.parametrize(
    ("losses", "kind", "words"),
    [
        ({1: 0.5}, TypeError, r"losses: expected \(step, loss\) pairs, or Trainer's state.log_history, got dict"),
        ("0.5", TypeError, "losses: .* got str"),
        (iter([(1, 0.5)]), TypeError, "losses: .* got list_iterator"),
        ([0.5], TypeError, r"losses\[0\]: .* got float"),
        ([(1, 0.5), (2,)], ValueError, r"losses\[1\]: expected a step and a loss, got 1 values"),
        ([("1", 0.5)], TypeError, r"step of losses\[0\] must be an int, got str"),
        ([(-1, 0.5)], ValueError, r"step of losses\[0\] must be at least 0, got -1"),
        ([(1, "0.5")], TypeError, r"loss of losses\[0\] must be a number, got str"),
        ([(1, True)], TypeError, r"loss of losses\[0\] must be a number, got bool"),
        ([{"loss": 0.5}], ValueError, r'losses\[0\]: expected a dict with "step" beside its loss'),
        ([{"step": 1, "epoch": 2}], ValueError, 'got 1 entries without "loss" or "eval_loss"'),
    ],
)
def test_what_is_neither_is_named(losses, kind, words):
    with pytest.raises(kind, match=words):
        curves_of(losses)
