"""apt-ext results on a tiny pack: cells of every row, what is skipped and what fails, the choice of a rate, and the tables."""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch
from apt_ext.tools.checkout.evidence import cell, packing, pictures, report, runner, store, tasks, training
from apt_ext.tools.checkout.evidence.cell import Place
from apt_ext.tools.checkout.evidence.quantised import widened
from apt_ext.tools.checkout.evidence.rows import rows_of
from apt_ext.tools.checkout.evidence.store import Cell
from apt_ext.tools.checkout.evidence.tasks import TASKS, load_data, load_model
from families import FAMILIES
from small_cells import command, made, trial_of, written

from apt_ext import APTConfig, adapters, get_apt_model
from apt_ext.tools.data import Missing

pytest.importorskip("transformers")
pytestmark = pytest.mark.evidence
CPU = torch.device("cpu")


@pytest.mark.parametrize(("task", "density"), [("movies", 0.4), ("shakespeare", 0.5)])
def test_every_row_is_a_line_with_all_that_was_asked_for(place, task, density, capsys, monkeypatch):
    monkeypatch.setattr(cell, "_warm_up", lambda *_: None)  # test_results_misuse.py looks at it
    more = ["--task", task, "--densities", f"{100 * density:g}", "--seed", "3", "--row", ",".join(rows_of(TASKS[task]))]
    assert command(place, *more) == 0, capsys.readouterr().err
    for name, row in rows_of(TASKS[task]).items():
        result = store.read(place.output, Cell(task, name, 3, density if row.pruned else None))
        assert result["task"] == task and result["row"] == name and result["seed"] == 3 and result["commit"]
        assert result["steps"] == TASKS[task].quick().steps == result["history"][-1]["step"]
        assert {"validation", "test"} < result["scores"].keys() and all(math.isfinite(score) for score in result["scores"].values())
        assert result["seconds"]["total"] > result["seconds"]["training"] > 0 < result["peak_memory_bytes"]
        assert (result["seconds"]["teacher"] > 0) == (row.teacher == "lora")
        if row.pruned:
            assert result["kept"]["weights"] <= density and result["density"] == density and result["inference"]["speedup"] > 0
            assert min(result["kept"]["heads"]) >= 1 and sum(result["kept"]["neurons"]) < 32 * len(result["kept"]["neurons"])
        else:
            assert result["kept"]["weights"] == 1
        steps = result["step_seconds"]
        assert (steps["after"] is None) == (not row.gradual and row.once is None) and (steps["before"] or steps["after"])
        assert all(found is None or 0 < found["low"] <= found["median"] <= found["high"] for found in steps.values())
        if not row.whole:
            before, after = result["adapter_parameters"]
            assert (after > before) == (row.growth > 1) or row.once
        assert result["scores"]["masked validation"] == pytest.approx(result["scores"]["validation"], rel=1e-4)
    times = {file: file.stat().st_mtime_ns for file in place.output.glob("*.jsonl")}
    assert list(times) == [store.file_of(place.output, task)] and command(place, *more) == 0
    assert times == {file: file.stat().st_mtime_ns for file in place.output.glob("*.jsonl")}  # nothing is done twice


def test_a_cell_is_the_same_twice(place, tmp_path):
    again = Place(place.pack, tmp_path / "again", "cpu", "here", alone=False, quick=True)
    one = Cell("movies", "apt-self", 1, 0.4)
    results = []
    for where in (place, again):
        assert runner.run_cells(where, [one]) == []
        results.append(store.read(where.output, one))
    assert results[0]["scores"] == results[1]["scores"] and results[0]["kept"] == results[1]["kept"]
    assert results[0]["alone"] and "inference" in results[0] and not results[1]["alone"] and "inference" not in results[1]


