"""The training of `apt-ext train`: transformers' Trainer with a Controller, what it says, and how a signal ends it at a whole step."""

from __future__ import annotations

import dataclasses
import math
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

import torch

import apt_ext

from ..common import own_capture
from ..config import nearest
from ..method import Distiller
from ..optim.initial_state import state_starts
from ..storage import state_directory
from .data import Missing, Misuse
from .messages import logger
from .models import transformers_offline
from .processes import Stopped
from .train_checks import DISTILLER
from .train_options import TrainOptions
from .train_task import Learned

DISTILLED = 0.75  # of the steps; from there on the task's loss alone, as in docs/results.md
_LINES = 20  # that a run says of its loss
_CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")  # the name before transformers 5.20


def total_steps(options: TrainOptions, rows: int) -> int:
    """Optimizer steps of the run, as Trainer counts them."""
    if options.max_steps is not None:
        return options.max_steps
    return max(math.ceil(options.epochs * steps_an_epoch(options, rows)), 1)


def steps_an_epoch(options: TrainOptions, rows: int) -> int:
    """Optimizer steps of a pass over the data."""
    return max(math.ceil(math.ceil(rows / options.batch) / options.gradient_accumulation), 1)


def evaluations(options: TrainOptions, rows: int) -> int:
    """How often the run evaluates, once before it begins included."""
    each = options.eval_steps or steps_an_epoch(options, rows)
    return total_steps(options, rows) // each + 2


