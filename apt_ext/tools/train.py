"""`apt-ext train`: from a pretrained model and the user's own file to a smaller model, a report, and what it cost."""

from __future__ import annotations

import copy
import os
import platform
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import apt_ext

from ..method import Distiller
from .data import Missing
from .forecast import forecast, timed_steps, told
from .measuring import commit_here, disk_bytes, throughput
from .messages import logger, steps_on_stderr
from .models import check_length, check_weights, class_of, empty_model, load, load_stock, package_file, transformers_offline
from .own_data import is_text
from .places import directory_for, directory_of, read_json, replace_json
from .processes import Stopped
from .train_checks import (
    CHECKPOINTS,
    MODEL,
    RECORD,
    REPORT,
    TEACHER,
    check_controller,
    check_output,
    checkpoint_of,
    checkpoints,
    config_of,
    fingerprint,
    kind_of,
    tokenizer_of,
)
from .train_options import TrainOptions, resuming
from .train_run import (
    arguments,
    check_optimizer,
    evaluations,
    kept_of,
    load_distiller,
    stock_trainer,
    stopped_after_a_step,
    stopping_callback,
    total_steps,
    trainer_for,
)
from .train_task import Learned, learned_from, scores_of, timed_batches

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Enough(Exception):
    """A dry run ends here."""


@dataclass(frozen=True)
class _Run:
    """What all parts of a run need.

    kind   the auto class of transformers that learns the task
    given  TrainingArguments
    words  the command line, for the advice how to go on
    """

    options: TrainOptions
    path: Path
    kind: Any
    task: Learned
    tokenizer: Any
    given: Any
    steps: int
    output: Path
    words: Sequence[str]

    def load(self) -> Any:
        """The model as it was before, with a head for the task."""
        model = load(self.path, self.kind, head=self.task.has_head, dtype=_DTYPES[self.options.dtype], **self.task.config())
        if model.config.pad_token_id is None and self.task.has_head:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        return model


def train(options: TrainOptions, words: Sequence[str]) -> dict[str, Any] | None:
    """Train, prune, export and compare; returns what was found, None of a dry run.

    words  the command line, for the advice how to go on

    Arguments, files, and what the model's shapes decide are checked before a model is loaded. Raises Missing and Misuse in words, and
    Stopped with the advice.
    """
    assert options.output is not None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise Missing("train: expected one process, got WORLD_SIZE above 1; a script with apt_ext.hf.APTTrainer trains on several GPUs")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise Missing("device: expected a CUDA device that torch can use, found none")
    with steps_on_stderr(), suppress(_Enough), directory_for("output", options.output):
        with directory_of("json", options.json) if options.json is not None else nullcontext():
            return _train(options, options.output, words)
    return None


def _train(options: TrainOptions, output: Path, words: Sequence[str]) -> dict[str, Any]:
    check_output(output, options.resume)
    path = package_file(str(options.model))
    transformers_offline()
    check_weights(path)
    text = is_text([*(options.data or []), *(options.validation_data or [])])
    kind, known = kind_of(path, text)
    task = learned_from(options, known, text)
    logger.info("%s: %s", ", ".join(options.data or []), task.words())
    config = config_of(options)
    tokenizer = tokenizer_of(path)
    empty = empty_model(path, kind)
    if options.length is not None:
        check_length(empty, options.length)
    task.encode(tokenizer, empty, options.length)
    steps = total_steps(options, len(task.train))
    record: dict[str, Any] = {
        "options": options.compared(),
        "model": fingerprint(path),
        "data": task.fingerprint,
        "base": str(path.absolute()),
    }
    record |= {"class": type(empty).__name__, "config": task.config(), "steps": steps}
    checkpoint = checkpoint_of(output, record) if options.resume else None
    run = _Run(options, path, kind, task, tokenizer, arguments(options, task, output / CHECKPOINTS), steps, output, words)
    check_optimizer(options, run.given)
    check_controller(empty, config, options, steps)

    _say_no_page()
    torch.manual_seed(options.seed)
    stock = run.load()
    _say_head(run, stock)
    before = {"parameters": _count(stock), "bytes": _bytes(stock)}
    model = apt_ext.get_apt_model(stock, config)
    model.to(run.given.device)
    ahead = _forecast(run, model, resumed=checkpoint is not None)
    if options.dry_run:
        raise _Enough
    with _advice(run):
        if checkpoint is None:
            replace_json(output / RECORD, record)
        teacher = _teacher(run, config, resumed=checkpoint is not None) if options.teacher == "lora" else options.teacher
        return _fit(run, model, teacher, checkpoint, before, ahead)


