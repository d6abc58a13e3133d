"""What merge_and_unload of a whole model takes, PEFT's and ours."""

from __future__ import annotations

from apt_ext.common import clock

from . import models
from .contenders import failure, free_memory, words_of

TIMES = 3


def measure_merges(work, device):
    """Return ({kind: the spread of its seconds}, failed); a new model each time, the kinds in turn."""
    wait = clock.waiting_for(device)
    found, failed = {"PEFT": [], "apt_ext": []}, []
    for _ in range(TIMES):
        for kind in list(found):
            try:
                model, _ = models.build(kind, work, device)
                found[kind].append(clock.seconds(model.merge_and_unload, wait))
            except Exception as error:
                del found[kind]
                failed.append(failure("merge_and_unload", kind, words_of(error)))
            model = None
            free_memory(device)
    return {kind: clock.spread(seconds) for kind, seconds in found.items()}, failed