def arguments(options: TrainOptions, task: Learned, output: Path) -> Any:
    """TrainingArguments; Misuse for a further field that there is not, or that it refuses."""
    transformers = transformers_offline()
    known = [field.name for field in dataclasses.fields(transformers.TrainingArguments)]
    for name in options.trainer:
        if name == "output_dir":
            raise Misuse("trainer: expected --output DIR, which is where checkpoints go, got output_dir")
        if name not in known:
            raise Misuse(f"trainer: expected fields of TrainingArguments, got {name!r}{nearest(name, known)}")
    _check_integrations(options.report_to or [])
    every = "steps" if options.eval_steps else "epoch"
    save = "steps" if options.save_steps or options.eval_steps else "epoch"
    stopping: dict[str, Any] = {}
    if options.early_stopping is not None:
        measure = "loss" if task.measure == "perplexity" else task.measure
        stopping = {"load_best_model_at_end": True, "metric_for_best_model": measure, "greater_is_better": task.better == "higher"}
    values = {
        "output_dir": str(output),
        "num_train_epochs": options.epochs,
        "max_steps": options.max_steps or -1,
        "per_device_train_batch_size": options.batch,
        "per_device_eval_batch_size": options.batch,
        "gradient_accumulation_steps": options.gradient_accumulation,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": options.warmup,
        "weight_decay": options.weight_decay,
        "bf16": options.bf16,
        "fp16": options.fp16,
        "seed": options.seed,
        "eval_strategy": every,
        "eval_steps": options.eval_steps,
        "save_strategy": save,
        "save_steps": options.save_steps or options.eval_steps or 500,
        "save_total_limit": 2,
        "logging_steps": max(total_steps(options, len(task.train)) // _LINES, 1),
        "report_to": options.report_to or "none",
        "dataloader_num_workers": options.workers,
        "dataloader_pin_memory": torch.cuda.is_available() and options.device != "cpu",
        "use_cpu": options.device == "cpu",
        "disable_tqdm": not sys.stderr.isatty(),
        "prediction_loss_only": task.metrics is None,
        **({next(name for name in _CHECKPOINTING if name in known): True} if options.gradient_checkpointing else {}),
        **stopping,
        **options.trainer,
    }
    try:
        given = transformers.TrainingArguments(**values)
    except (TypeError, ValueError, ImportError) as error:
        raise Misuse(f"trainer: {' '.join(str(error).split())}") from error
    if given.n_gpu > 1:
        raise Missing(f"device: expected one GPU, got {given.n_gpu}; choose one, as with CUDA_VISIBLE_DEVICES=0 before the command")
    return given


def check_optimizer(options: TrainOptions, given: Any) -> None:
    """Missing for an optimizer whose package is not there, or whose state cannot follow ranks that grow, which the Controller refuses."""
    try:
        kind, more = transformers_offline().Trainer.get_optimizer_cls_and_kwargs(given)
        one = kind([torch.nn.Parameter(torch.zeros(1))], **more)
    except ImportError as error:
        raise Missing(f"trainer.optim: {' '.join(str(error).split())}") from error
    except Exception:  # it wants the model itself, which is not there yet
        return
    if options.growth > 1 and options.max_rank is None and state_starts(one) is None:
        name = getattr(given.optim, "value", given.optim)
        raise Missing(
            f"trainer.optim: expected one whose state can follow ranks that grow (adamw_torch, sgd), got {name}; reserve the room "
            f"with --max-rank {4 * options.rank}, or let no rank grow with --growth 1"
        )


def _check_integrations(names: list[str]) -> None:
    """Misuse for a name that transformers does not report to, Missing where its package is not there."""
    from transformers.integrations import integration_utils

    library: Any = integration_utils
    known, there = list(library.INTEGRATION_TO_CALLBACK), library.get_available_reporting_integrations()
    for name in names:
        if name not in ("none", "all", *known):
            raise Misuse(f"report-to: expected some of {', '.join(known)}, got {name!r}{nearest(name, known)}")
        if name in known and name not in there:
            raise Missing(f"report-to: expected {name} to be installed, found it not; run: python -m pip install {name}")


def controller_arguments(options: TrainOptions) -> dict[str, Any]:
    """What the Controller takes beside the model's own config."""
    names = ("density", "budget", "joint", "floor", "export", "growth", "decay", "kurtosis", "shrink", "seed")
    return {name: getattr(options, name) for name in names} | ({"length": options.length} if options.length else {})


def trainer_for(
    model: Any, options: TrainOptions, task: Learned, tokenizer: Any, given: Any, stopping: Any = None, distiller: Distiller | None = None
) -> Any:
    """An APTTrainer of this model, which says what it does by the logger."""
    transformers = transformers_offline()
    from ..hf import APTTrainer

    more: dict[str, Any] = {}
    callbacks = [_reporter(), *([stopping] if stopping is not None else [])]
    if options.early_stopping is not None:
        callbacks.append(transformers.EarlyStoppingCallback(options.early_stopping))
    kind: Any = APTTrainer
    if distiller is not None:
        kind, more = _distilling(APTTrainer), {"distiller": distiller}
    trainer = kind(
        model=model,
        args=given,
        train_dataset=task.train,
        eval_dataset=task.validation,
        compute_metrics=task.metrics,
        data_collator=task.few_lengths if given.device.type == "cuda" else task.collator,
        processing_class=tokenizer,
        callbacks=callbacks,
        apt=controller_arguments(options),
        **more,
    )
    return _quiet(trainer)


def stock_trainer(model: Any, task: Learned, given: Any) -> Any:
    """transformers' own Trainer, to train a teacher or to evaluate."""
    kind = transformers_offline().Trainer
    data = {"train_dataset": task.train, "eval_dataset": task.validation, "data_collator": task.collator}
    return _quiet(kind(model, given, compute_metrics=task.metrics, **data))


def _quiet(trainer: Any) -> Any:
    """The same trainer: its losses are said by the logger and not printed, its bar stays where there is a terminal."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    class Bar(ProgressCallback):
        """The progress bar alone."""

        def on_log(self, *_: Any, **__: Any) -> None:
            """Say nothing: the logger does."""

    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(Bar)
    return trainer


def _reporter() -> Any:
    """A callback that says, in one line each, what Trainer logs."""

    class Reporter(transformers_offline().TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            shown = [
                f"{name.removeprefix('eval_')} {value:.4g}"
                for name, value in (logs or {}).items()
                if isinstance(value, int | float) and not name.endswith(("_runtime", "_per_second", "_time", "total_flos"))
            ]
            what = "evaluation" if any(name.startswith("eval_") for name in logs or {}) else "training"
            logger.info("step %d of %d, %s: %s", state.global_step, state.max_steps, what, ", ".join(shown))

    return Reporter()


# -- signals -----------------------------------------------------------------------------------------------------------


def stopping_callback() -> Any:
    """A callback that ends training after a whole step, with a checkpoint, once `asked` is the number of a signal."""

    class Stopping(transformers_offline().TrainerCallback):  # type: ignore[misc]
        asked: int | None = None

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.asked is not None:
                control.should_save = control.should_training_stop = True
                control.should_evaluate = False

        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """Stop within an epoch without its evaluation, which would draw random numbers that a whole run does not."""
            if self.asked is not None:
                control.should_save = control.should_evaluate = False

    return Stopping()


@contextmanager
def stopped_after_a_step(stopping: Any) -> Iterator[None]:
    """Within this context the first signal asks `stopping` to end training, and the second one ends it at once.

    Raises Stopped where training ended so.
    """
    if current_thread() is not main_thread():
        yield
        return
    before: dict[int, Any] = {}

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    def ask(number: int, frame: Any) -> None:
        stopping.asked = number
        logger.info("%s: a checkpoint is written after this step; a second signal ends the run at once", signal.Signals(number).name)
        restore()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, ask)
    try:
        yield
    finally:
        restore()
    if stopping.asked is not None:
        raise Stopped(stopping.asked)


# -- a teacher ---------------------------------------------------------------------------------------------------------


def _distilling(base: type) -> type:
    """A trainer class whose loss passes from the task's to the teacher's while the model is pruned, and back in the last quarter."""

    class DistillingTrainer(base):  # type: ignore[misc]
        loss_is_graphable = True

        def __init__(self, *args: Any, distiller: Distiller, **more: Any) -> None:
            super().__init__(*args, **more)
            self.distiller, self.refreshed = distiller, False
            self.model_accepts_loss_kwargs = False  # a distillation's loss is a mean
            self.add_callback(_keeper(self))

        def create_optimizer(self, *args: Any, **more: Any) -> Any:
            made = self.optimizer is None
            optimizer = super().create_optimizer(*args, **more)
            if made and self.distiller.parameters():
                optimizer.add_param_group({"params": self.distiller.parameters(), "weight_decay": 0.0})
            return optimizer

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
            taught = model.training and self._weight() > 0.0
            own_capture.before_each_replay(check=lambda: None if taught == (self._weight() > 0.0) else "a teacher takes part, or no more")
            if not taught:
                return super().compute_loss(model, inputs, return_outputs, **more)
            if self.distiller.own and not self.refreshed:
                self.distiller.refresh()  # what has been learned before pruning started
            self.refreshed = True
            outputs = model(**inputs, **self.distiller.asks)
            loss = self.distiller.loss(inputs, outputs, self._weight)
            return (loss, outputs) if return_outputs else loss

        def _weight(self) -> float:
            controller = self.apt.controller
            if controller is None or self.state.global_step >= DISTILLED * self.state.max_steps:
                return 0.0
            return float(controller.progress)

    return DistillingTrainer


def _keeper(trainer: Any) -> Any:
    """A callback that puts the distiller's state into every checkpoint, and clears its gradients, of which Trainer does not know."""

    class Keeper(transformers_offline().TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            for parameter in trainer.distiller.parameters():
                parameter.grad = None

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            place = Path(args.output_dir) / f"checkpoint-{state.global_step}" / DISTILLER
            state_directory.save(place, {"distiller": trainer.distiller.state_dict(), "refreshed": trainer.refreshed})

    return Keeper()


def load_distiller(trainer: Any, checkpoint: Path) -> None:
    """Go on from what a checkpoint holds of the distiller, before the model loads its own part."""

    def take(state: dict[str, Any]) -> None:
        trainer.distiller.load_state_dict(state["distiller"])
        trainer.refreshed = bool(state["refreshed"])

    state_directory.load(checkpoint / DISTILLER, take)


def kept_of(model: apt_ext.APTModel) -> dict[str, dict[str, list[int]]]:
    """{kind: {"before", "after": how many in each layer}}."""
    kinds = dict.fromkeys(block.kind for block in model.blocks.values())
    full = model.blocks.full
    left = {name: int((model.get_block_mask(name) != 0).sum()) for name in model.blocks}
    names = {kind: [name for name, block in model.blocks.items() if block.kind == kind] for kind in kinds}
    return {kind: {"before": [full[name] for name in these], "after": [left[name] for name in these]} for kind, these in names.items()}
