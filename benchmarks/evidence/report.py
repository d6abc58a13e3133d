"""Write tables and plots of the cells as one Markdown file. A cell that is not there is missing in words."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from apt_ext.storage.atomic_file import replace_file
from apt_ext.tools.data import Missing
from apt_ext.tools.places import directory_of

from .cell import TRIAL_SEED, on_cpu
from .gathered import Cells, Line, load_cells, machine_of, share_of
from .pictures import GAIN, draw_gain, draw_scores, gained
from .rows import rows_of
from .store import Result
from .tasks import TASKS, Task

_NONE = "missing"
_DRAWS, _OF_DENSE = 10_000, 0.97

_HEAD = """# Results on real data

Made by `apt-ext results` from the lines of `{folder}/cells-*.jsonl`; each has its commit, configuration, scores, times \
and widths. Do not edit.

## How to read them

- Every row of a task has the same number of optimizer steps and the same budget: one trial for each of its two learning rates (seed
  {trial}, at the task's first density), of which the better on validation is used for all of its cells. The test part is read once, by
  the cut, merged model. A LoRA teacher's own steps come on top; they are not in the training times.
- "LoRA, ... prune, recovery": half of the steps before the cut and half after it, each half with its own warm-up and decay. "At the
  start" and Shakespeare's one-shot rows: scored on {scored} sequences and cut before the first step. Self-distilled: the teacher is the
  student when pruning starts; the loss passes from the task's to the teacher's while it prunes, and is the task's again in the last
  quarter, as with a LoRA teacher.
- "kept" are the layers' weights; embeddings, pooler and head are left out. Heads and neurons go, at least one head and 8 neurons of a
  layer stay. On MiniLM each layer keeps its own number, on SmolLM2 all the same, which a stock config can say.
- A score is the mean over the seeds, with its range. A difference is paired by seed, with its 95 % bootstrap interval over the seeds;
  with so few seeds such intervals are too narrow. Cells, also those of one seed, come from the different machines that the last table
  names.
- Times are of cells that ran alone on their machine, n of them, after the same row had run in a few steps on a model that was thrown
  away, so that they do not hold the first use of each kernel ("warmed" in the cell; a line below the times names the rows with others).
  Where a machine is said to have APT's steps as CUDA graphs, rows with a Controller ran through `GraphedStep`, on batches padded to the
  longest text, and all others eagerly.
  Where a machine is said to have cuDNN's attention they hold its preparation, which takes longer than a step for every new length and
  number of heads, and a cut makes new numbers of heads. Peak memory is the allocator's on a GPU, model and data included; a process on a
  CPU has no count of its own tensors.
- MiniLM's weights are rounded to float16 once, and its word embeddings are those of the tokens that its tasks use. SmolLM2 is the 4-bit
  file of its package widened to float32; perplexity is over its whole vocabulary, on windows of 256 tokens.
"""


def write_report(folder: Path, report: Path) -> list[str]:
    """Write the Markdown file, and beside it a picture for each task with cells, and gain.png of
    all of them.

    Return what could not be made, in a sentence each. Where there are no cells, or a line among them is none,
    raise Missing and write nothing.
    """
    said: list[str] = []
    if folder.is_file():
        raise Missing(f"output: expected a directory with cells, got the file {str(folder)!r}")
    every = load_cells(folder)
    if not any(cells.found for cells in every.values()):
        raise Missing(f"output: expected a directory with cells (trials and quick ones are not counted), found none in {str(folder)!r}")
    parts = [_HEAD.format(folder=folder, trial=TRIAL_SEED, scored=TASKS["shakespeare"].scored)]

    def picture(name: str, title: str, draw: Callable[[Path], str]) -> None:
        try:
            parts.append(f"![{title}: {draw(report.with_name(name))}]({name})\n")
        except (ImportError, OSError) as error:
            said.append(str(error))

    with directory_of("report", report):
        shown = gained(every)
        if shown:
            picture(GAIN, "What a user gains", partial(draw_gain, shown))
        for name, cells in every.items():
            parts.append(_section(cells))
            if cells.found:
                picture(f"{report.stem}-{name}.png", cells.task.title, partial(draw_scores, cells))
        parts.append(_aims(every))
        parts.append(_making(every))
        replace_file(report, "\n".join(parts).encode())
    return said


# -- numbers -------------------------------------------------------------------------------------------------


def paired(ours: dict[int, float], theirs: dict[int, float]) -> tuple[float, float, float] | None:
    """Return the mean difference and the ends of its 95 % bootstrap interval, over the seeds that both have.

    With fewer than two such seeds return None.
    """
    differences = torch.tensor([ours[seed] - theirs[seed] for seed in ours if seed in theirs], dtype=torch.float64)
    if len(differences) < 2:
        return None
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(differences), (_DRAWS, len(differences)), generator=generator)
    low, high = torch.quantile(differences[drawn].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(differences.mean()), low, high


def time_to(task: Task, result: Result, dense: float) -> float | None:
    """Return the training seconds until validation first was 97 % of `dense`, or None where it never was."""
    return next((entry["seconds"] for entry in result["history"] if share_of(task, entry["validation"], dense) >= _OF_DENSE), None)


def _spread(values: Sequence[float], form: str = "{:.1f}") -> str:
    if not values:
        return _NONE
    mean = form.format(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ({form.format(min(values))} to {form.format(max(values))})"


def _percent(shares: Sequence[float]) -> str:
    return f"{100 * statistics.fmean(shares):.1f} %" if shares else _NONE


def _difference(ours: dict[int, float], theirs: dict[int, float]) -> str:
    found = paired(ours, theirs)
    if found is not None:
        return "{:+.1f} ({:+.1f} to {:+.1f})".format(*found)
    both = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return f"{both[0]:+.1f}" if both else _NONE


# -- tables --------------------------------------------------------------------------------------------------


def _section(cells: Cells) -> str:
    task = cells.task
    unit = "test accuracy, %" if task.classes else "test perplexity (lower is better)"
    text = [f"## {task.title}\n", f"{task.steps} steps of {task.batch} sequences. Score: {unit}.\n"]
    head = ["row", "kept", "seeds", "score", "of dense LoRA", "minus dense LoRA", "minus one-shot", "rate"]
    rows = []
    for name, density in cells.lines():
        found, tests = cells.of(name, density), cells.tests(name, density)
        dense = cells.tests("lora")
        kept = [result["kept"]["weights"] for result in found.values()]
        rows.append(
            [
                _titled(task, name, density),
                _percent(kept),
                str(len(tests)),
                _spread(list(tests.values())),
                _percent(cells.shares(name, density)),
                "" if name == "lora" else _difference(tests, dense),
                "" if density is None or name == "oneshot" else _difference(tests, cells.tests("oneshot", density)),
                ", ".join(sorted({f"{result['config']['rate']:g}" for result in found.values()})) or _NONE,
            ]
        )
    text += [_table(head, rows), "", _times(cells)]
    return "\n".join(text)


def _times(cells: Cells) -> str:
    """Write seconds and bytes of the cells that ran alone, in a table for each kind of machine.

    A line names the rows that have none.
    """
    task = cells.task
    reference = [result["scores"]["validation"] for result in cells.of("lora").values()]
    machines = cells.alone()
    parts = [_times_on(task, machine, lines, reference) for machine, lines in machines.items()]
    without = [line for line in cells.lines() if not any(line in lines for lines in machines.values())]
    parts += [f"Not measured alone: {_listed(task, without)}."] if without else []
    return "\n\n".join(parts) + "\n"


def _times_on(task: Task, machine: str, lines: dict[Line, list[Result]], reference: list[float]) -> str:
    head = ["row", "n", "training, s", f"s to {100 * _OF_DENSE:g} % of dense LoRA's validation", "peak memory, MB", "inference, x dense"]
    rows: list[list[str]] = []
    for (name, density), alone in lines.items():
        times = [time_to(task, result, statistics.fmean(reference)) for result in alone] if reference else []
        reached = [value for value in times if value is not None]
        rows.append(
            [
                _titled(task, name, density),
                str(len(alone)),
                _spread([result["seconds"]["training"] for result in alone]),
                _spread(reached) if len(reached) == len(times) else f"not reached in {len(times) - len(reached)} of {len(times)}",
                "" if on_cpu(alone[0]) else _spread([result["peak_memory_bytes"] / 1e6 for result in alone], "{:.0f}"),
                "" if density is None else _spread([one["speedup"] for one in _inferences(alone)], "{:.2f}"),
            ]
        )
    sizes = sorted({f"{one['batch']} x {one['length']} {one['dtype']}" for alone in lines.values() for one in _inferences(alone)})
    note = f"Measured on: {machine}. Inference: the cut model against the dense stock one, in turn{''.join(', ' + size for size in sizes)}."
    cold = [line for line, alone in lines.items() if not all(result.get("warmed") for result in alone)]
    first = [f"The first use of each kernel is within the times of: {_listed(task, cold)}."] if cold else []
    return "\n\n".join([_table(head, rows), note, *first])


def _inferences(results: Iterable[Result]) -> list[dict[str, Any]]:
    return [result["inference"] for result in results if "inference" in result]


def _titled(task: Task, row: str, *densities: float | None) -> str:
    shares = ", ".join(f"{100 * density:g}" for density in densities if density is not None)
    return rows_of(task)[row].title + (f", {shares} %" if shares else "")


def _listed(task: Task, lines: list[Line]) -> str:
    """Name lines of the tables in one, each row once with its densities."""
    shares = {row: [density for name, density in lines if name == row] for row in rows_of(task)}
    return "; ".join(_titled(task, row, *found) for row, found in shares.items() if found)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _aims(every: dict[str, Cells]) -> str:
    """Write what was aimed at, and what came out."""
    rows = []

    def add(task: Task, aim: str, least: float, found: Sequence[float], text: str) -> None:
        rows.append([task.title, aim, text, _NONE if not found else "yes" if statistics.fmean(found) >= least else "no"])

    for cells in every.values():
        task = cells.task
        if not task.classes:
            continue
        for density, least in ((0.4, 0.99), (0.2, 0.98)):
            shares = cells.shares("apt", density)
            add(task, f"APT at {100 * density:g} %: {100 * least:g} % of dense LoRA's score", least, shares, _percent(shares))
        ours, once = cells.tests("apt", 0.2), cells.tests("oneshot", 0.2)
        above = [ours[seed] - once[seed] for seed in ours if seed in once]
        add(task, "APT at 20 %: 3 points above one-shot", 3.0, above, _difference(ours, once))
        inferences = _inferences(cells.of("apt", 0.4).values())
        # The precisions are those that cells infer in there.
        for where, least, dtype in (("CUDA", 1.6, "bfloat16"), ("a CPU", 2.0, "float32")):
            ratios = [one["speedup"] for one in inferences if one["dtype"] == dtype]
            add(task, f"APT at 40 %: inference {least:g} times dense on {where}", least, ratios, _spread(ratios, "{:.2f}"))
    return "## Aims\n\n" + _table(["task", "aim", "found", "reached"], rows) + "\n"


def _making(every: dict[str, Cells]) -> str:
    """Write the commands, and which commits, seeds and machines the cells came from."""
    machines: dict[str, list[Result]] = {}
    for result in (result for cells in every.values() for found in cells.found.values() for result in found.values()):
        machines.setdefault(f"{machine_of(result)}, torch {result['versions']['torch']}", []).append(result)

    def values(of: list[Result], what: Callable[[Result], Any]) -> str:
        return ", ".join(map(str, sorted({what(result) for result in of})))

    rows = [
        [machine, str(len(of)), values(of, lambda result: result["seed"]), values(of, lambda result: result["commit"][:12])]
        for machine, of in sorted(machines.items())
    ]
    commands = ["apt-ext results --prepare .data/results", "apt-ext results --task all --row all --seed 0-4", "apt-ext results"]
    trials = [trial for cells in every.values() for trial in cells.trials]
    said = [f"Trials beside them: {len(trials)}, at {values(trials, lambda trial: trial['commit'][:12])}.", ""] if trials else []
    table = _table(["machine", "cells", "seeds", "commits"], rows)
    return "\n".join(["## How these were made\n", "```", *commands, "```\n", table, "", *said])
