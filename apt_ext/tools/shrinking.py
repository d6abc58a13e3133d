"""`apt-ext shrink`: prune a pretrained model in one step, cut it, export it, and say what it cost and what it saved."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import apt_ext

from ..exporting.directories import expressed
from ..method import one_shot
from ..method.oneshot import check_keep
from ..method.planner import plan
from ..pruning.on_meta import positions
from .data import (
    Batch,
    Missing,
    Review,
    Split,
    encode,
    load_reviews,
    sorted_batches,
    split_reviews,
    training_batches,
)
from .measuring import commit_here, compared, disk_bytes
from .models import (
    check_length,
    check_weights,
    class_of,
    empty_model,
    load,
    load_stock,
    load_tokenizer,
    package_file,
    random_model,
    transformers_offline,
)
from .own_data import Row, Task, load_task
from .places import check_export, replace_json
from .recipe import Recipe, accuracy, fit
from .train_checks import tokenizer_of

_HELD_OUT = 0.1  # of a text, at its end
_HEAD = ("classifier", "pooler.dense")  # what learns from reviews beside the adapters


@dataclass(frozen=True)
class Settings:
    """The numbers of a run.

    keep     {kind: how many stay in every layer}
    score    batches that decide which blocks stay
    steps    LoRA steps before pruning (reviews: the task's head is new) and recover after the cut
    rounds   of the clock, dense and cut model in turn
    commit   what the report says of the code; "": the checkout's
    """

    keep: Mapping[str, int]
    batch: int = 4
    length: int = 256
    score: int = 8
    test: int = 8
    steps: int = 0
    recover: int = 0
    rounds: int = 9
    seed: int = 0
    commit: str = ""


class Text:
    """Language modelling on plain text: perplexity on the last tenth of the tokens."""

    measure = "perplexity"

    def __init__(self, files: list[Path], tokenizer: Any, settings: Settings) -> None:
        ids = tokenizer("\n".join(_read(file) for file in files), return_tensors="pt", verbose=False)["input_ids"][0]
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

    @property
    def tested(self) -> str:
        return f"{sum(batch['input_ids'].numel() for batch in self.tests()):,} tokens"

    def timed(self) -> list[Batch]:
        return self.tests()[:1]

    @torch.no_grad()
    def quality(self, model: Any) -> float:
        losses = [model(**batch).loss.item() for batch in tqdm(self.tests(), desc=self.measure, unit="batch", leave=False)]
        return math.exp(statistics.fmean(losses))


class Reviews:
    """Texts with classes, such as movie reviews, positive or negative: accuracy on the test split."""

    measure = "accuracy"

    def __init__(self, split: Split, tokenizer: Any, settings: Settings, positions: int | None = None, what: str = "reviews") -> None:
        most = min(64, positions or 64)
        self._what = what
        if len(split.train) < settings.batch:
            raise Missing(f"batch: expected at most the {len(split.train)} {what} to train on, got {settings.batch}")
        self._train, self._test = encode(tokenizer, split.train, most), encode(tokenizer, split.test, most)
        self._pad, self._settings = tokenizer.pad_token_id, settings

    def batches(self, seed: int) -> Iterator[Batch]:
        return training_batches(self._train, self._pad, self._settings.batch, seed)

    def tests(self) -> list[Batch]:
        return sorted_batches(self._test, self._pad)

    @property
    def tested(self) -> str:
        return f"{len(self._test):,} {self._what}"

    def timed(self) -> list[Batch]:
        return self.tests()[::5]  # of every length

    def quality(self, model: Any) -> float:
        return accuracy(model, self.tests())


def shrink_model(
    source: str,
    output: Path,
    settings: Settings,
    *,
    text: list[Path],
    reviews: Path,
    rows: Sequence[str] = (),
    columns: tuple[str, str] = ("text", "label"),
    devices: list[str] | None = None,
) -> dict[str, Any]:
    """Prune, cut and export; compare the model before with the exported one, both loaded as stock; returns the report.

    source   a directory, a .gguf file, or an installed package that holds one
    text     files to model
    rows     files of texts and classes, in these two columns; none, and no text: `reviews`, vaderSentiment's archive, to classify
    devices  where speed and memory are measured; None: on the CPU, and on CUDA where there is a GPU

    Arguments, files and what the model's shapes decide are checked before a model is loaded. Raises Missing in words. The report is also in
    `output`/report.json, without devices until they are measured; the models are in `output`, which is there, as dense and model.
    """
    devices = _present(devices)
    _check_places(output)
    path = package_file(source)
    check_weights(path)
    kind = _kind(path, text, bool(rows))
    for file in text:
        _read(file)
    own = load_task(rows, None, text=columns[0], label=columns[1], problem="classification", seed=settings.seed) if rows else None
    split = None if text else split_reviews(load_reviews(reviews)) if own is None else _split_of(own)
    config = apt_ext.APTConfig(r=8, modules_to_save=None if text or rows else list(_HEAD))
    empty = _checked(path, kind, config, settings, long=bool(text))
    tokenizer = load_tokenizer(path) if own is None else tokenizer_of(path)
    what = "reviews" if own is None else "rows"
    task = Text(text, tokenizer, settings) if split is None else Reviews(split, tokenizer, settings, positions(empty), what)
    torch.manual_seed(settings.seed)
    names: dict[str, Any] = (
        {} if own is None else {"id2label": dict(enumerate(own.labels)), "label2id": {name: i for i, name in enumerate(own.labels)}}
    )
    stock = load(path, kind, head=not text, **names)
    if own is not None and stock.config.pad_token_id is None:
        stock.config.pad_token_id = tokenizer.pad_token_id
    apt = apt_ext.get_apt_model(stock, config)
    if settings.steps:
        fit(apt, task.batches(settings.seed), Recipe(steps=settings.steps), "train")
    apt.eval()
    apt_ext.export(apt, output / "dense", tokenizer=tokenizer)  # nothing is masked: the fine-tuned model, merged
    before = task.quality(load_stock(output / "dense", torch.float32))
    scored = task.batches(settings.seed + 1)
    one_shot(apt, (next(scored) for _ in tqdm(range(settings.score), desc="score", unit="batch")), settings.keep)
    masked = task.quality(apt)
    apt.cut()
    if settings.recover:
        fit(apt, task.batches(settings.seed + 2), Recipe(steps=settings.recover), "recover")
        apt.eval()
    loader = apt_ext.export(apt, output / "model", tokenizer=tokenizer)
    del apt
    small = load_stock(output / "model", torch.float32)
    quality = {"measure": task.measure, "on": task.tested, "before": before, "masked": masked, "after": task.quality(small)}
    continued = {"text": _continued(small, tokenizer)} if text else {}
    return _report(output, settings, task.timed(), devices, loader, {"quality": quality, **continued})


def shrink_random(source: Path, output: Path, settings: Settings, *, devices: list[str] | None = None) -> dict[str, Any]:
    """What a cut saves in a model of these shapes: Parameters are random, no data is needed, and no quality can be told.

    source  a directory with a config.json; the first of each block stay. Otherwise as `shrink_model`; inputs are random tokens.
    """
    devices = _present(devices)
    config = apt_ext.APTConfig(r=1)
    _checked(source, None, config, settings, long=True)
    torch.manual_seed(settings.seed)
    apt = apt_ext.get_apt_model(random_model(source), config).eval()
    dense: Any = apt_ext.shrink(apt)
    for name, block in apt.blocks.items():
        if block.kind in settings.keep:
            apt.set_block_mask(name, (torch.arange(block.count) < settings.keep[block.kind]).float())
    small, loader = expressed(apt_ext.shrink(apt), per_layer=False)
    dense.save_pretrained(output / "dense")
    small.save_pretrained(output / "model")
    tokens = torch.randint(1, apt.config.vocab_size, (settings.batch, settings.length))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return _report(output, settings, [batch], devices, loader, {"random": True})


def _read(file: Path) -> str:
    """A file of text; Missing where there is none or it may not be read."""
    if not file.is_file():
        raise Missing(f"text: expected files, found none at {file}")
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise Missing(f"text: expected a file to read, got {str(file)!r}: {error.strerror}") from error


def _check_places(output: Path) -> None:
    for name in ("dense", "model"):
        check_export("output", output / name)


def _split_of(own: Task) -> Split:
    """The rows of the user's own files as reviews: what `load_task` holds out is the test part."""

    def reviews(rows: list[Row]) -> list[Review]:
        return [Review(row.text, int(own.number(row))) for row in rows]

    return Split(reviews(own.train), [], reviews(own.validation))


def _kind(path: Path, text: list[Path], own: bool) -> Any:
    """The class of transformers that learns: of text a language model, of reviews a classifier. Missing where that needs text."""
    transformers = transformers_offline()
    if text:
        return transformers.AutoModelForCausalLM
    kind = transformers.AutoModelForSequenceClassification
    if type(class_of(path)[1]) in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        modules = [name for name, _ in empty_model(path, kind).named_modules()]
        if own or all(any(name.endswith(part) for name in modules) for part in _HEAD):
            return kind
    if own:
        raise Missing(f"data: expected a model that can have a classifier, got {type(class_of(path)[1]).__name__}")
    raise Missing(
        f"text: expected --text FILE, which a language model needs, got none for {path}; only a model that can have a classifier over a "
        "pooler, as BERT can, learns from reviews"
    )


def _checked(path: Path, kind: Any, config: apt_ext.APTConfig, settings: Settings, *, long: bool) -> Any:
    """The model without values, after all that its shapes decide: what stays, whether a stock config can say it, and the input's length.

    long  whether inputs are of `settings.length`
    """
    empty = empty_model(path, kind)
    if long:
        check_length(empty, settings.length)
    check_keep(apt_ext.get_apt_model(empty_model(path, kind), config), settings.keep)
    exports = plan(empty, config, keep=settings.keep, length=1).exports
    stock = [exports[name] for name in ("stock", "retyped") if name in exports]
    if all(stock):
        raise Missing(f"keep: expected sizes that a stock config can say, but {'; '.join(dict.fromkeys(sum(stock, [])))}")
    return empty


def _present(devices: list[str] | None) -> list[str]:
    if devices is None:
        return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if "cuda" in devices and not torch.cuda.is_available():
        raise Missing("device: expected a CUDA device that torch can use, found none")
    return devices


def _report(
    output: Path, settings: Settings, batches: list[Batch], devices: list[str], loader: str, more: dict[str, Any]
) -> dict[str, Any]:
    """Write what is known, measure the directories, and add what was found, device by device."""
    directories = {"before": output / "dense", "after": output / "model"}
    measured: dict[str, Any] = {}
    report = {
        "commit": settings.commit or commit_here(),
        "versions": {"torch": torch.__version__, "transformers": transformers_offline().__version__, "python": platform.python_version()},
        "loaded by": loader,
        "settings": {name: value for name, value in vars(settings).items() if name != "commit"},
        **more,
        "parameters": {name: _parameters(directory) for name, directory in directories.items()},
        "bytes on disk": {name: disk_bytes(directory) for name, directory in directories.items()},
        "devices": measured,
    }
    replace_json(output / "report.json", report, indent=2)  # what is done is kept, whatever happens to the clock
    for device in devices:
        measured[device] = compared(directories, batches, device, settings.rounds)
        replace_json(output / "report.json", report, indent=2)
    return report


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{report['loaded by']}, kept in every layer: {report['settings']['keep']}", f"{'':34}{'before':>18}{'after':>18}"]
    if "quality" in report:
        quality = report["quality"]
        lines.append(_row(f"{quality['measure']}, {quality['on']}", quality, lambda value: f"{value:,.3f}"))
    for name in ("parameters", "bytes on disk"):
        lines.append(_row(name, report[name], lambda value: f"{value:,}"))
    for device, found in report["devices"].items():
        threads = f", {found['threads']} thread{'s' * (found['threads'] != 1)}" if device == "cpu" else ""
        lines.append(f"{found['device']}, {found['dtype']}{threads}")
        for name, unit in (("tokens per second", 1.0), ("generated tokens per second", 1.0), ("peak memory", 1e6)):
            if name in found:
                sides = {side: {part: found[name][side][part] / unit for part in ("low", "median", "high")} for side in ("before", "after")}
                lines.append(_row(f"  {name}{', MB' if unit > 1 else ''}", sides, lambda value: f"{value['median']:,.0f}"))
                lines.append(_row("    quartiles", sides, lambda value: f"{value['low']:,.0f}-{value['high']:,.0f}"))
    return "\n".join([*lines, *([f"continues: {report['text']!r}"] if "text" in report else [])])


def _row(name: str, sides: Mapping[str, Any], shown: Callable[[Any], str]) -> str:
    return f"{name:34}{shown(sides['before']):>18}{shown(sides['after']):>18}"


def _parameters(directory: Path) -> int:
    return sum(parameter.numel() for parameter in load_stock(directory, torch.float32).parameters())


def _continued(model: Any, tokenizer: Any, start: str = "To be, or not to be") -> str:
    ids: Tensor = tokenizer(start, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    text: str = tokenizer.decode(found[0], skip_special_tokens=True)
    return text
