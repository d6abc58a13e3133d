"""CUDA graphs whose owner captures them anew once what the host knows of a model changes, and what they need of the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

Check = Callable[[], str | None]
Update = Callable[[], object]


@dataclass(eq=False)
class HostPart:
    """What code within a step has asked for: what is done on the host before each replay.

    captured whether the step is being captured; False: it is the eager one before
    checks   each returns why the graph is not to be replayed any more, in words, or None
    updates  each brings up to date what the graph reads; they are called once all checks have passed
    modules  what the graph reads beside the model
    """

    captured: bool
    checks: list[Check] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)

    def outdated(self) -> str | None:
        """Return the first reason of a check not to replay any more, or None."""
        return next((why for check in self.checks if (why := check()) is not None), None)


_open: list[HostPart] = []  # of the captures that are going on, the innermost last


def is_recording() -> bool:
    """Return True within `recording`, in whatever thread: a recomputation runs in the backward's."""
    return any(part.captured for part in _open)


@contextmanager
def recording(captured: bool = True) -> Iterator[HostPart]:
    """Capture with what the host knows now. The caller throws the graph away when that changes, and does what the HostPart says.

    captured=False: run the step eagerly as it is to be captured next; what comes then is to be captured while all checks pass.
    """
    part = HostPart(captured)
    _open.append(part)
    try:
        yield part
    finally:
        _open.remove(part)


def before_each_replay(update: Update | None = None, *, check: Check | None = None, reads: Sequence[nn.Module] = ()) -> None:
    """Within a step that is captured, or will be next: have this done on the host before each replay, the first included.

    Elsewhere it does nothing.

    check   returns why the graph is not to be replayed any more, in words, and the step then runs eagerly and is captured anew; None: it
            is right. An error in it reaches the caller of the step, and nothing is replayed.
    update  called once all checks of the graph have passed; writes what the graph reads, on the current stream, into tensors that it
            holds. An error in it reaches the caller likewise.
    reads   modules beside the model that the graph reads: it is captured anew once their tensors lie elsewhere or their mode changes.

    The graph holds all of them until it is thrown away.
    """
    if not _open:
        return
    part = _open[-1]
    if update is not None:
        part.updates.append(update)
    if check is not None:
        part.checks.append(check)
    part.modules.extend(reads)
