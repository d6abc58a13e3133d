"""Trainer checkpoints of an APTModel: what is in them, going on from each of them bit for bit, and which one is the best."""

import logging
import shutil

import pytest
import torch
import transformers
from families import FAMILIES
from hf_runs import END, STEPS, built, losses, rows_of, trainer
from safetensors.torch import load_file

from apt_ext import APTModel, Schedule
from apt_ext.hf import APTTrainer
from apt_ext.wrapping import run_state

# name of the family: what its Controller prunes, and how
RUNS = {
    "llama": {"prune": ["heads", "neurons"], "density": 0.6},
    "bert": {"prune": ["heads", "neurons", "hidden"], "density": 0.6},
    "t5": {"prune": ["heads", "neurons"], "density": 0.7, "shrink": "compact"},
    "gpt2": {"prune": ["neurons", "hidden"], "density": 0.7},  # its embeddings are the output layer's, too
}


def whole(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{family: (Trainer, state of its model, directory)} of whole runs that saved each step."""
    found = {}

    def of(name):
        if name not in found:
            path = tmp_path_factory.mktemp(name)
            run, _ = trainer(path, name, apt=RUNS[name], save_strategy="steps", save_steps=1)
            run.train()
            found[name] = run, whole(run.model), path
        return found[name]

    return of


@pytest.mark.parametrize("name", list(RUNS))
@pytest.mark.parametrize("step", [1, 3, 4, END, STEPS - 1])
def test_a_run_goes_on_bit_for_bit_from_any_checkpoint(runs, tmp_path, name, step):
    run, state, path = runs(name)
    other, apt = trainer(tmp_path, name, apt=RUNS[name])
    other.train(resume_from_checkpoint=str(path / f"checkpoint-{step}"))
    assert losses(other, step) == losses(run, step)
    found = other.model.state_dict()
    assert found.keys() == state.keys() and [key for key in state if not torch.equal(found[key], state[key])] == []
    ours, theirs = run.optimizer.state_dict()["state"], other.optimizer.state_dict()["state"]
    assert all(torch.equal(ours[i][key], theirs[i][key]) for i in ours for key in ours[i])
    assert apt.controller.history == run.callback_handler.callbacks[0].controller.history


def test_a_checkpoint_holds_the_models_own_state_once(runs, tmp_path):
    run, state, path = runs("gpt2")
    directory = path / f"checkpoint-{STEPS}"
    tensors = load_file(directory / "model.safetensors")
    trained = [name for name, parameter in run.model.named_parameters() if parameter.requires_grad]
    assert trained and all(torch.equal(tensors[name], state[name]) for name in trained)
    assert not [key for key in tensors if ".base_layer." in key or key.endswith("wte.weight")]
    assert {"target", "original.hidden", "controller.values", "apt_format"} <= tensors.keys()
    names = sorted(file.name for file in directory.iterdir())
    assert names == sorted(
        ["apt_config.json", "apt_manifest.json", "config.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt"]
        + ["trainer_state.json", "training_args.bin"]
    )
    torch.manual_seed(0)
    again = APTModel.from_pretrained(FAMILIES["gpt2"].model(dtype=torch.float32), directory)
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    assert again.target_reached and again.controller_state["step"] == STEPS and again.trained_by == 1
    for kind in (transformers.GPT2LMHeadModel, transformers.AutoModelForCausalLM):  # never random weights
        with pytest.raises(OSError, match="adapters-alone-APTModel.from_pretrained-reads-them"):
            kind.from_pretrained(directory)
    again.save_pretrained(tmp_path)  # without Trainer's arguments, the three files
    assert sorted(file.name for file in tmp_path.iterdir()) == ["apt_config.json", "apt_manifest.json", "apt_model.safetensors"]
    again.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    with pytest.raises(RuntimeError, match="push_to_hub"):
        again.save_pretrained(tmp_path / "none", push_to_hub=True)


def test_a_checkpoint_is_read_as_it_was_written(runs, tmp_path):
    _, _, path = runs("llama")
    tensors = load_file(path / "checkpoint-4" / "model.safetensors")
    model = built()
    before = whole(model)
    for key, value, words in (
        ("apt_format", torch.tensor([9, 1]), r"apt_format: expected \[1, processes\]"),
        ("controller.values", torch.tensor([1, 2], dtype=torch.uint8), "expected JSON in controller.values"),
        ("controller.values", torch.tensor([1.0]), "expected controller.values as a Tensor of torch.uint8"),
        ("controller.values", torch.tensor(list(b"[1]"), dtype=torch.uint8), 'expected "state" to be a dict'),
        ("model.model.layers.0.mlp.up_proj.lora_A", None, "expected the tensors of this model: 1 missing"),
        ("model.model.layers.0.mlp.up_proj.other", torch.ones(1), "expected the tensors of this model: 0 missing"),
    ):
        damaged = {**tensors, key: value} if value is not None else {name: v for name, v in tensors.items() if name != key}
        with pytest.raises(ValueError, match=words):
            model.load_state_dict(run_state.signed(damaged), False)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and model.controller_state is None
    changed = {**tensors, "model.model.layers.0.mlp.up_proj.lora_A": tensors["model.model.layers.0.mlp.up_proj.lora_A"] + 1}
    for damaged in (changed, {key: value for key, value in tensors.items() if key != "apt_sha256"}):
        with pytest.raises(ValueError, match="expected the tensors that were saved, by their SHA-256, got others"):
            model.load_state_dict(damaged, False)
    for other in ({"r": 4}, {"lora_alpha": 64}):
        with pytest.raises(ValueError, match=r"expected adapters of the scalings of this model \(lora_alpha / r\), .* got 8; make"):
            built(**other).load_state_dict(tensors, False)
    assert model.load_state_dict(tensors, False) == ([], [])
    (path / "checkpoint-4").rename(tmp_path / "moved")
    file = tmp_path / "moved" / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match="SHA-256"):
        APTModel.from_pretrained(FAMILIES["llama"].model(), tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved")


def test_a_checkpoint_of_another_run_is_refused_in_words(tmp_path, caplog):
    plain = transformers.Trainer(built(), trainer(tmp_path / "x")[0].args, train_dataset=rows_of("llama"))
    plain.args.save_strategy, plain.args.save_steps = "steps", 4
    plain.train()
    checkpoint = str(tmp_path / "x" / "checkpoint-4")
    run, _ = trainer(tmp_path / "y")
    with pytest.raises(RuntimeError, match="resume_from_checkpoint: expected a checkpoint with a Controller's state"):
        run.train(resume_from_checkpoint=checkpoint)
    saved, _ = trainer(tmp_path / "z", save_strategy="steps", save_steps=4)
    saved.train()
    checkpoint = str(tmp_path / "z" / "checkpoint-4")
    others = (
        {"density": 0.9},
        {"schedule": Schedule(events=3, warm_up=1, end=END)},
        {"prune": ["heads"]},
        {"round_to": 2},
        {"growth": 2.0},
    )
    for other in others:
        run, apt = trainer(tmp_path / "y", apt=other)
        with pytest.raises(ValueError, match="resume_from_checkpoint: the Controller of this run is not that of the checkpoint"):
            run.train(resume_from_checkpoint=checkpoint)
        assert not apt.controller.listening
    run, _ = trainer(tmp_path / "y")
    run.model.load_state_dict(load_file(f"{checkpoint}/model.safetensors"), False)
    run.model.trained_by, load = 2, run.model.load_state_dict
    run.model.load_state_dict = lambda *args: (load(*args), setattr(run.model, "trained_by", 2))[0]
    with caplog.at_level(logging.WARNING, "apt_ext"):
        run.train(resume_from_checkpoint=checkpoint)
    assert "2 process(es) wrote the checkpoint and 1 go on" in caplog.text


def run_with_metrics(path, values, **options):
    """A Trainer that evaluates every step, to `values` one after another, which are the better the higher."""
    given = iter(values)
    more = {"compute_metrics": lambda _: {"score": next(given)}}
    defaults = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
    return trainer(path, more=more, **{**defaults, **best, **options})


def test_the_best_checkpoint_is_one_of_the_finished(tmp_path):
    run, apt = run_with_metrics(tmp_path, [9, 8, 7, 6, 5, 1, 3, 2])
    run.train()
    assert run.state.best_metric == 3 and run.state.best_global_step == 7
    assert run.state.best_model_checkpoint.endswith("checkpoint-7")
    tensors = load_file(tmp_path / "checkpoint-7" / "model.safetensors")
    state = run.model.state_dict()
    own = [name for name in tensors if name.startswith("model.")]
    assert own and all(torch.equal(tensors[name], state[name]) for name in own) and run.model.target_reached
    other, _ = run_with_metrics(tmp_path / "other", [2, 1])  # gone on after the last event: what counted still does
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert other.state.best_metric == 2 and other.state.best_global_step == 7


@pytest.mark.parametrize("kind", [transformers.Trainer, APTTrainer])
def test_patience_is_held_until_the_last_event(tmp_path, kind):
    stopping = transformers.EarlyStoppingCallback(early_stopping_patience=1)
    run, apt = run_with_metrics(tmp_path, [9, 8, 7, 6, 5, 4, 3, 2], callbacks=[stopping], kind=kind)
    run.train()
    assert run.state.global_step == END + 1 and apt.controller.done
    assert run.state.best_global_step == END


def test_checkpoints_before_the_last_event_may_be_deleted(tmp_path):
    run, _ = run_with_metrics(tmp_path, [9, 8, 7, 6, 5, 1, 3, 2], save_total_limit=1)
    run.train()
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith("checkpoint")] == ["checkpoint-7"]


def test_a_model_without_a_controller_goes_on_too(tmp_path):
    """Dense LoRA: Trainer alone, no callback."""

    def dense(path):
        run, _ = trainer(path, save_strategy="steps", save_steps=4)
        run.callback_handler.callbacks.pop(0)
        return run

    run = dense(tmp_path / "a")
    run.train()
    other = dense(tmp_path / "b")
    other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert losses(other, 4) == losses(run, 4)
    assert all(torch.equal(value, other.model.state_dict()[key]) for key, value in run.model.state_dict().items())
    assert isinstance(run.model, transformers.PreTrainedModel)


def test_a_longer_run_keeps_the_schedule_that_it_began_with(tmp_path, caplog):
    apt = {"schedule": Schedule(events=2)}  # shares of the run
    run, first = trainer(tmp_path, apt=apt, save_strategy="steps", save_steps=2)
    run.train()
    other, again = trainer(tmp_path / "other", apt=apt, max_steps=STEPS + 4)
    with caplog.at_level(logging.WARNING, "apt_ext"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert f"begun with {STEPS} steps and goes on to {STEPS + 4}" in caplog.text
    assert again.controller.steps == first.controller.steps and again.controller.done
    assert other.state.global_step == STEPS + 4


def test_accelerates_own_states_with_layers_without_a_rank(tmp_path):
    """It takes empty factors for shared memory, and leaves them out."""
    import accelerate

    for hidden in (False, True):
        model = built(target_modules=["q_proj"])
        if hidden:
            model.set_block_mask("hidden", (torch.arange(24) < 16).float())
        accelerator = accelerate.Accelerator(cpu=True)
        accelerator.prepare(model)
        accelerator.save_state(str(tmp_path / str(hidden)))
        other = accelerate.Accelerator(cpu=True).prepare(built(target_modules=["q_proj"]))
        with torch.no_grad():
            other.model.model.layers[0].self_attn.q_proj.lora_B.add_(1.0)
        loader = accelerate.Accelerator(cpu=True)
        loader._models = [other]
        loader.load_state(str(tmp_path / str(hidden)))
        found = other.state_dict()
        assert all(torch.equal(value, found[key]) for key, value in model.state_dict().items())
