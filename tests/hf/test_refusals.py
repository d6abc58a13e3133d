"""What APTCallback and APTTrainer refuse, in words and before anything is trained."""

import re

import pytest
import transformers
from families import FAMILIES
from hf_runs import arguments, built, callback, rows_of

from apt_ext.hf import APTCallback, APTTrainer


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"densty": 0.5}, "densty: expected an argument of apt_ext.Controller, got another; nearest: density"),
        ({"total_steps": 5}, "total_steps: expected no such argument, because the run gives it, got 5"),
        ({"optimizer": None}, "optimizer: expected no such argument"),
    ],
)
def test_arguments(given, words):
    with pytest.raises(TypeError, match=re.escape(words)):
        APTCallback(**given)


def test_a_model_without_adapters_and_the_model_inside(tmp_path):
    stock = FAMILIES["llama"].model()
    with pytest.raises(TypeError, match="model: expected an APTModel, got a LlamaForCausalLM; make one with"):
        transformers.Trainer(stock, arguments(tmp_path), callbacks=[callback()])
    inside = built().model
    for make in (lambda: transformers.Trainer(inside, arguments(tmp_path), callbacks=[callback()]), lambda: APTTrainer(inside)):
        with pytest.raises(TypeError, match="got a LlamaForCausalLM; give it the APTModel, not the model inside"):
            make()


@pytest.mark.parametrize(("name", "value"), [("hf_deepspeed_config", {"train_batch_size": 2}), ("_n_gpu", 2)])
def test_runs_whose_gradients_nobody_sees(tmp_path, name, value):
    options = arguments(tmp_path)
    setattr(options, name, value)
    run = transformers.Trainer(built(), arguments(tmp_path), train_dataset=rows_of("llama"), callbacks=[])
    with pytest.raises(RuntimeError, match="deepspeed: expected no DeepSpeed|n_gpu: expected one device a process, got 2"):
        callback().on_init_end(options, run.state, run.control, model=run.model)


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"apt": 3}, TypeError, "apt: expected a dict of a Controller's arguments, an APTCallback or None, got int"),
        ({"apt": {"densty": 1}}, TypeError, "densty"),
        ({"graph": "on"}, ValueError, 'graph: expected "auto", True or False'),
        ({"apt": {}, "callbacks": [callback()]}, ValueError, "apt: expected one APTCallback, got another among the 1 of callbacks"),
        ({"callbacks": [callback(), callback()]}, ValueError, "apt: expected one APTCallback, got another among the 2 of callbacks"),
    ],
)
def test_apt_trainer(tmp_path, given, kind, words):
    with pytest.raises(kind, match=re.escape(words)):
        APTTrainer(built(), arguments(tmp_path), train_dataset=rows_of("llama"), **given)


def test_one_among_the_callbacks_is_taken(tmp_path):
    apt = callback()
    run = APTTrainer(built(), arguments(tmp_path), train_dataset=rows_of("llama"), callbacks=[apt])
    assert run.apt is apt and run.callback_handler.callbacks.count(apt) == 1 and run.callback_handler.callbacks[0] is apt
