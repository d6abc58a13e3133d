"""`apt-ext report`: the page of a run, or of a checkpoint or export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import apt_ext

from .data import Missing
from .places import directory_of, read_json
from .train_checks import REPORT
from .trained import Trained


def report_of(directory: Path, base: str | None, output: Path | None, rounds: int) -> str:
    """Write the page of what is in `directory` to `output` (None: into it) and return its path. Missing in words."""
    if not directory.is_dir():
        there = "a file" if directory.exists() else "nothing"
        raise Missing(
            f"directory: expected one that apt-ext train, a Trainer or export wrote, got {there} at {directory}; `apt-ext train` makes "
            "one of your data"
        )
    place = output or directory / REPORT
    if place.suffix.lower() not in ("", ".html"):
        raise Missing(f"output: expected a name that ends in .html, or a directory's without an ending, got {place}")
    with directory_of("output", place):
        try:
            if (directory / "config.json").is_file() and not (directory / "apt_config.json").is_file() and base is None:  # an export
                return apt_ext.report(directory, None, place, rounds=rounds)
            trained = Trained.of(directory, base)
            model = trained.load()
            controller = trained.controller(model)
            more: dict[str, Any] = {"losses": trained.losses(), "exported": trained.exported, "metrics": _metrics(directory)}
            return apt_ext.report(model, controller, place, rounds=rounds, **more)
        except (ImportError, ValueError, RuntimeError) as error:
            raise Missing(f"report: {error}") from error


def _metrics(directory: Path) -> dict[str, float] | None:
    """What `apt-ext train` has measured at the end of the run in `directory`."""
    file = directory / "report.json"
    if not file.is_file():
        return None
    scores = read_json("directory", file).get("after", {}).get("scores")
    return scores or None