@pytest.mark.slow
def test_several_processes_do_the_same_and_keep_no_times(place, tmp_path):
    cells = [Cell("movies", name, 0, 0.4) for name in ("oneshot", "random")]
    assert runner.run_cells(place, cells, jobs=2) == []
    again = Place(place.pack, tmp_path / "again", "cpu", "here", quick=True)
    assert runner.run_cells(again, cells) == []
    for one in cells:
        together, alone = store.read(place.output, one), store.read(again.output, one)
        assert together["scores"]["test"] == pytest.approx(alone["scores"]["test"]) and together["kept"] == alone["kept"]
        assert not together["alone"] and alone["alone"] and "inference" not in together


def test_cells_side_by_side_are_all_run_and_a_dead_process_takes_only_what_ran(place, monkeypatch):
    """With a thread in the place of the processes."""
    pools = []

    def pool(jobs, begin, *arguments):
        pools.append(jobs)
        return ThreadPoolExecutor(1)

    def tried(where, one):
        assert not where.alone
        if one.seed == 1 and len(pools) == 1:
            raise BrokenProcessPool("killed")
        return {"seconds": {"total": 0.0}, "measure": "m", "scores": {"test": 1.0}, "kept": {"weights": 1.0}}

    monkeypatch.setattr(runner, "worker_pool", pool)
    monkeypatch.setattr(runner, "_tried", tried)
    said = runner.run_cells(place, [Cell("movies", "lora", seed) for seed in range(6)], jobs=2)
    assert "movies.lora.seed-1: a process died: killed" in said and len(said) <= 2 and pools == [2, 2]


def test_a_cell_that_fails_is_said_and_the_others_go_on(place, monkeypatch, capsys):
    real = runner.run_cell

    def breaks(where, one):
        if one.row == "random":
            raise RuntimeError("out of\nluck")
        return real(where, one)

    monkeypatch.setattr(runner, "run_cell", breaks)
    assert command(place, "--task", "movies", "--row", "random,magnitude", "--densities", "40") == 1
    assert "movies.random.40.seed-0: failed: RuntimeError: out of luck" in capsys.readouterr().err
    (file,) = place.output.glob("*.*")  # and nothing aside
    assert [line.cell for line in store.lines(file)] == ["movies.magnitude.40.seed-0"]


def test_when_time_is_up_nothing_is_started(place):
    cells = [Cell("movies", "lora", seed) for seed in range(3)]
    said = runner.run_cells(place, cells, minutes=0.0)
    assert said == [f"{one.name}: not started: time is up" for one in cells] and not list(place.output.iterdir())
    assert len(runner.run_cells(place, cells, jobs=2, minutes=0.0)) == 3


# -- rates and stages ------------------------------------------------------------------------------------------------------


def test_the_rate_is_that_of_the_better_trial(pack, tmp_path):
    for name, best in (("movies", 0), ("shakespeare", 1)):
        place = Place(pack, tmp_path, "cpu", "here")
        task = TASKS[name]
        tried = cell.trials(task, "lora")
        assert [one.rate for one in tried] == list(task.rates)
        with pytest.raises(Missing, match="trial has to come before"):
            cell.chosen_rate(place, Cell(name, "lora", 0))
        for one, score in zip(tried, (90.0, 80.0), strict=True):
            store.write(place.output, one, trial_of(one, score))
        assert cell.chosen_rate(place, Cell(name, "lora", 0)) == task.rates[best]  # accuracy, perplexity


def test_trials_never_read_the_test_part(place, monkeypatch):
    read = []
    real = tasks.Data.score
    monkeypatch.setattr(tasks.Data, "score", lambda data, model, part: read.append(part) or real(data, model, part))
    cell.run_cell(place, Cell("movies", "apt", cell.TRIAL_SEED, 0.4, 1e-3))
    assert set(read) == {"validation"}
    cell.run_cell(place, Cell("movies", "apt", 0, 0.4))
    assert read.count("test") == 1


