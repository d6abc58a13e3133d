"""Steps of a model that shrinks while it trains: before a Controller's first event, up to its last, after."""

from __future__ import annotations

import apt_ext
from apt_ext.common import clock

from . import models
from .contenders import beyond, facts, free_memory, held, words_of

EVENTS, BETWEEN, WINDOW = 4, 4, 2
STEPS = 24  # in each part
PARTS = {
    "before": "before the first event",
    "events": "events",
    "after": "after the last event",
}
RUNS = {  # title: (with a GraphedStep, what the Controller is told)
    "apt_ext, default shrink": (False, {}),
    "apt_ext, default shrink, GraphedStep": (True, {}),
    "apt_ext, shrink=compact": (False, {"shrink": "compact"}),
}


def round_to(work):
    """Return how many neurons go at a time: as many chunks as there are heads (groups that share a key).

    With joint=False kinds keep the same share of their chunks; of like numbers that is half of both.
    """
    heads = work.sizes.get("num_key_value_heads", work.sizes["num_attention_heads"])
    return work.sizes["intermediate_size"] // heads


def controlled(work, device, steps, told):
    """Make a model of ours under a Controller that prunes half of all heads and neurons in four events."""
    model = models.apt_model(work, device)
    optimizer = models.adamw(list(apt_ext.adapter_parameters(model)))
    start, pruning = work.warm + steps, EVENTS * BETWEEN
    controller = apt_ext.Controller(
        model,
        optimizer,
        start + pruning + work.warm + steps,
        prune=["heads", "neurons"],
        # a little more than half, because norms and biases count and stay
        density=0.501 if work.sizes["hidden_size"] > 64 else 0.52,
        round_to=round_to(work),
        joint=False,
        growth=1.0,
        schedule=apt_ext.Schedule(start=start, end=start + pruning, events=EVENTS, window=WINDOW),
        export="per_layer",  # no file is written, so none has to be stock
        **told,
    )
    return model, optimizer, controller


def stepper(model, optimizer, batch, graphed, controller):
    """Return a function that makes one training step."""

    def step():
        if graphed is not None:
            graphed(**batch)
        else:
            model(**batch).loss.backward()
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()

    return step


def measured(step, warm, steps, device, before):
    """Make `warm` steps and then `steps` that count, each timed alone with the device idle around it."""
    wait = clock.waiting_for(device)
    for _ in range(warm):
        step()
    seconds = []
    more = beyond(lambda: seconds.append(clock.seconds(step, wait)), steps, device)
    return {"seconds": clock.spread(seconds), "peak": held(device) - before + more or None}


def run_of(title, work, device, steps):
    """Train once; return what its parts took and what the events left."""
    with_graph, told = RUNS[title]
    before = held(device)
    model, optimizer, controller = controlled(work, device, steps, told)
    graphed = apt_ext.GraphedStep(model) if with_graph else None
    step = stepper(model, optimizer, models.batch_of(work, device), graphed, controller)
    found = {}
    for part, warm, count in (
        ("before", work.warm, steps),
        ("events", 0, EVENTS * BETWEEN),
        ("after", work.warm, steps),
    ):
        found[part] = measured(step, warm, count, device, before)
    controller.remove()
    history = [{key: event[key] for key in ("step", "density", "kept")} for event in controller.history]
    return {**found, "history": history, "graph": facts(graphed)}


def measure_events(work, device, smoke):
    """Make every run, one after the other; return ({title: what it took}, failed)."""
    runs, failed = {}, []
    for title in RUNS:
        try:
            runs[title] = run_of(title, work, device, 3 if smoke else STEPS)
        except Exception as error:
            failed.append({"group": "events", "what": title, "error": words_of(error)})
        free_memory(device)
    return runs, failed
