"""Load what is learned: four tasks, their models, and their data as token ids (see packing)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from apt_ext.common.modes import evaluating
from apt_ext.tools.data import Batch, Example, Missing, sorted_batches, training_batches
from apt_ext.tools.models import transformers_offline

from .quantised import dequantised

PARTS = ("train", "validation", "test")
PACK = "pack.json"


@dataclass(frozen=True)
class Task:
    """Describe one task. `steps` and `rates` are the budget that every row of it gets.

    model       the directory in the pack
    classes     0: a language model, whose score is perplexity (lower is better); else accuracy in percent
    rates       peak learning rates of which each row tries all and keeps one, by validation
    whole       the same for rows that train every weight
    densities   shares of the layers' weights
    scored      sequences that decide what one-shot pruning keeps
    targets     linears with an adapter; `saved` train whole
    """

    name: str
    title: str
    model: str
    classes: int
    steps: int
    batch: int
    densities: tuple[float, ...]
    rates: tuple[float, ...]
    whole: tuple[float, ...] = ()
    scored: int = 256
    targets: tuple[str, ...] = ("query", "value", "intermediate.dense", "output.dense")
    excluded: tuple[str, ...] | None = ("attention.output.dense",)
    saved: tuple[str, ...] = ("classifier", "pooler.dense")
    uniform: bool = False

    @property
    def measure(self) -> str:
        return "accuracy" if self.classes else "perplexity"

    def better(self, a: float, b: float) -> bool:
        """Return whether score `a` is better than `b`. NaN never is."""
        return a > b if self.classes else a < b

    def quick(self) -> Task:
        """Return the same task in a few steps, to see that it runs."""
        return Task(**{**vars(self), "steps": 6, "batch": 4, "rates": self.rates[:1], "whole": self.whole[:1], "scored": 8})


_ENCODER: dict[str, Any] = {"model": "minilm", "densities": (0.4, 0.2, 0.1), "rates": (5e-4, 1e-3), "whole": (5e-5, 2e-4)}
TASKS = {
    task.name: task
    for task in (
        Task("movies", "MiniLM-L6 on movie-review sentences, 2 classes", classes=2, steps=1000, batch=32, **_ENCODER),
        Task("bbc", "MiniLM-L6 on BBC News, 5 classes", classes=5, steps=400, batch=16, **_ENCODER),
        Task("glosses", "MiniLM-L6 on WordNet glosses, 45 classes", classes=45, steps=1000, batch=32, **_ENCODER),
        Task(
            "shakespeare",
            "SmolLM2-135M on Shakespeare",
            "smollm2",
            classes=0,
            steps=400,
            batch=8,
            densities=(0.7, 0.5),
            rates=(2e-4, 5e-4),
            targets=("q_proj", "v_proj", "up_proj", "down_proj"),
            excluded=None,
            saved=(),
            uniform=True,
        ),
    )
}


@dataclass(frozen=True)
class Data:
    """Hold the three parts of a task as batches. `on` is the device that computes with them."""

    task: Task
    parts: Mapping[str, Any]
    pad: int
    on: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def training(self, seed: int, alike: bool = False) -> Iterator[Batch]:
        """Yield batches without end; `alike`: all of the length of the longest text, so that one graph serves all of them."""
        if self.task.classes:
            least = max(len(one.ids) for one in self.parts["train"]) if alike else 0
            batches = training_batches(self.parts["train"], self.pad, self.task.batch, seed, least)
        else:
            batches = _windows(self.parts["train"], self.task.batch, seed)
        for batch in batches:
            yield {name: value.to(self.on, non_blocking=True) for name, value in batch.items()}

    def score(self, model: Any, part: str) -> float:
        """Return a model's accuracy in percent, or its perplexity, on one part. Its modes stay."""
        with evaluating(model), torch.no_grad():
            return self._score(model, part)

    def _score(self, model: Any, part: str) -> float:
        total, count = torch.zeros((), dtype=torch.float64), 0
        for batch in self.held(part):
            on = {name: value.to(self.on) for name, value in batch.items()}
            labels = on.pop("labels")
            logits = model(**on).logits
            if self.task.classes:
                right = (logits.argmax(1) == labels).sum()
                total, count = total + right.cpu(), count + len(labels)
            else:
                loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")
                total, count = total + loss.cpu().double(), count + labels[:, 1:].numel()
        mean = float(total) / count
        return 100 * mean if self.task.classes else math.exp(mean) if mean < 700 else math.inf

    def held(self, part: str) -> list[Batch]:
        """Return the batches of one part, once each."""
        if self.task.classes:
            return sorted_batches(self.parts[part], self.pad, 256)
        rows = self.parts[part]
        return [{"input_ids": rows[i : i + 8], "labels": rows[i : i + 8]} for i in range(0, len(rows), 8)]


