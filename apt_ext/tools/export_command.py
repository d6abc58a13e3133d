"""`apt-ext export`: from a checkpoint to a directory that stock transformers loads."""

from __future__ import annotations

from pathlib import Path

import apt_ext

from .data import Missing
from .places import check_export, directory_of
from .trained import Trained


def export_checkpoint(checkpoint: Path, base: str | None, output: Path, per_layer: bool = False, unfinished: bool = False) -> str:
    """Write the cut model of a checkpoint into `output`; returns what loads it. Missing in words, also for what `export` refuses."""
    trained = Trained.of(checkpoint, base)
    check_export("output", output)
    with directory_of("output", output / "config.json"):
        model = trained.load()
        try:
            return apt_ext.export(model, output, tokenizer=trained.tokenizer(), per_layer=per_layer, unfinished=unfinished)
        except (RuntimeError, ValueError) as error:
            remedies = {"unfinished=True": "--unfinished", "per_layer=True": "--per-layer"}
            said = str(error)
            for argument, option in remedies.items():
                said = said.replace(argument, option)
            raise Missing(said) from error
