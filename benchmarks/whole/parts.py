"""What each case measures. A part has a process of its own, so that patches and memory do not leak."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from . import models
from .contenders import Contender, measure_group
from .events import measure_events
from .friends import measure_stages
from .merging import measure_merges
from .origin import header
from .works import WORKS

DROPOUT = 0.05
HALVES = ("compact", "chain", "cut")
PEFT, FULL, APT = Contender("PEFT"), Contender("full"), Contender("apt_ext")
REDUCED = Contender("PEFT", "reduce-overhead")


def ours(way, *forms, **changes):
    """Return our contenders of these forms."""
    return [Contender("apt_ext", way, form, **changes) for form in forms]


@dataclass(frozen=True)
class Part:
    """Describe what one process measures.

    groups  {name: contenders that take turns}
    liger   whether Liger's kernels are to be there
    layers  fewer of them than the model has
    stages  also torch.compile over what is masked and then cut
    events  also runs under a Controller
    merges  also merge_and_unload
    """

    work: str
    groups: dict = field(default_factory=dict)
    liger: bool = False
    layers: int | None = None
    stages: bool = False
    events: bool = False
    merges: bool = False


def beside(peer, *forms, **changes):
    """Return groups of this peer and one GraphedStep each, so that its graph alone is in memory."""
    return {f"graphed, {form}": [peer, *ours("GraphedStep", form, **changes)] for form in forms}


DROPPED = {"dropout": DROPOUT}
SEEN_AGAIN = {"checkpointing": True}
PARTS = {
    "roberta": {
        "roberta": Part(
            "roberta",
            {
                "eager": [FULL, PEFT, *ours("eager", "dense", *HALVES)],
                "graphed": ours("GraphedStep", "dense", *HALVES),
            },
        ),
        "roberta-compiled": Part(
            "roberta",
            {"one graph": [*ours("GraphedStep", "dense", "cut"), REDUCED]},
        ),
    },
    "llama": {
        "llama": Part(
            "llama",
            {"eager": [FULL, PEFT, *ours("eager", "dense", *HALVES)]},
            liger=True,
            merges=True,
        ),
        "llama-graphed": Part("llama", beside(PEFT, "dense"), liger=True),
        "llama-cut-graphed": Part("llama", beside(PEFT, "cut"), liger=True),
    },
    "7b": {
        "7b": Part("7b", {"eager": [PEFT, *ours("eager", "dense", "cut")]}, liger=True, merges=True),
        "7b-graphed": Part("7b", beside(PEFT, "dense"), liger=True),
        "7b-cut-graphed": Part("7b", beside(PEFT, "cut"), liger=True),
    },
    "dropout": {
        "roberta-dropout": Part(
            "roberta",
            {"eager": [APT, *ours("eager", "dense", "cut", **DROPPED), replace(PEFT, **DROPPED)]},
        ),
        "roberta-dropout-compiled": Part(
            "roberta",
            {"one graph": [*ours("GraphedStep", "dense", "cut", **DROPPED), replace(REDUCED, **DROPPED)]},
        ),
        "llama-dropout": Part(
            "llama",
            {"eager": [APT, *ours("eager", "dense", "cut", **DROPPED), replace(PEFT, **DROPPED)]},
            liger=True,
        ),
    },
    "friends": {
        "compile": Part("roberta", stages=True, layers=6),
        "checkpointing": Part(
            "llama",
            {
                "eager": [
                    PEFT,
                    replace(PEFT, **SEEN_AGAIN),
                    APT,
                    *ours("eager", "dense", "cut", **SEEN_AGAIN),
                ],
            },
            liger=True,
        ),
        "without-liger": Part(
            "llama",
            {"eager": [PEFT, *ours("eager", "dense", "cut")], **beside(PEFT, "dense", "cut")},
        ),
    },
    "events": {
        "roberta-events": Part("roberta", {"eager": [PEFT, APT]}, events=True),
        "llama-events": Part("llama", {"eager": [PEFT, APT]}, liger=True, events=True),
    },
}
ALL = {name: part for parts in PARTS.values() for name, part in parts.items()}


def measure_part(name, device, smoke, write):
    """Measure one part; `write` gets all that is known after each of its measurements."""
    part, started = ALL[name], time.perf_counter()
    work = WORKS[part.work]
    if part.layers:
        work = replace(work, sizes=work.sizes | {"num_hidden_layers": part.layers})
    work = work.smoke() if smoke else work
    version, absent = models.apply_liger(device) if part.liger else (None, "not asked for")
    found = header(work, device, {"version": version, "absent": absent})
    found |= {"rows": [], "failed": []}

    def keep(measured):
        rows, failed = measured
        found["rows"] += rows
        found["failed"] += failed
        found["seconds"] = time.perf_counter() - started
        write(found)

    for group, contenders in part.groups.items():
        keep(measure_group(group, contenders, work, device, smoke))
    if part.stages:
        keep(measure_stages(work, device, smoke))
    if part.events:
        found["runs"], failed = measure_events(work, device, smoke)
        keep(([], failed))
    if part.merges:
        found["merge_and_unload"], failed = measure_merges(work, device)
        keep(([], failed))
    return found
