"""torch.compile over whole models with adapters: dense, then masked to half, then cut, eager beside it.

Within max_rank a change of masks compiles nothing, so the same model goes from one stage to the next; a cut
changes sizes, and compiles once.
"""

from __future__ import annotations

import time
from dataclasses import asdict

import torch

from apt_ext.common import clock

from . import models
from .contenders import (
    PEAK_STEPS,
    Contender,
    beyond,
    failure,
    free_memory,
    held,
    stepper,
    take_turns,
    words_of,
)

WAYS_TO_RUN = ("eager", "compile", "reduce-overhead")
ROOM = 2 * models.RANK  # ranks may grow up to there
STAGES = ("dense", "masked", "cut")


def compilations():
    """Return how many graphs this process has compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class Staged:
    """One model and its step, which go through the stages."""

    def __init__(self, way, work, device, smoke):
        self.way, self.work, self.device, self.before = way, work, device, held(device)
        self.model, parameters = models.build("apt_ext", work, device, max_rank=ROOM)
        self.optimizer = models.adamw(parameters)
        batch = models.batch_of(work, device)
        self.step, _ = stepper(self.model, self.optimizer, batch, way, smoke)

    def enter(self, stage):
        """Bring the model there and make the first steps; return what is known before the clock runs."""
        graphs, started = compilations(), time.perf_counter()
        if stage == "masked":
            models.mask_half(self.model, self.work.multiple)
        elif stage == "cut":
            self.model.cut(self.optimizer)
        for _ in range(self.work.warm):
            self.step()
        clock.waiting_for(self.device)()
        spent = time.perf_counter() - started
        more = beyond(self.step, PEAK_STEPS, self.device)
        free_memory(self.device)
        peak = held(self.device) - self.before + more or None
        return {"peak": peak, "first steps": spent, "graphs compiled": compilations() - graphs}


def entered(live, stage, failed):
    """Bring all models to this stage, drop those that do not get there; return what each says of itself."""
    facts = {}
    for way in list(live):
        try:
            facts[way] = live[way].enter(stage)
            print(f"  {stage}, {way}: {facts[way]['first steps']:.1f} s until it runs", flush=True)
        except Exception as error:
            failed.append(failure(stage, way, words_of(error)))
            del live[way]
    return facts


def measure_stages(work, device, smoke):
    """Take an eager model and two compiled ones through the stages; return (rows, failed)."""
    live, rows, failed = {}, [], []
    for way in WAYS_TO_RUN:
        live[way] = Staged(way, work, device, smoke)
    for stage in STAGES:
        facts = entered(live, stage, failed)
        times, errors = take_turns({way: one.step for way, one in live.items()}, work, device)
        for way, words in errors.items():
            failed.append(failure(stage, way, words))
            del live[way]
        for way, seconds in times.items():
            contender = asdict(Contender("apt_ext", way, stage))
            rows.append({"group": "compiled", **contender, "seconds": seconds, **facts[way], "graph": None})
    live.clear()
    torch._dynamo.reset()
    free_memory(device)
    return rows, failed