def _fit(run: _Run, model: Any, teacher: Any, checkpoint: Path | None, before: dict[str, Any], ahead: dict[str, Any]) -> dict[str, Any]:
    """From the model that is loaded to the report."""
    options, output, task = run.options, run.output, run.task
    stopping = stopping_callback()
    distiller = Distiller(model, teacher, seed=options.seed) if teacher is not None else None
    trainer = trainer_for(model, options, task, run.tokenizer, run.given, stopping, distiller)
    record = read_json("output", output / RECORD)
    if checkpoint is None:
        logger.info("evaluating the model before it is trained")
        record["before"] = scores_of(trainer.evaluate(), task)
        replace_json(output / RECORD, record)
    else:
        logger.info("going on from %s", checkpoint)
        if distiller is not None:
            load_distiller(trainer, checkpoint)
    before["scores"] = record.get("before", {})
    started = time.perf_counter()
    with stopped_after_a_step(stopping):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = time.perf_counter() - started
    controller, model = trainer.apt.controller, trainer.model
    model.to("cpu").eval()
    directory = output / MODEL
    loader = apt_ext.export(model, directory, tokenizer=run.tokenizer, per_layer=options.export == "per_layer")
    logger.info("exported to %s, which %s loads", directory, loader)
    small: Any = apt_ext.load_export(directory) if loader == "apt_ext.load_export" else load_stock(directory, "auto")
    after = {
        "parameters": _count(small),
        "bytes": _bytes(small),
        "disk": disk_bytes(directory),
        "scores": scores_of(stock_trainer(small, task, run.given).evaluate(), task),
    }
    report: dict[str, Any] = {
        "command": shlex.join(["apt-ext", "train", *run.words]),
        "commit": commit_here(),
        "versions": {
            "apt_ext": apt_ext.__version__,
            "torch": torch.__version__,
            "transformers": transformers_offline().__version__,
            "python": platform.python_version(),
        },
        "options": options.to_dict(),
        "data": task.words(),
        "measure": task.measure,
        "loaded by": loader,
        "seconds": seconds,
        "forecast": ahead,
        "before": before,
        "after": after,
        "kept": kept_of(model),
        "ranks": {name: adapter.rank for name, adapter in apt_ext.adapters(model) if adapter.rank},
        "history": list(controller.history),
        "losses": trainer.state.log_history,
        "speed": _speed(run, small) if options.rounds else None,
        "output": str(output),
        "report": None,
    }
    replace_json(output / "report.json", report, indent=2)  # what is done is kept, whatever happens to the page
    report["report"] = _page(run, model, controller, trainer.state.log_history, after["scores"])
    return report


def _say_head(run: _Run, model: Any) -> None:
    """Say where the head is new, or has other labels than it had."""
    if not run.task.has_head:
        return
    there, config = class_of(run.path)[1], model.config
    if type(model).__name__ not in (there.architectures or []):
        logger.info("the model has no head for this task: one of %d outputs is drawn at random and trained", config.num_labels)
    elif there.num_labels != config.num_labels:
        logger.warning("the model's head has %d labels, the data %d: it is drawn anew and trained", there.num_labels, config.num_labels)
    elif there.id2label != config.id2label:
        old, new = (", ".join(map(str, one.id2label.values())) for one in (there, config))
        logger.info("the model's head is kept; its labels, which were %s, are now %s", old, new)


