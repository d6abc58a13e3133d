"""`apt-ext shrink`: prune a pretrained model in one step, cut it, export it, and say what it cost and what it saved."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import apt_ext

from ..method import one_shot
from ..method.oneshot import check_keep
from .data import Batch, Missing, encode, load_reviews, sorted_batches, split_reviews, training_batches
from .models import load, package_file
from .phases import transformers_offline
from .recipe import Recipe, accuracy, fit

_HELD_OUT = 0.1  # of a text, at its end


@dataclass(frozen=True)
class Settings:
    """The numbers of a run.

    keep     {kind: how many stay in every layer}
    score    batches that decide which blocks stay
    steps    LoRA steps before pruning (reviews: the task's head is new) and recover after the cut
    """

    keep: Mapping[str, int]
    batch: int = 4
    length: int = 256
    score: int = 8
    test: int = 8
    steps: int = 0
    recover: int = 0
    rounds: int = 5
    seed: int = 0


class Text:
    """Language modelling on plain text: perplexity on the last tenth of the tokens."""

    measure = "perplexity"

    def __init__(self, files: list[Path], tokenizer: Any, settings: Settings) -> None:
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise Missing(f"text: expected files, found none at {missing[0]}")
        text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
        ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
        windows = ids[: len(ids) // settings.length * settings.length].view(-1, settings.length)
        held = max(int(len(windows) * _HELD_OUT), 1)
        if len(windows) - held < settings.batch:
            raise Missing(f"text: expected at least {settings.batch + held} windows of {settings.length} tokens, got {len(windows)}")
        self._train, self._held = windows[:-held], windows[-held:]
        self._settings = settings

    def batches(self, seed: int) -> Iterator[Batch]:
        """Without end, drawn at random."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            rows = self._train[torch.randint(len(self._train), (self._settings.batch,), generator=generator)]
            yield {"input_ids": rows, "labels": rows}

    def tests(self) -> list[Batch]:
        step = max(len(self._held) // (self._settings.test * self._settings.batch), 1)
        rows = self._held[::step][: self._settings.test * self._settings.batch]  # from all of the held-out part
        return [{"input_ids": part, "labels": part} for part in rows.split(self._settings.batch)]

    @torch.no_grad()
    def quality(self, model: Any) -> float:
        losses = [model(**batch).loss.item() for batch in tqdm(self.tests(), desc=self.measure, unit="batch", leave=False)]
        return math.exp(statistics.fmean(losses))


class Reviews:
    """Movie reviews, positive or negative: accuracy on the test split."""

    measure = "accuracy"

    def __init__(self, archive: Path, tokenizer: Any, settings: Settings) -> None:
        split = split_reviews(load_reviews(archive))
        self._train, self._test = encode(tokenizer, split.train), encode(tokenizer, split.test)
        self._pad, self._settings = tokenizer.pad_token_id, settings

    def batches(self, seed: int) -> Iterator[Batch]:
        return training_batches(self._train, self._pad, self._settings.batch, seed)

    def tests(self) -> list[Batch]:
        return sorted_batches(self._test, self._pad)

    def quality(self, model: Any) -> float:
        return accuracy(model, self.tests())


def shrink_model(source: str, output: Path, settings: Settings, *, text: list[Path], reviews: Path) -> dict[str, Any]:
    """Prune, cut and export; measure the model before and the exported one after, loaded as stock; returns the report.

    source  a directory, a .gguf file, or an installed package that holds one
    text    files to model; none: `reviews`, vaderSentiment's archive, to classify

    Raises Missing in words. The report is also in output/report.json; the model in output/model.
    """
    transformers = transformers_offline()
    torch.manual_seed(settings.seed)
    kind = transformers.AutoModelForCausalLM if text else transformers.AutoModelForSequenceClassification
    path = package_file(source)
    model, tokenizer = load(path, kind)
    task = Text(text, tokenizer, settings) if text else Reviews(reviews, tokenizer, settings)
    apt = apt_ext.get_apt_model(model, apt_ext.APTConfig(r=8, modules_to_save=None if text else ["classifier", "pooler.dense"]))
    most = getattr(model.config, "max_position_embeddings", None)
    if text and isinstance(most, int) and settings.length > most:
        raise Missing(f"length: expected at most the {most} positions of {type(model).__name__}, got {settings.length}")
    check_keep(apt, settings.keep)  # before anything that takes long
    if settings.steps:
        fit(apt, task.batches(settings.seed), Recipe(steps=settings.steps), None, "train")
    apt.eval()
    dense = apt_ext.shrink(apt).eval()  # nothing is masked: the fine-tuned model, merged
    before = {**_measured(task, dense, settings), **_size(dense)}
    del dense
    scored = task.batches(settings.seed + 1)
    one_shot(apt, (next(scored) for _ in tqdm(range(settings.score), desc="score", unit="batch")), settings.keep)
    masked = task.quality(apt)
    apt.cut()
    if settings.recover:
        fit(apt, task.batches(settings.seed + 2), Recipe(steps=settings.recover), None, "recover")
        apt.eval()
    output.mkdir(parents=True, exist_ok=True)
    loader = apt_ext.export(apt, output / "model", tokenizer=tokenizer)
    small = getattr(transformers, loader).from_pretrained(output / "model", local_files_only=True, dtype="auto").eval()
    after = {**_measured(task, small, settings), **_size(small)}
    report = {
        "model": type(model).__name__,
        "loaded by": loader,
        "keep": dict(settings.keep),
        "measure": task.measure,
        "before": before,
        "masked": masked,
        "after": after,
        "settings": {**vars(settings), "keep": dict(settings.keep)},
        "threads": torch.get_num_threads(),
    }
    if text:
        report["text"] = _continued(small, tokenizer)
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    before, after = report["before"], report["after"]
    lines = [f"{report['model']} -> {report['loaded by']}, kept in every layer: {report['keep']}", f"{'':20}{'before':>18}{'after':>18}"]
    for name in (report["measure"], "parameters", "bytes of weights"):
        shown = [f"{side[name]:,.3f}" if isinstance(side[name], float) else f"{side[name]:,}" for side in (before, after)]
        lines.append(f"{name:20}{shown[0]:>18}{shown[1]:>18}")
    for name, side in (("before", before), ("after", after)):
        speed = side["tokens per second"]
        lines.append(f"tokens a second {name}: {speed['median']:,.0f} (from {speed['min']:,.0f} to {speed['max']:,.0f})")
    return "\n".join([*lines, *([f"continues: {report['text']!r}"] if "text" in report else [])])


def _measured(task: Text | Reviews, model: Any, settings: Settings) -> dict[str, Any]:
    quality = task.quality(model)
    batch = {name: value for name, value in task.tests()[0].items() if name != "labels"}
    tokens, speeds = batch["input_ids"].numel(), []
    with torch.no_grad():
        for _ in range(settings.rounds):
            started = time.perf_counter()
            model(**batch)
            speeds.append(tokens / (time.perf_counter() - started))
    return {task.measure: quality, "tokens per second": {"median": statistics.median(speeds), "min": min(speeds), "max": max(speeds)}}


def _continued(model: Any, tokenizer: Any, start: str = "To be, or not to be") -> str:
    ids: Tensor = tokenizer(start, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    text: str = tokenizer.decode(found[0], skip_special_tokens=True)
    return text


def _size(model: Any) -> dict[str, int]:
    parameters = list(model.parameters())
    return {"parameters": sum(p.numel() for p in parameters), "bytes of weights": sum(p.numel() * p.element_size() for p in parameters)}
