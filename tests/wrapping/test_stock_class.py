"""A wrapper that looks like the stock model: what Trainer computes with it is what it computes with the model itself."""

import copy
import inspect
import io
import pickle

import pytest
import torch
import transformers
from families import FAMILIES
from torch import nn
from training import batch_for

from apt_ext import APTConfig, APTModel, get_apt_model
from apt_ext.model import adapters

NAMES = ["bert", "llama", "t5"]


def built(name, **config):
    return get_apt_model(FAMILIES[name].model(dtype=torch.float32), APTConfig(r=2, **config))


@pytest.mark.parametrize("name", NAMES)
def test_name_and_signature_are_those_of_the_model_inside(name):
    apt = built(name)
    stock = type(apt.model)
    assert isinstance(apt, APTModel) and type(apt).__name__ == apt._get_name() == stock.__name__ and not isinstance(apt, stock)
    assert inspect.signature(apt.forward) == inspect.signature(apt.model.forward)
    assert inspect.signature(type(apt).forward) == inspect.signature(stock.forward)
    assert type(built(name)) is type(apt) and APTModel.__name__ == "APTModel"


@pytest.mark.parametrize("way", ["deepcopy", "copy", "pickle", "torch.save"])
def test_copies_are_of_that_class_too(way):
    apt = built("bert")
    if way == "torch.save":
        file = io.BytesIO()
        torch.save(apt, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    else:
        ways = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": lambda one: pickle.loads(pickle.dumps(one))}  # noqa: S301
        other = ways[way](apt)
    assert type(other) is type(apt) and inspect.signature(other.forward) == inspect.signature(apt.model.forward)
    batch = batch_for(FAMILIES["bert"], 0)
    assert torch.equal(other(**batch).loss, apt(**batch).loss)
    assert [n for n, _ in adapters(other)] == [n for n, _ in adapters(apt)]


def test_a_model_of_no_library_and_a_subclass_of_ours():
    class Mine(APTModel):
        pass

    apt = get_apt_model(nn.Sequential(nn.Linear(4, 4)), APTConfig(r=2))
    assert type(apt).__name__ == "Sequential" and apt(torch.ones(1, 4)).shape == (1, 4)
    other = Mine(apt.model, apt.apt_config, apt.blocks, apt.saved)
    assert isinstance(other, Mine) and type(other).__name__ == "Sequential" and type(other) is not type(apt)


def results(model, rows, path, columns, **options):
    """What is logged of two steps and an evaluation."""
    arguments = transformers.TrainingArguments(
        path, max_steps=2, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, seed=0, **options
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    found = trainer.evaluate()
    predicted = trainer.predict(rows)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    columns.append(trainer.label_names)
    return losses, found["eval_loss"], predicted.metrics["test_loss"], [torch.as_tensor(p) for p in _flat(predicted.predictions)]


def _flat(predictions):
    return [one for part in predictions for one in _flat(part)] if isinstance(predictions, tuple | list) else [predictions]


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing_factor": 0.1}, {"gradient_accumulation_steps": 2}], ids=["plain", "smooth", "twice"]
)
@pytest.mark.parametrize("name", NAMES)
def test_trainer_computes_what_it_computes_with_the_model_inside(tmp_path, name, options):
    """Labels, columns that the model does not take, label smoothing, evaluation and prediction, without further arguments."""
    batch = batch_for(FAMILIES[name], 0)
    rows = [{**{key: value[i % 3] for key, value in batch.items()}, "note": torch.tensor(i)} for i in range(8)]
    columns = []
    torch.manual_seed(0)
    ours = results(built(name).eval(), rows, tmp_path / "ours", columns, per_device_train_batch_size=2, **options)
    torch.manual_seed(0)
    theirs = results(built(name).eval().model, rows, tmp_path / "theirs", columns, per_device_train_batch_size=2, **options)
    assert columns[0] == columns[1] == ["labels"]
    assert ours[:3] == theirs[:3]
    assert all(torch.equal(one, other) for one, other in zip(ours[3], theirs[3], strict=True))


def test_what_is_read_from_the_model_is_written_to_it():
    apt = built("llama")
    config = copy.deepcopy(apt.config)
    apt.config = config
    apt.generation_config = transformers.GenerationConfig(max_new_tokens=3, eos_token_id=None)
    assert apt.model.config is config and apt.generation_config is apt.model.generation_config
    x = batch_for(FAMILIES["llama"], 0)["input_ids"][:1]
    assert apt.generate(x).shape[1] == x.shape[1] + 3
    apt.resize_token_embeddings(64)
    assert apt.config.vocab_size == 64
    apt.note = "of the wrapper"
    assert vars(apt)["note"] == "of the wrapper" and "note" not in vars(apt.model)
    assert isinstance(apt, transformers.PreTrainedModel) and apt.main_input_name == apt.model.main_input_name
    assert type(apt).config_class is type(apt.model).config_class
    assert apt.half() is apt and apt.lm_head.weight.dtype == torch.float16
