"""Short runs of transformers' Trainer with a tiny model."""

import torch
import transformers
from families import FAMILIES
from training import batch_for

from apt_ext import APTConfig, Schedule, get_apt_model
from apt_ext.hf import APTCallback

STEPS, END = 8, 6
SCHEDULE = Schedule(events=2, warm_up=1, end=END)


def built(name="llama", seed=0, sizes=None, **config):
    """An APTModel with dropout in its adapters."""
    torch.manual_seed(seed)
    model = FAMILIES[name].model(dtype=torch.float32, **(sizes or {}))
    return get_apt_model(model, APTConfig(**{"r": 2, "lora_dropout": 0.1, **config}))


def rows_of(name, count=16):
    batch = batch_for(FAMILIES[name], 0)
    return [{key: value[i % 3] for key, value in batch.items()} for i in range(count)]


def arguments(path, kind=transformers.TrainingArguments, **options):
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return kind(path, **{**defaults, **options})


def callback(**options):
    return APTCallback(**{"prune": ["neurons"], "density": 0.8, "round_to": 4, "schedule": SCHEDULE, **options})


def trainer(path, name="llama", model=None, apt=None, callbacks=(), kind=transformers.Trainer, more=None, **options):
    """A Trainer with an APTCallback; `apt` are its arguments, `options` the TrainingArguments, `more` the Trainer's."""
    apt = callback(**(apt or {})) if not isinstance(apt, APTCallback) else apt
    more = {"train_dataset": rows_of(name), "eval_dataset": rows_of(name, 4), **(more or {})}
    if "model_init" not in more:
        more["model"] = built(name) if model is None else model
    made = kind(args=arguments(path, **options), callbacks=[*callbacks, apt], **more)
    return made, apt


def losses(one, after=0):
    return [entry["loss"] for entry in one.state.log_history if "loss" in entry and entry["step"] > after]
