"""`apt-ext demo`: dense LoRA against APT, same data and number of optimizer steps, from the encoder to the reloaded model."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

import torch

import apt_ext

from .comparison import check_pictures, table, write_plot
from .data import ARCHIVE, Missing, encoder_directory, load_reviews, split_reviews
from .measuring import around_events
from .models import check_weights, transformers_offline
from .phases import compare, reload, train
from .places import check_export, replace_json
from .processes import run_apart
from .recipe import Recipe

STEPS, QUICK_STEPS = 500, 10
ROUNDS, QUICK_ROUNDS = 7, 3  # of the clock
METHODS = {"lora": "dense LoRA", "apt": "APT"}
_CLOSE = 1e-4  # how far the logits of the exported model may be from those of the trained one, float32


class CheckFailed(Exception):
    """A result is not what it must be; the message says which, expected and found."""


def demo(output: Path, *, seed: int = 0, steps: int | None = None, archive: Path = ARCHIVE, quick: bool = False) -> dict[str, Any]:
    """Train both models, check the cut and the export, compare, and write report.json and report.png into `output`; returns the report.

    report.json is there, without what `compare` measures, before that begins. Raises Missing before anything starts if the encoder, the
    reviews or a library is not there or `output` holds other files in the place of a model, and CheckFailed.
    """
    started = time.perf_counter()
    transformers = transformers_offline()
    check_pictures()
    check_weights(encoder_directory())
    recipe = Recipe(steps=steps or (QUICK_STEPS if quick else STEPS), seed=seed)
    reviews = len(split_reviews(load_reviews(archive)).train)
    if reviews < recipe.batch:
        raise Missing(f"data: expected at least {recipe.batch} reviews to train on beside those held out, got {reviews} in {archive}")
    for method in METHODS:
        check_export("output", output / method)
    output.mkdir(parents=True, exist_ok=True)

    trained = {method: run_apart(train, method, recipe, archive, output, quick) for method in METHODS}
    events = trained["apt"]["events"]
    for found in trained.values():  # a dense LoRA's over the same steps, which have the same batches
        found["step_seconds"] = around_events(found["step_seconds"], events)
    for method in METHODS:
        check(method, trained[method], reload(output / method, output / f"{method}.check.safetensors"))
    report: dict[str, Any] = {
        "quick": quick,
        "recipe": vars(recipe),
        "threads": torch.get_num_threads(),
        "versions": {
            "apt_ext": apt_ext.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "machine": platform.machine(),
        "methods": {method: {"name": name, **trained[method]} for method, name in METHODS.items()},
        "seconds": time.perf_counter() - started,
    }
    replace_json(output / "report.json", report, indent=2)  # what is done is kept, whatever happens to the clock
    for method, measured in run_apart(compare, list(METHODS), archive, output, quick, QUICK_ROUNDS if quick else ROUNDS).items():
        report["methods"][method] |= measured
    report["seconds"] = time.perf_counter() - started
    replace_json(output / "report.json", report, indent=2)
    write_plot(report, output / "report.png")
    print(table(report))
    print(f"In {output}: the models {' and '.join(METHODS)}, report.json and report.png.")
    return report


def check(method: str, trained: dict[str, Any], reloaded: dict[str, Any]) -> None:
    """Print what was checked of one model; CheckFailed at the first thing that does not hold."""
    name = METHODS[method]
    if "error" in reloaded:
        raise CheckFailed(f"{name}: stock transformers does not load the exported model: {reloaded['error']}")
    facts = [
        ("every mask ended at exactly 0 or 1", trained["masks_are_binary"], ""),
        (
            f"exported model = trained model within {_CLOSE:g}",
            trained["exported_minus_trained"] <= _CLOSE,
            f"{trained['exported_minus_trained']:.1e}",
        ),
        (f"reloaded in a fresh process without apt_ext as {reloaded['class']}", reloaded["class"].startswith("transformers."), ""),
        ("reloaded logits = saved logits, bitwise", reloaded["bitwise"], f"{reloaded['difference']:.1e}"),
    ]
    for fact, holds, difference in facts:
        found = f" (largest difference {difference})" if difference else ""
        if not holds:
            raise CheckFailed(f"{name}: expected: {fact}, but it does not hold{found}")
        print(f"ok  {name}: {fact}{found}")
