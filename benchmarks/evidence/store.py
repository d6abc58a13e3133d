"""Keep the cells of a task as lines of one file, cells-<task>.jsonl, sorted by the names of the cells.

A line is a JSON object. Its first key, "cell", is the cell's name, so that a damaged line still says whose it is.
`write` replaces the file in one step, under a lock: of cells that are done at the same time none is lost.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apt_ext.storage.atomic_file import replace_file
from apt_ext.tools.data import Missing, joined

from .rows import Row, rows_of
from .tasks import TASKS, Task

FORMAT = 1
Result = dict[str, Any]
_NAME = re.compile(rb'\{"cell": "([^"]*)"')


@dataclass(frozen=True)
class Cell:
    """Name one task, row, seed and density.

    density  None: the row is not pruned
    rate     the learning rate of a trial; None in a cell proper
    """

    task: str
    row: str
    seed: int
    density: float | None = None
    rate: float | None = None

    @property
    def name(self) -> str:
        parts = [self.task, self.row, *([] if self.density is None else [f"{100 * self.density:g}"])]
        return ".".join([*parts, f"trial-{self.rate:g}" if self.rate is not None else f"seed-{self.seed}"])

    def of(self) -> tuple[Task, Row]:
        return TASKS[self.task], rows_of(TASKS[self.task])[self.row]


@dataclass(frozen=True)
class Line:
    """One line of a file of cells. `cell` is the name that it begins with, or None."""

    path: Path
    number: int
    text: bytes

    @property
    def cell(self) -> str | None:
        found = _NAME.match(self.text)
        return found[1].decode(errors="replace") if found else None

    @property
    def place(self) -> str:
        return f"{self.path}:{self.number}"

    def result(self) -> Result:
        """Return what the line holds. Missing where that is no whole cell, or not the one that it names."""
        try:
            found = json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise Missing(f"{self.place}: expected a cell, got a line that cannot be read: {error}") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise Missing(f"{self.place}: expected a cell of format {FORMAT}, got another line")
        lacking = _lacking(found, _TRIED if found.get("trial") is True else _FINISHED)
        if lacking:
            raise Missing(f"{self.place}: expected a whole cell, got one without its {lacking}")
        task, row, density = found["task"], found["row"], found["density"]
        if task not in TASKS or row not in rows_of(TASKS[task]):
            raise Missing(f"{self.place}: expected a task and a row of this version, got {task}, {row}")
        pruned = rows_of(TASKS[task])[row].pruned
        if pruned != (density is not None) or (density is not None and not 0 < density < 1):
            expected = "a density between 0 and 1" if pruned else "no density"
            raise Missing(f"{self.place}: expected {expected} in a cell of {row}, got {density}")
        name = Cell(task, row, found["seed"], density, found["config"]["rate"] if found["trial"] else None).name
        if found.pop("cell", None) != name or self.path.name != file_of(self.path.parent, task).name:
            raise Missing(f"{self.place}: expected the cell that the line and the file name, got {name}")
        return found


def file_of(folder: Path, task: str) -> Path:
    return folder / f"cells-{task}.jsonl"


def lines(path: Path) -> list[Line]:
    """Return the lines of a file of cells, blank ones left out; none where there is no file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise Missing(f"{path}: expected a file of cells, got one that cannot be read: {error}") from error
    return [Line(path, number, text) for number, text in enumerate(content.split(b"\n"), 1) if text.strip()]


def read(folder: Path, cell: Cell) -> Result | None:
    """Return a cell's result, or None where there is none. Missing in words where its line is damaged."""
    found = [line for line in lines(file_of(folder, cell.task)) if line.cell == cell.name]
    if len(found) > 1:
        raise Missing(_again(found[1]))
    return found[0].result() if found else None


def load(folder: Path) -> list[Result]:
    """Return the results of all cells, by task and name. Missing names the lines that are no cells."""
    found: list[Result] = []
    damaged: list[str] = []
    for path in sorted(folder.glob(file_of(folder, "*").name)):
        names: set[str | None] = set()
        for line in lines(path):
            try:
                found.append(line.result())
            except Missing as error:
                damaged.append(str(error))
            else:
                damaged += [_again(line)] if line.cell in names else []
                names.add(line.cell)
    if damaged:
        raise Missing(joined(damaged))
    return found


def _again(line: Line) -> str:
    return f"{line.place}: expected each cell once, got {line.cell} again"


def write(folder: Path, cell: Cell, result: Result) -> None:
    """Put a cell's line in its place among the others, which stay as they are, damaged ones too."""
    folder.mkdir(parents=True, exist_ok=True)
    path = file_of(folder, cell.task)
    with _locked(path):
        kept = [line for line in lines(path) if line.cell != cell.name]
        kept.append(Line(path, 0, json.dumps({"cell": cell.name, **result}).encode()))
        kept.sort(key=lambda line: (line.cell is None, line.cell or ""))
        replace_file(path, b"".join(line.text + b"\n" for line in kept))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time into this context. Where the file system has no locks, all get in."""
    name = path.with_name(f".{path.name}.lock")
    while True:
        # Network file systems lock only what is open for writing.
        lock = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), name.stat()):
                break
        os.close(lock)  # the process that had it before has removed the file
    try:
        yield
    finally:
        name.unlink(missing_ok=True)
        os.close(lock)


# -- what a whole cell has -----------------------------------------------------------------------------------

_NUMBER = (int, float)
_TRIED: dict[str, Any] = {
    "task": str,
    "row": str,
    "seed": int,
    "density": (float, type(None)),
    "trial": bool,
    "quick": bool,
    "commit": str,
    "versions": {"torch": str},
    "device": str,
    "precision": str,
    "alone": bool,
    "config": {"rate": float},
    "scores": {"validation": _NUMBER},
    "kept": {"weights": _NUMBER},
    "history": [{"seconds": _NUMBER, "validation": _NUMBER}],
    "seconds": {"training": _NUMBER},
    "peak_memory_bytes": int,
}
_FINISHED = {**_TRIED, "scores": {"validation": _NUMBER, "test": _NUMBER}}
_OPTIONAL = {
    "inference": {"speedup": _NUMBER, "batch": int, "length": int, "dtype": str},
    "step_seconds": dict,
    "warmed": bool,
    "cudnn_attention": bool,
    "graphs": bool,
}


def _lacking(found: dict[str, Any], shape: dict[str, Any]) -> str | None:
    """Return the first key that is not there, or not of its kind."""
    for key, kind in {**shape, **{key: kind for key, kind in _OPTIONAL.items() if key in found}}.items():
        value = found.get(key, ...)
        nested = next(iter(kind)) if isinstance(kind, list) else kind
        expected = type(kind) if isinstance(kind, (dict, list)) else kind
        # To Python a bool is a number.
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
            return key
        for part in value if isinstance(kind, list) else [value]:
            if isinstance(nested, dict) and (not isinstance(part, dict) or _lacking(part, nested)):
                return key
    return None
