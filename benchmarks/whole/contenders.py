"""Ways to train one model, and what a group of them takes when they take turns.

Time: steps in a row, the device idle before the first and after the last; a value a round. Memory: what the
contender itself holds between steps, and what a step takes beyond that. A CUDA graph keeps its memory between
steps, so the whole of its pool counts, as far as it is reserved; elsewhere it is what is allocated.
"""

from __future__ import annotations

import gc
import time
from dataclasses import asdict, dataclass

import torch

import apt_ext
from apt_ext.common import clock

from . import models

WAYS = ("eager", "GraphedStep", "compile", "reduce-overhead")
PEAK_STEPS = 2  # whose memory is looked at


@dataclass(frozen=True)
class Contender:
    """Describe one way to train: the kind of model, its form, how its step runs."""

    kind: str
    way: str = "eager"
    form: str = "dense"
    dropout: float = 0.0
    checkpointing: bool = False

    @property
    def title(self):
        """Return it in words."""
        words = [self.kind, "" if self.form == "dense" else f"half: {self.form}"]
        words += ["" if self.way == "eager" else self.way]
        words += [f"dropout {self.dropout}" if self.dropout else ""]
        words += ["checkpointing" if self.checkpointing else ""]
        return ", ".join(filter(None, words))


def compiled(model, way, smoke):
    """Compile the model in this way; at toy sizes on a CPU without a backend, which is what takes time."""
    options = {"backend": "eager"} if smoke else {} if way == "compile" else {"mode": way}
    return torch.compile(model, **options)


def stepper(model, optimizer, batch, way, smoke):
    """Return (a function that makes one training step, the GraphedStep in it or None)."""
    graphed = apt_ext.GraphedStep(model) if way == "GraphedStep" else None
    call = model if way in ("eager", "GraphedStep") else compiled(model, way, smoke)

    def step():
        if graphed is not None:
            graphed(**batch)
        else:
            call(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, graphed


def facts(graphed):
    """Return what a GraphedStep says of itself, as plain values."""
    if graphed is None:
        return None
    return {name: getattr(graphed, name) for name in ("graphed", "reason", "captures", "memory")}


def free_memory(device):
    """Give back to a GPU what nobody holds."""
    if device.type == "cuda":
        gc.collect()  # hooks make cycles
        torch.cuda.empty_cache()


def held(device):
    """Return the bytes that live tensors and the pools of CUDA graphs hold."""
    if device.type != "cuda":
        return 0
    found = 0
    for segment in torch.cuda.memory_snapshot():
        of_graph = tuple(segment["segment_pool_id"]) != (0, 0)
        found += segment["total_size" if of_graph else "allocated_size"]
    return found


def beyond(step, times, device):
    """Call `step` so often; return the bytes that it takes beyond what is allocated before; 0 on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = allocated(torch.cuda.memory_allocated, device)
    for _ in range(times):
        step()
    return allocated(torch.cuda.max_memory_allocated, device) - before


def allocated(ask, device):
    """Ask the allocator of a CUDA device once it is idle."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    return ask(device)


class Live:
    """A contender that was built and has made its first steps."""

    def __init__(self, contender, work, device, smoke):
        started, before = time.perf_counter(), held(device)
        model, parameters = models.build(
            contender.kind,
            work,
            device,
            contender.form,
            contender.dropout,
        )
        if contender.checkpointing:
            models.checkpoint_activations(model)
        batch = models.batch_of(work, device)
        self.step, self.graphed = stepper(model, models.adamw(parameters), batch, contender.way, smoke)
        for _ in range(work.warm):
            self.step()
        clock.waiting_for(device)()
        self.first = time.perf_counter() - started
        more = beyond(self.step, PEAK_STEPS, device)
        free_memory(device)
        self.peak = held(device) - before + more or None  # None on a CPU


class Guarded:
    """A step that can fail while others go on: the first error is its last step."""

    def __init__(self, step):
        self.step, self.error = step, None

    def __call__(self):
        """Make a step, unless one has failed."""
        if self.step is not None:
            try:
                self.step()
            except Exception as error:
                self.step, self.error = None, words_of(error)


def words_of(error):
    """Say an error in one line; the error itself would hold the model."""
    return f"{type(error).__name__}: {error}"[:500]


def take_turns(steps, work, device):
    """Return ({name: the spread of its seconds a step}, {name: the error of one that failed})."""
    calls = {name: Guarded(step) for name, step in steps.items()}
    times = clock.in_turn(calls, work.rounds, clock.waiting_for(device), work.least)
    errors = {name: call.error for name, call in calls.items() if call.error is not None}
    return {name: clock.spread(times[name]) for name in calls if name not in errors}, errors


def failure(group, what, words):
    """Return one line of what failed."""
    return {"group": group, "what": what, "error": words}


def say(title, live):
    """Say that a contender has made its first steps, and how long it took: compilers may take minutes."""
    print(f"  {title}: {'failed' if live is None else f'{live.first:.1f} s until it runs'}", flush=True)


def measure_group(group, contenders, work, device, smoke):
    """Build the contenders, let them take turns; return (rows, failed), and leave no memory behind."""
    live, failed = {}, []
    for contender in contenders:
        try:
            live[contender] = Live(contender, work, device, smoke)
        except Exception as error:
            failed.append(failure(group, contender.title, words_of(error)))
        free_memory(device)
        say(contender.title, live.get(contender))
    times, errors = take_turns({contender: one.step for contender, one in live.items()}, work, device)
    failed += [failure(group, contender.title, words) for contender, words in errors.items()]
    rows = []
    for contender, seconds in times.items():
        one = live[contender]
        found = {"seconds": seconds, "peak": one.peak, "first steps": one.first, "graph": facts(one.graphed)}
        rows.append({"group": group, **asdict(contender), **found})
    live.clear()
    free_memory(device)
    return rows, failed
