"""Time the training of a few cells, one after the other in this process: `apt-ext results --times`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from apt_ext.tools.models import transformers_offline

from .cell import Place, train_alone
from .store import Cell
from .tasks import check_pack

_DENSE = "lora"


def time_cells(place: Place, cells: Sequence[Cell], steps: int | None = None) -> list[dict[str, Any]]:
    """Train the cells alone and print what each took, and its share of the dense LoRA's time of the same task and seed.

    Nothing is written or scored. Learning rates are those that the trials in the output chose, or the row's first.

    steps  None: the task's
    """
    transformers_offline()
    found: list[dict[str, Any]] = []
    for cell in cells:
        task = place.task(cell)
        check_pack(place.pack, task)
        trained = train_alone(place, cell, replace(task, steps=steps or task.steps))
        clock = trained.clock
        found.append({"cell": cell.name, "steps": clock.steps, "seconds": clock.seconds, "step seconds": clock.step_seconds})
        dense = next((one["seconds"] for one in found if one["cell"] == replace(cell, row=_DENSE, density=None).name), None)
        of_dense = "" if dense is None else f", {clock.seconds / dense:.2f} of dense LoRA"
        median, each = 1e3 * statistics.median(clock.step_seconds), 1e3 * clock.seconds / clock.steps
        print(f"{cell.name}: {clock.seconds:.2f} s, {clock.steps} steps of {each:.2f} ms, median {median:.2f} ms{of_dense}", flush=True)
    return found
