"""Run many cells: those that are still to do, in their order, in several processes, until a given time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from apt_ext.tools.data import Missing
from apt_ext.tools.models import transformers_offline
from apt_ext.tools.places import directory_for
from apt_ext.tools.processes import end_workers, submit, worker_pool

from .cell import Place, run_cell, trials
from .rows import rows_of
from .store import Cell, file_of, lines, read
from .tasks import TASKS, Task, check_pack

_number = 0  # of this worker process


def wanted(tasks: Collection[Task], rows: Sequence[str] | None, seeds: Sequence[int], densities: Sequence[float] | None) -> list[Cell]:
    """Return the cells of these tasks, rows, seeds and densities, by seed, task and row.

    Rows None: all but extra ones. Densities None: the task's.
    """
    found = []
    for seed in seeds:
        for task in tasks:
            known = rows_of(task)
            for name in [name for name, row in known.items() if (not row.extra if rows is None else name in rows)]:
                if known[name].pruned:
                    found += [Cell(task.name, name, seed, density) for density in densities or task.densities]
                else:
                    found.append(Cell(task.name, name, seed))
    return found


def stages(place: Place, cells: Sequence[Cell]) -> list[list[Cell]]:
    """Return what is not there yet of the cells and of the trials they need, in stages.

    Each stage needs the ones before: first trials, then those of pupils and the dense LoRAs, which become their
    teachers, then the rest.
    """
    tasks = {cell.task: place.task(cell) for cell in cells}
    rows = {(cell.task, cell.row): cell for cell in cells}
    teachers = {task for task, row in rows if rows_of(tasks[task])[row].teacher == "lora"}
    first = [trial for task, row in rows if rows_of(tasks[task])[row].teacher != "lora" for trial in trials(tasks[task], row)]
    first += [trial for task in teachers if (task, "lora") not in rows for trial in trials(tasks[task], "lora")]
    second = [trial for task, row in rows if rows_of(tasks[task])[row].teacher == "lora" for trial in trials(tasks[task], row)]
    dense = [cell for cell in cells if cell.row == "lora" and cell.task in teachers]
    last = [cell for cell in cells if cell not in dense]
    found = [[cell for cell in stage if not _there(place, cell)] for stage in (first, [*dense, *second], last)]
    return [stage for stage in found if stage]


def _there(place: Place, cell: Cell) -> bool:
    """Return whether the cell is there, whole. Say of one that cannot stand for it that it is made anew."""
    try:
        found = read(place.output, cell)
    except Missing as error:
        tqdm.write(f"{error}; it is made anew", file=sys.stderr)
        return False
    if found is not None and found["quick"] and not place.quick:
        tqdm.write(f"{cell.name}: in {place.output} of a quick run; it is made anew", file=sys.stderr)
        return False
    return found is not None


def _say_nameless(path: Path) -> None:
    """Say which lines name no cell: the report will refuse them, and nothing replaces them."""
    for line in lines(path):
        if line.cell is None:
            tqdm.write(f"{line.place}: expected a cell, got a line that names none; it stays there", file=sys.stderr)


def run_cells(place: Place, cells: Sequence[Cell], jobs: int = 1, minutes: float | None = None) -> list[str]:
    """Run what is missing of the cells, with a progress bar.

    Return a line for each that failed or was left for lack of time. Missing, before anything is run, where
    transformers or the data of a cell is not there.

    jobs     processes that run cells at the same time, spread over the GPUs; 1: this process, and only then times are kept
    minutes  no cell is started that would probably not be done by then
    """
    started, longest = time.monotonic(), 0.0
    said: list[str] = []

    def late() -> bool:
        return minutes is not None and time.monotonic() - started + longest > 60 * minutes

    transformers_offline()
    with directory_for("output", place.output):
        work = stages(place, cells)
        for task in dict.fromkeys(cell.task for stage in work for cell in stage):
            check_pack(place.pack, TASKS[task])
            _say_nameless(file_of(place.output, task))
        with _Workers(jobs) as workers, tqdm(total=sum(map(len, work)), desc="cells", unit="cell", smoothing=0) as bar:
            for stage in work:
                runs = _in_turn(place, stage, late) if jobs == 1 else workers.run(replace(place, alone=False), stage, late)
                for cell, outcome in runs:
                    if isinstance(outcome, str):
                        said.append(f"{cell.name}: {outcome}")
                        bar.write(said[-1])
                    else:
                        longest = max(longest, outcome["seconds"]["total"])
                        bar.write(_line(cell, outcome))
                    bar.update()
    return said


def _line(cell: Cell, outcome: dict[str, Any]) -> str:
    scores = " ".join(f"{part} {outcome['scores'][part]:.2f}" for part in ("validation", "test") if part in outcome["scores"])
    return f"{cell.name}: {outcome['measure']} {scores}, kept {100 * outcome['kept']['weights']:.1f} %, {outcome['seconds']['total']:.0f} s"


_LEFT = "not started: time is up"


def _in_turn(place: Place, cells: Sequence[Cell], late: Any) -> Iterable[tuple[Cell, dict[str, Any] | str]]:
    for cell in cells:
        yield cell, _LEFT if late() else _tried(place, cell)


class _Workers:
    """Keep processes that run cells side by side from stage to stage: what a process loads, it loads once."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._pool: Executor | None = None

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:  # interrupted: nobody waits for what would still have to be computed
            end_workers()
        self._stop()

    def run(self, place: Place, cells: Sequence[Cell], late: Callable[[], bool]) -> Iterator[tuple[Cell, dict[str, Any] | str]]:
        left = list(cells)
        running: dict[Future[Any], Cell] = {}
        while running or left:
            while left and len(running) < self.jobs and not late():
                cell = left.pop(0)
                running[submit(self._started(), _tried, place, cell)] = cell
            if not running:
                break
            broken = False
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                try:
                    yield cell, future.result()
                except BrokenProcessPool as error:
                    broken = True
                    yield cell, f"a process died: {error}"
            if broken:
                for cell in running.values():
                    yield cell, "a process died beside it"
                running = {}
                self._stop()
        for cell in left:
            yield cell, _LEFT

    def _started(self) -> Executor:
        if self._pool is None:
            self._pool = worker_pool(self.jobs, _begin, get_context("spawn").Value("i", 0), self.jobs)
        return self._pool

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _begin(counter: Any, jobs: int) -> None:
    """Give a worker that starts a number, by which it chooses a GPU, and its share of the processors."""
    global _number
    with counter.get_lock():
        _number = counter.value
        counter.value += 1
    torch.set_num_threads(max(torch.get_num_threads() // jobs, 1))


def _tried(place: Place, cell: Cell) -> dict[str, Any] | str:
    """Return the cell's result, or in a line what went wrong."""
    if place.device == "cuda" and not place.alone:
        torch.cuda.set_device(_number % torch.cuda.device_count())
    try:
        return run_cell(place, cell)
    except Exception as error:  # one cell that fails must not take the others with it
        text = " ".join(str(error).split())
        return f"failed: {type(error).__name__}: {text[:300]}"
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
