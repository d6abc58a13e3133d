"""Gather the cells of each task, as tables and pictures ask for them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from .cell import on_cpu
from .rows import rows_of
from .store import Result, load
from .tasks import TASKS, Task

Line = tuple[str, float | None]  # of the tables: row and density


@dataclass
class Cells:
    """Hold the results of one task: {(row, density): {seed: result}}."""

    task: Task
    found: dict[Line, dict[int, Result]] = field(default_factory=dict)
    trials: list[Result] = field(default_factory=list)

    def of(self, row: str, density: float | None = None) -> dict[int, Result]:
        return self.found.get((row, density), {})

    def tests(self, row: str, density: float | None = None) -> dict[int, float]:
        return {seed: result["scores"]["test"] for seed, result in sorted(self.of(row, density).items())}

    def shares(self, row: str, density: float | None = None) -> list[float]:
        """Return the test scores as shares of the dense LoRA's, by seed."""
        tests, dense = self.tests(row, density), self.tests("lora")
        return [share_of(self.task, tests[seed], dense[seed]) for seed in tests if seed in dense]

    def lines(self) -> list[Line]:
        """Return each line of the tables, with extra rows and densities where there are cells of them."""
        found: list[Line] = []
        rows = rows_of(self.task)
        others = {density for _, density in self.found if density is not None} - {*self.task.densities}
        for density in (None, *self.task.densities, *sorted(others, reverse=True)):
            for name, row in rows.items():
                asked = not row.extra and density not in others
                if row.pruned == (density is not None) and (asked or self.of(name, density)):
                    found.append((name, density))
        return found

    def alone(self) -> dict[str, dict[Line, list[Result]]]:
        """Return {machine and precision: {line: its results, by seed}}, the machine with most lines first.

        Only cells count that had their machine for themselves.
        """
        found: dict[str, dict[Line, list[Result]]] = {}
        for line in self.lines():
            for _, result in sorted(self.of(*line).items()):
                if result["alone"]:
                    found.setdefault(machine_of(result), {}).setdefault(line, []).append(result)
        return dict(sorted(found.items(), key=lambda machine: -len(machine[1])))


def load_cells(folder: Path) -> dict[str, Cells]:
    """Return {task: its cells} without quick ones. Missing names the lines that are no cells."""
    every = {name: Cells(task) for name, task in TASKS.items()}
    for result in load(folder):
        if result["quick"]:
            continue
        of_task = every[result["task"]]
        if result["trial"]:
            of_task.trials.append(result)
        else:
            of_task.found.setdefault((result["row"], result["density"]), {})[result["seed"]] = result
    return every


def machine_of(result: Result) -> str:
    """Name what a cell's times hold for."""
    attention = ", cuDNN's attention" if not on_cpu(result) and result.get("cudnn_attention", True) else ""
    graphs = ", APT's steps as CUDA graphs" if result.get("graphs") else ""
    return f"{result['device']}, {result['precision']}{attention}{graphs}"


def share_of(task: Task, score: float, dense: float) -> float:
    """Return a score as a share of the dense one. Perplexities are turned round, so that more is better."""
    share, of = (score, dense) if task.classes else (dense, score)
    return share / of if of else math.nan
