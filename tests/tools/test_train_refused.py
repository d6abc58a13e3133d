"""What apt-ext train refuses before it loads anything."""

import shutil

import pytest
import torch
from own_source import train

from apt_ext.tools import models
from apt_ext.tools.cli import main

pytest.importorskip("jsonargparse")
transformers = pytest.importorskip("transformers")
WEIGHTS = "model.safetensors"


@pytest.fixture
def unloaded(monkeypatch):
    models.transformers_offline()
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(lambda *_, **__: pytest.fail("it loads")))


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        (["--density", "0.1"], 1, "density: expected at least"),
        (["--prune", "heads", "--density", "0.9"], 1, "--prune neurons with --uniform true would pass, and so would --export per_layer"),
        (["--target-modules", "q_proj"], 1, "target_modules: expected names of modules of this model, got 'q_proj'"),
        (["--max-steps", "1"], 1, "schedule: expected start + warm_up < end"),
        (["--length", "999"], 1, "length: expected at most the 32 positions"),
        (["--report-to", "nothing"], 2, "report-to: expected some of"),
        (["--trainer.learnin_rate", "1"], 2, "got 'learnin_rate'; nearest: learning_rate"),
        (["--trainer.lr_scheduler_type", "foo"], 2, "trainer: foo is not a valid SchedulerType"),
        (["--trainer.output_dir", "x"], 2, "trainer: expected --output DIR, which is where checkpoints go"),
        (["--label-column", "lable"], 1, "expected a column 'lable' in"),
        (["--trainer.optim", "adafactor"], 1, "got adafactor; reserve the room with --max-rank 32, or let no rank grow"),
        (["--device", "cuda"], 1, "device: expected a CUDA device that torch can use, found none"),
        (["--resume"], 1, "resume: expected a run of apt-ext train in"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_said_before_anything_is_loaded(own_source, own_data, out, capsys, unloaded, monkeypatch, more, status, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train(own_source, own_data, out, *more) == status
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()


def test_what_is_in_the_output_stays(own_source, own_data, out, capsys, unloaded):
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert train(own_source, own_data, out) == 1
    assert "output: expected a missing or empty directory, got one with other content" in capsys.readouterr().err
    assert (out / "mine.txt").read_text() == "mine"


def test_a_name_without_an_owner_is_told_how_the_hub_writes_it(own_data, out, capsys, unloaded):
    assert train("bert-base-uncased", own_data, out) == 1
    said = capsys.readouterr().err
    assert "got bert-base-uncased; a model of the Hub is given as owner/name (google-bert/bert-base-uncased)" in said


def test_text_for_an_encoder_and_rows_for_what_has_no_classifier(own_source, own_data, tmp_path, out, capsys, unloaded):
    text = tmp_path / "a.txt"
    text.write_text("text")
    assert train(own_source, text, out) == 1
    assert "for BertConfig, which is no causal language model, got text" in capsys.readouterr().err
    config = transformers.CLIPConfig()
    (tmp_path / "clip").mkdir()
    config.save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / WEIGHTS).touch()
    assert train(tmp_path / "clip", own_data, out) == 1
    assert "expected one that can have a classifier, which rows with labels need, got CLIPConfig" in capsys.readouterr().err


def test_a_model_without_a_tokenizer(own_source, own_data, tmp_path, out, capsys, unloaded):
    bare = tmp_path / "bare"
    shutil.copytree(own_source, bare, ignore=shutil.ignore_patterns("token*"))
    assert train(bare, own_data, out) == 1
    assert f"model: expected a tokenizer's files in {bare}, found none" in capsys.readouterr().err


def test_several_processes_are_refused(own_source, own_data, out, capsys, unloaded, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train(own_source, own_data, out) == 1 and "apt_ext.hf.APTTrainer trains on several GPUs" in capsys.readouterr().err


def test_several_gpus_are_refused(own_source, own_data, out, capsys, unloaded, monkeypatch):
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 2)
    assert train(own_source, own_data, out) == 1 and "expected one GPU, got 2; choose one" in capsys.readouterr().err


def test_a_model_of_the_hub(own_source, own_data, out, capsys, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **more: asked.append(name) or str(own_source))
    assert train("owner/name", own_data, out, "--dry-run") == 0 and asked == ["owner/name"]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **more: 1 / 0)
    assert train("owner/name", own_data, out, "--dry-run") == 1
    assert "or a model of the Hub, got owner/name, which could not be fetched: ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["page.txt", "page.htm"])
def test_a_report_with_another_ending_is_refused(own_source, tmp_path, capsys, name):
    assert main(["report", str(own_source), "--output", str(tmp_path / name)]) == 1
    assert "output: expected a name that ends in .html, or a directory's without an ending" in capsys.readouterr().err
    assert not (tmp_path / name).exists()


def test_a_report_of_a_file_is_refused_in_words(own_data, capsys):
    assert main(["report", str(own_data)]) == 1
    assert f"got a file at {own_data}; `apt-ext train` makes one" in capsys.readouterr().err


def test_a_density_out_of_reach_says_what_the_floor_is(own_source, own_data, out, capsys, unloaded):
    assert train(own_source, own_data, out, "--density", "0.1") == 1
    said = capsys.readouterr().err
    assert "the floor is what always stays of a block" in said and "add a kind to prune (heads, hidden)" in said


@pytest.mark.parametrize("more", [["--max-rank", "16"], ["--growth", "1"]], ids=lambda more: more[0])
def test_what_is_advised_for_adafactor_works(own_source, own_data, out, more):
    assert train(own_source, own_data, out, "--trainer.optim", "adafactor", "--max-steps", "8", *more, "--dry-run") == 0
