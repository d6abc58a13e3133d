"""The parts of the demo that run in a process of their own, so that each has its own peak memory and starts from nothing."""

from __future__ import annotations

import json
import statistics
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import apt_ext

from ..common.clock import in_turn
from ..common.memory import peak_memory
from ..exporting.fresh import started
from ..reporting.layers import kept_panels, rank_panels
from .data import (
    Batch,
    Example,
    batch_of,
    encode,
    encoder_directory,
    load_reviews,
    sorted_batches,
    split_reviews,
    training_batches,
)
from .models import transformers_offline
from .recipe import Recipe, accuracy, fit, logits_of


def load_examples(archive: Path, quick: bool) -> tuple[dict[str, list[Example]], int]:
    """The three splits as token ids, and the id that pads; quick: the first few sentences of each."""
    tokenizer = transformers_offline().AutoTokenizer.from_pretrained(encoder_directory(), local_files_only=True)
    split = split_reviews(load_reviews(archive))
    few = {"train": 320, "validation": 64, "test": 128}
    return {name: encode(tokenizer, getattr(split, name)[: few[name] if quick else None]) for name in few}, tokenizer.pad_token_id


def train(method: str, recipe: Recipe, archive: Path, output: Path, quick: bool) -> dict[str, Any]:
    """Fine-tune one model ("lora" or "apt"), export it to output/method, and say how it went.

    Also written: output/method.check.safetensors, a batch with the logits that the exported model must give.
    """
    examples, pad = load_examples(archive, quick)
    torch.manual_seed(recipe.seed)
    stock = transformers_offline().AutoModelForSequenceClassification.from_pretrained(
        encoder_directory(), num_labels=2, local_files_only=True, dtype=torch.float32
    )
    model = apt_ext.get_apt_model(stock, recipe.config())
    apt = method == "apt"
    before = adapter_parameter_count(model)
    batches = training_batches(examples["train"], pad, recipe.batch, recipe.seed)
    counts = {name: block.count for name, block in model.blocks.items() if block.kind == "neurons"}
    fitted = fit(model, batches, recipe, method, prune=apt)
    ranks = {name: adapter.rank for name, adapter in apt_ext.adapters(model) if adapter.rank}
    left = {name: int((model.get_block_mask(name) != 0).sum()) for name in model.blocks}
    result: dict[str, Any] = {
        "training_seconds": fitted.seconds,
        "step_seconds": fitted.step_seconds,
        "events": fitted.events,
        "peak_memory_bytes": peak_memory(),
        "adapter_parameters": [before, adapter_parameter_count(model)],
        "ranks": ranks,
        "kept": {name: left[name] for name in counts},
        "panels": {
            "kept": kept_panels(model.model, model.blocks, left),
            "ranks": rank_panels(model.model, model.blocks, ranks)[0],
        },
        "counts": counts,
        "masks_are_binary": all(bool((mask * (1 - mask) == 0).all()) for mask in map(model.get_block_mask, model.blocks)),
    }
    batch = batch_of(examples["validation"][:32], pad)
    expected = logits_of(model, [batch])[0]
    small = apt_ext.shrink(model) if apt else model.merge_and_unload()
    apt_ext.export(small, output / method)
    logits = logits_of(small, [batch])[0]
    _save_check(output / f"{method}.check.safetensors", batch, logits)
    return {
        **result,
        "exported_minus_trained": (logits - expected).abs().max().item(),
        "validation_accuracy": accuracy(small, sorted_batches(examples["validation"], pad)),
    }


def adapter_parameter_count(model: apt_ext.APTModel) -> int:
    return sum(adapter.get_parameter_count() for _, adapter in apt_ext.adapters(model))


def _save_check(path: Path, batch: Batch, logits: torch.Tensor) -> None:
    from safetensors.torch import save_file

    save_file({"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "logits": logits.contiguous()}, path)


def reload(directory: Path, check: Path) -> dict[str, Any]:
    """What stock transformers makes of an exported directory, in a fresh process without this package: export's own check.

    Returns its class, and whether its logits are bitwise those in `check`, with the largest difference; or {"error": ...}.
    """
    from safetensors.torch import load_file, save_file

    saved = load_file(check)
    logits = saved.pop("logits")
    (kind,) = json.loads((directory / "config.json").read_text(encoding="utf-8"))["architectures"]
    with TemporaryDirectory() as beside:
        exchange = Path(beside) / "exchange.safetensors"
        save_file(saved, exchange)
        with started(kind) as reloaded:
            answer = reloaded(directory, kind, exchange)
        if "error" in answer:
            return answer
        output = load_file(exchange)["output"]
    return {"class": answer["class"], "bitwise": torch.equal(output, logits), "difference": (output - logits).abs().max().item()}


def compare(methods: list[str], archive: Path, output: Path, quick: bool, rounds: int) -> dict[str, dict[str, Any]]:
    """Test accuracy, size and speed of the exported models, loaded as stock ones.

    Speed is timed in `rounds` rounds, the models in turn, so that all of them meet the same machine.

    Throughput: sentences a second over up to 512 test sentences in batches of 64, sorted by length.
    """
    examples, pad = load_examples(archive, quick)
    auto = transformers_offline().AutoModelForSequenceClassification
    models = {method: auto.from_pretrained(output / method, local_files_only=True) for method in methods}
    test = sorted_batches(examples["test"], pad)
    accuracies = {method: accuracy(model, test) for method, model in models.items()}
    timed = examples["test"][:512]
    batches = sorted_batches(timed, pad)
    seconds = in_turn({method: partial(logits_of, model, batches) for method, model in models.items()}, rounds)
    speeds = {method: [len(timed) / one for one in values] for method, values in seconds.items()}
    return {
        method: {
            "test_accuracy": accuracies[method],
            "encoder_parameters": sum(parameter.numel() for parameter in model.base_model.encoder.parameters()),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "disk_bytes": sum(file.stat().st_size for file in (output / method).iterdir()),
            "sentences_per_second": {
                "median": statistics.median(speeds[method]),
                "min": min(speeds[method]),
                "max": max(speeds[method]),
                "rounds": speeds[method],
            },
        }
        for method, model in models.items()
    }
