"""Detect mask or merge changes between a checkpointed forward and its recomputation, which would give wrong gradients."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from .. import _C

_REMEMBERED = 32  # a recomputation of what is older than so many changes is refused


@dataclass
class _Held:
    """A function that was computed from a moment on.

    parts           {what decides on the function: a value that is equal where that is}
    thread, moment  who made the change, and the number that the next autograd node of that thread had then
    used            a forward ran since
    """

    parts: dict[str, Any]
    thread: int
    moment: int
    used: bool = False


class FunctionHistory:
    """The functions that one module has computed: under which masks, merged or not, disabled or not. A copy starts anew."""

    def __init__(self, **parts: Any) -> None:
        self._now = _Held(parts, *_C.next_moment())
        self._history: deque[_Held] = deque([self._now], maxlen=_REMEMBERED)

    def note(self, **parts: Any) -> None:
        """These parts are what they are now from here on, the others as they were. Equal values stand for the same function."""
        parts = {**self._now.parts, **parts}
        if parts == self._now.parts:
            return
        thread, moment = _C.next_moment()
        last = self._now
        if not last.used and (last.thread, last.moment) == (thread, moment):  # nothing was computed meanwhile
            self._history.pop()
        self._now = _Held(parts, thread, moment)
        self._history.append(self._now)

    def check(self) -> None:
        """For each forward: RuntimeError where it runs inside a backward and recomputes a forward of another function than that of now.

        The node that runs the recomputation was made together with the forward it repeats (a reentrant checkpoint is that
        node, a non-reentrant one runs when a node made in it asks for a tensor), and a thread numbers its nodes. A node of
        another thread than the one that made the changes cannot be placed among them: there a function is refused that no
        forward computed since it became another. Not for compiled code.
        """
        if torch._C._current_graph_task_id() == -1:
            self._now.used = True
            return
        node = _C.node_moment()
        if node is not None and not self._computed_at(*node):
            raise RuntimeError(
                "masks changed (set_masks, a merge or disable_adapter) between a checkpointed forward and its recomputation; "
                "call backward() before the change"
            )
        self._now.used = True

    def _computed_at(self, thread: int, moment: int) -> bool:
        """Whether the function of now is the one of the forward that made this node."""
        now = self._now
        if now.thread == thread and now.moment <= moment:
            return True
        history = tuple(self._history)
        before = max((i for i, held in enumerate(history) if held.thread == thread and held.moment <= moment), default=None)
        later = (i for i, held in enumerate(history) if held.thread == thread and held.moment > moment)
        possible = history[before or 0 : min(later, default=len(history))]
        if len(possible) == 1 and before is not None:
            return possible[0].parts == now.parts
        if possible and possible[-1] is now and now.used:
            return True
        if before is None and (not possible or len(history) == _REMEMBERED):
            return False  # older than what is remembered
        used = [held for held in possible if held.used]
        return bool(used) and all(held.parts == now.parts for held in used)

    def __reduce__(self) -> tuple[Any, tuple[dict[str, Any]]]:
        return _anew, (self._now.parts,)


def _anew(parts: dict[str, Any]) -> FunctionHistory:
    return FunctionHistory(**parts)


def version(tensor: torch.Tensor) -> int | None:
    """How many writes torch has counted; None for a tensor made in inference mode, of which it counts none."""
    return None if tensor.is_inference() else tensor._version