def test_trials_come_first_and_those_of_the_teachers_row_before_its_pupils(pack, tmp_path):
    place = Place(pack, tmp_path, "cpu", "here")
    cells = runner.wanted([TASKS["movies"]], ["apt-lora", "full"], [0, 1], None)
    assert len(cells) == 2 * (1 + 3)
    first, second, third = runner.stages(place, cells)
    assert {(one.row, one.rate) for one in first} == {("full", 5e-5), ("full", 2e-4), ("lora", 5e-4), ("lora", 1e-3)}
    assert {(one.row, one.density) for one in second} == {("apt-lora", 0.4)} and third == cells
    assert all(one.seed == cell.TRIAL_SEED for one in first + second)
    store.write(place.output, first[0], trial_of(first[0]))
    assert first[0] not in runner.stages(place, cells)[0]


def test_all_rows_are_those_of_the_table_and_extra_ones_come_by_name():
    names = {one.row for one in runner.wanted(TASKS.values(), None, [0], None)}
    assert "apt-wide" not in names and {"full", "apt", "apt-self", "oneshot-kurtosis"} <= names
    assert [one.row for one in runner.wanted([TASKS["bbc"]], ["apt-wide"], [0], [0.4])] == ["apt-wide"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--task", "films"], "task: expected all or some of movies"),
        (["--task", "movies", "--row", "best"], "row: expected all or some of full"),
        (["--task", "shakespeare", "--row", "random"], "row: expected one of lora"),
        (["--task", "movies", "--seed", "a-3"], "seed: expected numbers"),
        (["--task", "movies", "--densities", "0.4,120"], "densities: expected percents"),
        (["--task", "movies", "--jobs", "0"], "jobs: expected at least 1"),
    ],
)
def test_options_are_refused_in_words(place, capsys, more, words):
    assert command(place, *more) == 2
    assert words in capsys.readouterr().err


# -- data ------------------------------------------------------------------------------------------------------------------