def _forecast(run: _Run, model: Any, resumed: bool) -> dict[str, Any]:
    options, task = run.options, run.task
    rows = sorted(task.train, key=lambda row: len(row["input_ids"]))
    step = max(len(rows) // options.batch, 1)
    batches = [task.collator(rows[i::step][: options.batch]) for i in range(min(step, 4))]  # each of every length
    on_cuda = model.device.type == "cuda"
    logger.info("timing a few steps")
    found = forecast(
        model,
        timed_steps(model, batches, torch.bfloat16 if options.bf16 else torch.float16 if options.fp16 and on_cuda else None),
        steps=run.steps,
        accumulation=options.gradient_accumulation,
        evaluations=evaluations(options, len(rows)) * -(-len(task.validation) // options.batch),
        growth=options.growth,
        teacher=_teacher_steps(run) if options.teacher == "lora" and not resumed else 0,
    )
    logger.info("%s", told(found))
    return found


def _teacher_steps(run: _Run) -> int:
    return run.options.teacher_steps or max(run.steps // 2, 1)


def _teacher(run: _Run, config: apt_ext.APTConfig, resumed: bool) -> Any:
    """A dense LoRA of the same data, trained, or read where the run is resumed; merged, so that it computes as the stock model does."""
    place, stock = run.output / TEACHER, run.load()
    if resumed:
        model = apt_ext.APTModel.from_pretrained(stock, place)
    else:
        steps = _teacher_steps(run)
        logger.info("training the teacher, a dense LoRA, for %d steps", steps)
        model = apt_ext.get_apt_model(stock, config)
        own = copy.copy(run.given)
        own.max_steps, own.report_to, own.load_best_model_at_end = steps, [], False
        own.save_strategy = own.eval_strategy = type(own.save_strategy)("no")
        trainer = stock_trainer(model, run.task, own)
        trainer.train()
        model.eval().save_pretrained(place)
        scores = scores_of(trainer.evaluate(), run.task)
        logger.info("the teacher's %s is %.4g", run.task.measure, scores[run.task.measure])
    return model.to(run.given.device).merge_and_unload().eval()


@contextmanager
def _advice(run: _Run) -> Iterator[None]:
    """Whatever ends the run within this context, its message says how to go on."""
    try:
        yield
    except BaseException as error:
        begun = bool(checkpoints(run.output))
        advice = f"go on with: {resuming(run.words)}" if begun else "there is no checkpoint yet: the same command begins anew"
        if "finite" in str(error):  # the same command would come here again
            advice = "training has diverged; begin anew with a smaller --learning-rate, in another --output"
        if isinstance(error, Stopped):
            error.advice = f"; {advice}"
        else:
            logger.warning("%s", advice)
        raise


def _say_no_page() -> None:
    """Say at the start that there will be no page, where a library is missing."""
    lacking = [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
    if lacking:
        text = 'no %s will be written without %s; run: python -m pip install "apt_ext[report]"'
        logger.warning(text, REPORT, " and ".join(lacking))


def _page(run: _Run, model: Any, controller: Any, losses: Any, scores: Any) -> str | None:
    """Write the report for people; None where a library is missing."""
    try:
        more = {"losses": losses, "exported": run.output / MODEL, "rounds": run.options.rounds, "metrics": scores}
        return str(apt_ext.report(model, controller, run.output / REPORT, **more))
    except ImportError as error:
        logger.warning("%s is not written: %s; then: apt-ext report %s", REPORT, error, run.output)
        return None


def _speed(run: _Run, small: Any) -> dict[str, Any]:
    """Tokens a second of the model before and after, in turn."""
    logger.info("comparing speed")
    device = str(run.given.device.type)
    inputs = [{name: value.to(device) for name, value in batch.items()} for batch in timed_batches(run.task, run.options.batch)]
    return throughput({"before": run.load().eval(), "after": small.eval()}, inputs, device, run.options.rounds)


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _bytes(model: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