def _windows(rows: Tensor, size: int, seed: int) -> Iterator[Batch]:
    """Yield batches of whole windows, shuffled anew each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for start in range(0, len(rows) - size + 1, size):
            part = order[start : start + size]
            yield {"input_ids": rows[part], "labels": rows[part]}


def load_data(pack: Path, task: Task, device: torch.device, quick: bool = False) -> Data:
    """Load the task's data from a packed directory; quick: the first few of each part. Missing in words."""
    tensors = _read(pack, f"{task.name}.safetensors")
    parts: dict[str, Any] = {}
    for part in PARTS:
        ids = tensors[f"{part}.ids"].to(torch.int64)
        few = (64 if part == "train" else 16 if task.classes else 2) if quick else None
        if task.classes:
            flat, ends = ids.tolist(), tensors[f"{part}.lengths"].long().cumsum(0).tolist()
            bounds = list(zip([0, *ends[:-1]], ends, strict=True))[:few]
            labels = tensors[f"{part}.labels"].tolist()[:few]
            parts[part] = [Example(flat[start:end], label) for (start, end), label in zip(bounds, labels, strict=True)]
        else:
            parts[part] = ids[:few]
    return Data(task, parts, pad=0, on=device)


def load_model(pack: Path, task: Task, device: torch.device) -> Any:
    """Load the pretrained model in float32, and draw a classifier's head from torch's generator."""
    transformers = transformers_offline()
    directory = _model_directory(pack, task)
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    if task.classes:
        config.num_labels = task.classes
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    state = _state(pack, task.model)
    inner = model.base_model if task.classes else model
    left = inner.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if getattr(config, "tie_word_embeddings", False) else set()
    if left.unexpected_keys or set(left.missing_keys) - tied:
        raise Missing(f"data: {directory} is not of this version's making: {[*left.unexpected_keys, *left.missing_keys][:3]}")
    inner.tie_weights()
    return model.to(device=device, dtype=torch.float32).eval()


@lru_cache(maxsize=2)
def _state(pack: Path, model: str) -> dict[str, Tensor]:
    files = sorted((pack / model).glob("*.safetensors"))
    found: dict[str, Tensor] = {}
    for file in files:
        found |= _read(pack, f"{model}/{file.name}")
    return dequantised(found)


def check_pack(pack: Path, task: Task) -> None:
    """Raise Missing where a packed directory lacks what the task needs, or holds it damaged."""
    _packed(pack, f"{task.name}.safetensors")
    _model_directory(pack, task)
    weights = [name for name in _listed(pack) if name.startswith(f"{task.model}/") and name.endswith(".safetensors")]
    if not weights:
        raise _unprepared(pack, f"expected {task.model}/*.safetensors in {pack}")
    for name in weights:
        _packed(pack, name)


def _model_directory(pack: Path, task: Task) -> Path:
    directory = pack / task.model
    if not (directory / "config.json").is_file():
        raise _unprepared(pack, f"expected {task.model}/config.json in {pack}")
    return directory


def _unprepared(pack: Path, said: str) -> Missing:
    return Missing(f"data: {said}; run: apt-ext results --prepare {pack}")


def _read(pack: Path, name: str) -> dict[str, Tensor]:
    """Read the tensors of one packed file."""
    from safetensors.torch import load

    return load(_packed(pack, name))


def _packed(pack: Path, name: str) -> bytes:
    """Read one packed file, which must be the one that its list names."""
    listed = _listed(pack)
    if name not in listed or not (pack / name).is_file():
        raise _unprepared(pack, f"expected {name} in {pack}")
    content = (pack / name).read_bytes()
    if hashlib.sha256(content).hexdigest() != listed[name]:
        raise _unprepared(pack, f"{pack / name} is not the file that {PACK} lists")
    return content


def _listed(pack: Path) -> dict[str, str]:
    """Return {file: SHA-256}."""
    try:
        files = json.loads((pack / PACK).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unprepared(pack, f"expected a packed directory at {pack} ({error})") from error
    return {str(name): str(digest) for name, digest in files.items()}
