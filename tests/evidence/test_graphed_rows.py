"""Rows with a Controller: batches of one length, their steps as CUDA graphs, and `--times`."""

from __future__ import annotations

import pytest
import torch
from apt_ext.tools.checkout.evidence import times, training
from apt_ext.tools.checkout.evidence.rows import rows_of
from apt_ext.tools.checkout.evidence.store import Cell
from apt_ext.tools.checkout.evidence.tasks import TASKS, Data, load_data, load_model
from small_cells import command

from apt_ext.tools.data import batch_of, training_batches

pytest.importorskip("transformers")
pytestmark = pytest.mark.evidence
MOVIES = TASKS["movies"].quick()
CPU = torch.device("cpu")


def test_batches_of_one_length_hold_the_same_texts(pack):
    data = load_data(pack, MOVIES, CPU)
    apart, alike = data.training(3), data.training(3, alike=True)
    longest = max(len(one.ids) for one in data.parts["train"])
    lengths = set()
    for _ in range(30):
        short, long = next(apart), next(alike)
        width = short["input_ids"].shape[1]
        assert long["input_ids"].shape == (MOVIES.batch, longest) and torch.equal(short["labels"], long["labels"])
        assert torch.equal(long["input_ids"][:, :width], short["input_ids"])
        assert torch.equal(long["attention_mask"][:, :width], short["attention_mask"]) and not long["attention_mask"][:, width:].any()
        lengths.add(width)
    assert len(lengths) > 1
    assert batch_of(data.parts["train"][:2], 0, 3)["input_ids"].shape == batch_of(data.parts["train"][:2], 0)["input_ids"].shape
    assert next(training_batches(data.parts["train"], 9, 4, 0, 20))["input_ids"][:, longest:].unique().tolist() == [9]


def trained(pack, row, alike, device=CPU, steps=12):
    """A short run of a row on batches of one length or of several."""
    task = TASKS["movies"].quick()
    task = type(task)(**{**vars(task), "steps": steps})

    class Given(Data):
        def training(self, seed, alike=False):
            return super().training(seed, given)

    given = alike
    loaded = load_data(pack, task, device)
    torch.manual_seed(0)
    stock = load_model(pack, task, device)
    for module in stock.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # it draws for each token, padding too
    data = Given(task, loaded.parts, loaded.pad, loaded.on)
    return training.train(task, rows_of(task)[row], stock, data, 0.4, 1e-3, 0)


@pytest.mark.parametrize("row", ["apt", "apt-self"])
def test_padding_changes_no_loss_and_no_choice(pack, row, monkeypatch):
    found = []
    for alike in (False, True):
        losses = []
        step = training.apt_ext.GraphedStep

        def noted(*args, losses=losses, step=step, **more):
            made = step(*args, **more)

            def call(batch):
                losses.append(made(batch))

            return call

        monkeypatch.setattr(training.apt_ext, "GraphedStep", noted)
        run = trained(pack, row, alike)
        monkeypatch.setattr(training.apt_ext, "GraphedStep", step)
        found.append((torch.stack(losses), run.kept, run.ranks, run.events))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    assert found[0][1:] == found[1][1:] and found[0][3]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("row", ["apt", "apt-self", "apt-start"])
def test_on_a_gpu_these_rows_are_graphs_and_train_the_same(pack, row, monkeypatch):
    made, step = [], training.apt_ext.GraphedStep
    found = []
    for enabled in (False, "auto"):

        def one(*args, enabled_here=enabled, **more):
            made.append(step(*args, **{**more, "enabled": enabled_here}))
            return made[-1]

        monkeypatch.setattr(training.apt_ext, "GraphedStep", one)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            run = trained(pack, row, True, torch.device("cuda"), 40)
        found.append((run.kept, run.ranks, run.events, [one["validation"] for one in run.clock.history]))
        state = [p.detach().clone() for p in training.apt_ext.adapter_parameters(run.model)]
        found[-1] += (state,)
    assert made[-1].captures >= 2 and made[-1].reason is None, made[-1].reason
    assert found[0][:4] == found[1][:4]
    assert all(torch.equal(a, b) for a, b in zip(found[0][4], found[1][4], strict=True))


def test_dense_rows_are_the_peers_and_stay_eager():
    graphs = {name for name, row in rows_of(TASKS["movies"]).items() if row.controlled}
    assert graphs == {name for name in rows_of(TASKS["movies"]) if name.startswith("apt")}


def test_times_are_printed_and_nothing_is_written(place, capsys, monkeypatch):
    assert command(place, "--task", "movies", "--row", "lora,apt", "--densities", "40", "--times", "--steps", "3") == 0
    dense, pruned = capsys.readouterr().out.splitlines()
    assert dense.startswith("movies.lora.seed-0: ") and ", 3 steps of " in dense and dense.endswith(", 1.00 of dense LoRA")
    assert pruned.startswith("movies.apt.40.seed-0: ") and " of dense LoRA" in pruned
    assert not place.output.exists()
    (alone,) = times.time_cells(place, [Cell("movies", "apt", 0, 0.4)])
    assert alone["steps"] == MOVIES.steps == len(alone["step seconds"]) and alone["seconds"] > 0
    assert " of dense LoRA" not in capsys.readouterr().out


@pytest.mark.parametrize(("more", "words"), [(["--steps", "3"], "expected --times beside it"), (["--times", "--steps", "0"], "at least 1")])
def test_steps_that_cannot_be_meant(place, capsys, more, words):
    assert command(place, "--task", "movies", *more) == 2
    assert words in capsys.readouterr().err and not place.output.exists()