def test_what_is_not_packed_or_was_changed_is_said(pack, tmp_path):
    with pytest.raises(Missing, match=r"data: expected a packed directory.*--prepare"):
        load_data(tmp_path, TASKS["movies"], CPU)
    with pytest.raises(Missing, match="data: expected bbc.safetensors"):
        load_data(pack, TASKS["bbc"], CPU)
    for file in ("movies.safetensors", "pack.json"):
        (tmp_path / file).write_bytes((pack / file).read_bytes())
    content = bytearray((tmp_path / "movies.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "movies.safetensors").write_bytes(content)
    with pytest.raises(Missing, match="is not the file that pack.json lists"):
        load_data(tmp_path, TASKS["movies"], CPU)


def test_the_packed_models_are_the_ones_that_were_packed(pack):
    torch.manual_seed(1)
    first = load_model(pack, TASKS["movies"], CPU)
    torch.manual_seed(2)
    second = load_model(pack, TASKS["movies"], CPU)
    bert = FAMILIES["bert"].model(torch.float32, num_hidden_layers=3, intermediate_size=32, num_labels=2)
    for name, value in first.base_model.state_dict().items():
        torch.testing.assert_close(value, bert.base_model.state_dict()[name].half().float(), rtol=0, atol=0)
    assert not torch.equal(first.classifier.weight, second.classifier.weight)  # drawn anew
    llama = load_model(pack, TASKS["shakespeare"], CPU)
    assert llama.lm_head.weight is llama.model.embed_tokens.weight
    expected = FAMILIES["llama-tied"].model(torch.float32, num_key_value_heads=3, intermediate_size=32)
    ids = torch.arange(2, 12).view(1, -1)
    torch.testing.assert_close(llama(ids).logits, expected(ids).logits)


def test_scores_are_accuracy_and_perplexity(pack):
    data = load_data(pack, TASKS["movies"], CPU)
    model = load_model(pack, TASKS["movies"], CPU).train()
    right = sum(int(model.eval()(torch.tensor([one.ids])).logits.argmax() == one.label) for one in data.parts["test"])
    assert data.score(model.train(), "test") == pytest.approx(100 * right / 16) and model.training
    data = load_data(pack, TASKS["shakespeare"], CPU)
    model = load_model(pack, TASKS["shakespeare"], CPU)
    ids = data.parts["test"]
    with torch.no_grad():
        assert data.score(model, "test") == pytest.approx(math.exp(model(input_ids=ids, labels=ids).loss.item()), rel=1e-5)


def test_quantised_blocks_are_widened_by_their_definition():
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (3, 2 * 20), dtype=torch.uint8, generator=generator)
    raw.view(3, 2, 20)[..., 1] &= 0x3B  # scales and minima that are finite
    raw.view(3, 2, 20)[..., 3] &= 0x3B
    got = widened(raw, "Q4_1")
    for row in range(3):
        for block in range(2):
            part = raw[row, 20 * block : 20 * block + 20]
            scale, least = part[:4].clone().view(torch.float16).float().tolist()
            for i in range(32):
                quant = int(part[4 + i % 16]) >> (4 * (i // 16)) & 15
                assert got[row, 32 * block + i].item() == pytest.approx(scale * quant + least)
    eight = torch.cat(
        [torch.tensor([2.0], dtype=torch.float16).view(torch.uint8), torch.arange(-16, 16, dtype=torch.int8).view(torch.uint8)]
    )
    assert widened(eight.view(1, -1), "Q8_0").tolist() == [[2.0 * i for i in range(-16, 16)]]


def test_rows_of_queries_and_keys_are_put_back():
    rows, heads, head = 12, 2, 6
    weight = torch.arange(rows)
    theirs = weight.reshape(heads, head // 2, 2).swapaxes(1, 2).reshape(rows)
    assert torch.equal(weight[packing._interleaved(rows, head)], theirs)


def test_texts_are_split_once_and_for_all_and_none_is_in_two_parts():
    rows = [(f"text {i}", i % 5) for i in range(2000)] + [("text 7", 4)]
    split = packing._split("bbc", rows)
    texts = [text for part in tasks.PARTS for text, _ in split[part]]
    assert len(texts) == len(set(texts)) == 2000 and [len(split[part]) for part in tasks.PARTS] == [1275, 225, 500]
    assert dict(row for part in split.values() for row in part)["text 7"] == 2 and packing._split("bbc", rows[::-1][1:]) == split


def test_plays_are_the_modern_texts_in_the_order_of_their_names(tmp_path):
    archive = tmp_path / "plays.tar.gz"
    with tarfile.open(archive, "w:gz") as files:
        for name, text in (("s/b_gut.txt", b"second \xff"), ("s/readme.txt", b"no play"), ("s/a_gut.txt", b"first")):
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            files.addfile(entry, io.BytesIO(text))
    assert packing._plays(archive) == "first\nsecond \ufffd"


def test_glosses_are_read_with_their_class(tmp_path):
    for kind in ("noun", "verb", "adj", "adv"):
        line = "00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is | perceived  \n" if kind == "noun" else ""
        (tmp_path / f"data.{kind}").write_text("  1 a licence\n" + line)
    found = packing._glosses(packing.Sources(tmp_path, tmp_path, tmp_path))
    assert [row for rows in found.values() for row in rows] == [("that which is | perceived", 3)]
    with pytest.raises(Missing, match="data.noun is not in"):
        packing._glosses(packing.Sources(tmp_path, tmp_path, tmp_path / "none"))


# -- rows ------------------------------------------------------------------------------------------------------------------


def test_magnitude_is_of_the_effective_weight():
    apt = get_apt_model(FAMILIES["llama"].model(torch.float32), APTConfig(r=2))
    layer = "model.layers.0"
    with torch.no_grad():
        for name, adapter in adapters(apt):
            if name.startswith(layer):
                adapter.weight.zero_()
        found = dict(adapters(apt))
        found[f"{layer}.mlp.down_proj"].lora_B.fill_(1.0)
        found[f"{layer}.mlp.down_proj"].lora_A.zero_()
        found[f"{layer}.mlp.down_proj"].lora_A[0, 7] = 0.5
        found[f"{layer}.self_attn.k_proj"].weight[8:12] = -1.0  # rows of the third of three KV heads of four channels, and none else
    scores = training.magnitudes(apt, ["heads", "neurons"])
    assert scores["0.neurons"].nonzero().flatten().tolist() == [7]
    assert scores["0.neurons"][7].item() == pytest.approx(24 * 0.5 * found[f"{layer}.mlp.down_proj"].scaling)
    assert scores["0.heads"].nonzero().flatten().tolist() == [2]


# -- the tables ------------------------------------------------------------------------------------------------------------


def test_the_tables_say_what_is_there_and_what_is_missing(tmp_path):
    folder = written(
        tmp_path / "cells",
        *(made("lora", seed, 80.0 + seed) for seed in range(3)),
        *(
            made("apt", seed, 78.0 + seed, 0.2, inference={"speedup": 2.0, "batch": 32, "length": 64, "dtype": "float32"})
            for seed in range(3)
        ),
        made("oneshot", 0, 70.0, 0.2),
        made("random", 0, 99.0, 0.2, quick=True),
        made("magnitude", 0, 98.0, 0.2, trial=True),
    )
    report.write_report(folder, tmp_path / "out" / "results.md")
    text = (tmp_path / "out" / "results.md").read_text()
    lines = {
        line.split("|")[1].strip(): [part.strip() for part in line.split("|")[2:-1]] for line in reversed(text.splitlines()) if "|" in line
    }
    assert lines["dense LoRA"] == ["100.0 %", "3", "81.0 (80.0 to 82.0)", "100.0 %", "", "", "0.001"]
    assert lines["APT, 20 %"] == ["20.0 %", "3", "79.0 (78.0 to 80.0)", "97.5 %", "-2.0 (-2.0 to -2.0)", "+8.0", "0.001"]
    assert lines["APT, 40 %"][0] == lines["APT, 40 %"][2] == report._NONE
    assert lines["LoRA, random prune, recovery, 20 %"][0] == lines["LoRA, magnitude prune, recovery, 20 %"][0] == report._NONE
    assert "| MiniLM-L6 on movie-review sentences, 2 classes | APT at 20 %: 3 points above one-shot | +8.0 | yes |" in text
    assert "| APT, 20 % | 3 | 10.0 (10.0 to 10.0) | 9.0 (9.0 to 9.0) | 3 (3 to 3) | 2.00 (2.00 to 2.00) |" in text
    assert "| a machine, float32, cuDNN's attention, torch 2 | 7 | 0, 1, 2 | 0123456789ab |" in text
    assert "Trials beside them: 1, at 0123456789ab." in text and "99.0" not in text and "98.0" not in text
    assert "apt-wide" not in text and "full-size until the end" not in text


def test_times_of_two_machines_are_two_tables(tmp_path):
    def ran(row, seed, density, device, seconds, speedup, dtype):
        more = {"inference": {"speedup": speedup, "batch": 32, "length": 64, "dtype": dtype}} if density else {}
        more = {"warmed": True, "cudnn_attention": seed == 2, **more}
        return made(row, seed, 80.0, density, device=device, seconds={"training": seconds}, **more)

    folder = written(
        tmp_path / "cells",
        ran("apt", 0, 0.4, "a CPU, 2 threads", 300.0, 2.5, "float32"),
        ran("lora", 1, None, "a GPU", 20.0, None, None),
        ran("apt", 1, 0.4, "a GPU", 30.0, 1.5, "bfloat16"),
        ran("lora", 2, None, "a GPU", 50.0, None, None),
        made("random", 1, 70.0, 0.4, alone=False),
    )
    report.write_report(folder, tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text()
    on_gpu, on_cpu = (text.index(f"Measured on: {machine}, float32.") for machine in ("a GPU", "a CPU, 2 threads"))
    dense, gpu, cpu = (text.index(line) for line in ("| dense LoRA | 1 | 20.0 |", "| APT, 40 % | 1 | 30.0 |", "| APT, 40 % | 1 | 300.0 |"))
    planned = text.index("Measured on: a GPU, float32, cuDNN's attention.")
    assert dense < gpu < on_gpu < text.index("| dense LoRA | 1 | 50.0 |") < planned < cpu < on_cpu
    assert "| 1.50 |\n" in text[gpu:on_gpu] and "32 x 64 bfloat16." in text[on_gpu:planned] and "32 x 64" not in text[planned:cpu]
    assert "dense LoRA | 1" not in text[cpu:on_cpu]
    assert text[gpu:].split("|")[5].strip() == "3" and text[cpu:].split("|")[5].strip() == ""  # memory: of the GPU alone
    unmeasured = text[on_cpu:].splitlines()[2]
    assert unmeasured.startswith("Not measured alone: full fine-tuning; LoRA, one-shot") and "APT, 20, 10 %; APT, pruned" in unmeasured
    assert "| APT at 40 %: inference 1.6 times dense on CUDA | 1.50 | no |" in text
    assert "| APT at 40 %: inference 2 times dense on a CPU | 2.50 | yes |" in text


def test_tasks_without_cells_are_missing(tmp_path):
    report.write_report(written(tmp_path / "cells", made("full", 0, 80.0)), tmp_path / "r.md")
    assert (tmp_path / "r.md").read_text().count("| dense LoRA | missing |") == 4


def test_a_picture_where_matplotlib_is_and_a_sentence_where_not(tmp_path, monkeypatch):
    folder = written(tmp_path / "cells", made("lora", 0, 80.0), made("apt", 0, 78.0, 0.4), made("apt", 0, 77.0, 0.2))
    pytest.importorskip("matplotlib")
    assert report.write_report(folder, tmp_path / "results.md") == []
    assert (tmp_path / "results-movies.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "results.md").read_text()
    assert text.count(".png") == 1 and "kept weights and against time](results-movies.png)" in text  # tasks without cells have none
    beside = written(tmp_path / "beside", made("lora", 0, 80.0, alone=False), made("apt", 0, 78.0, 0.4, alone=False))
    assert report.write_report(beside, tmp_path / "beside.md") == []
    assert "score against kept weights](beside-movies.png)" in (tmp_path / "beside.md").read_text()

    def none():
        raise ImportError("no matplotlib")

    monkeypatch.setattr(pictures, "figure_class", none)
    assert report.write_report(folder, tmp_path / "other.md") == ["no matplotlib"] and "png" not in (tmp_path / "other.md").read_text()


def test_intervals_are_of_paired_differences():
    ours, theirs = {0: 10.0, 1: 20.0, 2: 30.0, 5: 0.0}, {0: 9.0, 1: 18.0, 2: 27.0, 7: 0.0}
    mean, low, high = report.paired(ours, theirs)
    assert mean == 2.0 and 1.0 <= low < 2.0 < high <= 3.0
    assert report.paired(ours, {0: 1.0}) is None
    assert report.share_of(TASKS["shakespeare"], 20.0, 10.0) == 0.5 and report.share_of(TASKS["bbc"], 20.0, 10.0) == 2.0
    history = [{"seconds": s, "validation": v} for s, v in ((1.0, 30.0), (2.0, 20.6), (3.0, 19.0))]
    assert report.time_to(TASKS["shakespeare"], {"history": history}, 20.0) == 2.0
    assert report.time_to(TASKS["shakespeare"], {"history": history}, 10.0) is None


def test_the_pack_lists_its_files(pack):
    listed = json.loads((pack / tasks.PACK).read_text())["files"]
    for name, digest in listed.items():
        assert hashlib.sha256((pack / name).read_bytes()).hexdigest() == digest
