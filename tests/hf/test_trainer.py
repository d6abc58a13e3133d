"""What a Controller in transformers' Trainer does to a run: density, logs, and the steps that it counts."""

import logging

import pytest
import torch
import transformers
from families import FAMILIES
from hf_runs import END, STEPS, arguments, built, callback, losses, rows_of, trainer
from torch import nn

import apt_ext
from apt_ext import Schedule, adapters
from apt_ext.hf import APTCallback, APTTrainer


class Seen(transformers.TrainerCallback):
    """Keeps what a callback that reports is given."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **_):
        self.logs.append(dict(logs))


def test_a_run_ends_at_its_density_and_logs_the_way(tmp_path):
    seen = Seen()
    run, apt = trainer(tmp_path, callbacks=[seen])  # it stands before ours, as Trainer's own reports do
    run.train()
    model, controller = run.model, apt.controller
    assert controller.done and not controller.listening and model.target_reached and model.density <= 0.8
    assert controller.total_steps == STEPS and controller.now == STEPS
    last = [entry for entry in run.state.log_history if "loss" in entry][-1]
    assert last["density"] == controller.density == model.density
    assert last["adapter_parameters"] == controller.adapter_parameters and last["rank_mean"] > 2
    assert last["rank_max"] == max(adapter.rank for _, adapter in adapters(model))
    assert last["kept_neurons"] == sum(block.count for block in model.blocks.values() if block.kind == "neurons")
    of_training = [entry for entry in seen.logs if "loss" in entry]
    assert len(of_training) == STEPS and all("density" in entry for entry in of_training)
    assert of_training[0]["density"] == 1.0 and of_training[0]["kept_neurons"] == 40
    assert all("density" not in entry for entry in seen.logs if "loss" not in entry)
    apt_ext.export(model, tmp_path / "small")
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    x = rows_of("llama")[0]["input_ids"][None]
    torch.testing.assert_close(small(input_ids=x).logits, model.eval()(input_ids=x).logits, rtol=1e-4, atol=1e-5)


def test_the_run_is_that_of_the_loop_by_hand(tmp_path):
    run, _ = trainer(tmp_path, model=built(lora_dropout=0.0), lr_scheduler_type="constant", max_grad_norm=0.0, optim="adamw_torch")
    batches = []
    run.compute_loss = lambda model, inputs, **_: batches.append(inputs) or model(**inputs).loss
    run.train()
    model = built(lora_dropout=0.0)
    optimizer = torch.optim.AdamW(apt_ext.adapter_parameters(model), lr=1e-2, weight_decay=0.0)
    ours = apt_ext.Controller(
        model, optimizer, STEPS, prune=["neurons"], density=0.8, round_to=4, schedule=Schedule(events=2, warm_up=1, end=END)
    )
    model.train()
    state = run.model.state_dict()
    for batch in batches:
        model(**batch).loss.backward()
        ours.observe()
        optimizer.step()
        optimizer.zero_grad()
        ours.step()
    assert ours.history == run.callback_handler.callbacks[0].controller.history
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
        {"activation_checkpointing": True},
        {"optim": "adamw_torch_fused"},
        {"optim": "sgd"},
        {"max_steps": -1, "num_train_epochs": 1},
        {"torch_empty_cache_steps": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_a_run_may_be(tmp_path, options):
    run, apt = trainer(tmp_path, **options)
    run.train()
    assert apt.controller.done and apt.controller.now == STEPS and run.model.density <= 0.8


def test_an_optimizer_that_cannot_follow_is_refused_before_the_first_step(tmp_path):
    run, apt = trainer(tmp_path, optim="adafactor")
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    with pytest.raises(ValueError, match="optimizer: expected one whose state can follow"):
        run.train()
    assert run.state.global_step == 0 and apt.controller is None
    assert all(torch.equal(value, before[key]) for key, value in run.model.state_dict().items())


def test_each_train_has_a_controller_of_its_own(tmp_path):
    run, apt = trainer(tmp_path)
    run.train()
    first, density = apt.controller, run.model.density
    run.train()
    assert apt.controller is not first and apt.controller.done and run.model.density == density
    assert first.steps == apt.controller.steps


def test_a_model_of_model_init_and_a_batch_size_that_does_not_fit(tmp_path):
    sizes = []

    def collate(rows):
        sizes.append(len(rows))
        if len(rows) > 2:
            raise RuntimeError("CUDA out of memory.")
        return transformers.default_data_collator(rows)

    more = {"model_init": lambda: built(), "data_collator": collate}
    run, apt = trainer(tmp_path, more=more, auto_find_batch_size=True, per_device_train_batch_size=4)
    run.train()
    assert sizes[0] == 4 and set(sizes[1:]) == {2} or 3 in sizes
    assert apt.controller.model is run.model and apt.controller.done and run.model.density <= 0.8


def test_the_rest_of_an_attempt_that_failed_is_taken_away(tmp_path):
    run, apt = trainer(tmp_path)
    calls = []

    def compute_loss(model, inputs, **_):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("interrupted")
        return model(**inputs).loss

    run.compute_loss = compute_loss
    with pytest.raises(RuntimeError, match="interrupted"):
        run.train()
    failed = apt.controller
    assert failed.listening
    run.train()
    assert not failed.listening and apt.controller is not failed and apt.controller.done


def test_a_run_that_ends_early_says_what_is_unfinished(tmp_path, caplog):
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 3

    run, apt = trainer(tmp_path, callbacks=[Stop()])
    with caplog.at_level(logging.WARNING, "apt_ext"):
        run.train()
    assert "ended after 3 of the 6 steps to the last event" in caplog.text and "resume_from_checkpoint" in caplog.text
    with pytest.raises(RuntimeError, match="not finished"):
        apt_ext.export(run.model, tmp_path / "small")


def test_generation_and_prediction_as_with_the_stock_model(tmp_path):
    name = "t5"
    model = built(name)
    options = arguments(tmp_path, transformers.Seq2SeqTrainingArguments, predict_with_generate=True, generation_max_length=6)
    rows = rows_of(name)
    run = transformers.Seq2SeqTrainer(model, options, train_dataset=rows, eval_dataset=rows[:3], callbacks=[callback(density=0.8)])
    run.train()
    ids = torch.stack([row["input_ids"] for row in rows[:3]])
    expected = model.eval().generate(input_ids=ids, attention_mask=torch.stack([row["attention_mask"] for row in rows[:3]]), max_length=6)
    found = torch.as_tensor(run.predict(rows[:3]).predictions)
    assert torch.equal(found[:, : expected.shape[1]], expected)


def test_apt_trainer_is_the_same(tmp_path):
    by_callback, _ = trainer(tmp_path / "a")
    by_callback.train()
    options = {"prune": ["neurons"], "density": 0.8, "round_to": 4, "schedule": Schedule(events=2, warm_up=1, end=END)}
    for apt in (options, APTCallback(**options)):
        model = built()
        run = APTTrainer(model, arguments(tmp_path / "b"), train_dataset=rows_of("llama"), apt=apt)
        assert run.controller is None
        run.train()
        assert run.controller is run.apt.controller and run.controller.done
        assert losses(run) == losses(by_callback)
        assert all(torch.equal(value, by_callback.model.state_dict()[key]) for key, value in model.state_dict().items())
    assert isinstance(run.model, nn.Module) and type(run.model).__name__ == type(FAMILIES["llama"].model()).__name__
