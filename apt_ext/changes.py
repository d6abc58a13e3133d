"""When a module last became another function: what activation checkpointing recomputes must be older than no change."""

from __future__ import annotations

import torch

from . import _C


class Changes:
    """The last change of one module: of its masks, by a merge, by disable_adapter. A copy starts anew."""

    def __init__(self) -> None:
        self.note()

    def note(self) -> None:
        """The module computes another function from now on: what is recomputed belongs to graphs made from now on."""
        self._thread, self._moment = _C.next_moment()
        self._used = False

    def check(self) -> None:
        """For each forward: RuntimeError where it runs inside a backward and recomputes a forward from before the last change.

        The node that runs the recomputation was made together with the forward it repeats (a reentrant checkpoint is that
        node, a non-reentrant one runs when a node made in it asks for a tensor), and a thread numbers its nodes. A node of
        another thread cannot be compared: there only a change with no forward after it is noticed. Not for compiled code.
        """
        if torch._C._current_graph_task_id() == -1:
            self._used = True
            return
        node = _C.node_moment()
        if node is None:
            return
        thread, moment = node
        if moment < self._moment if thread == self._thread else not self._used:
            raise RuntimeError(
                "masks changed (set_masks, a merge or disable_adapter) between a checkpointed forward and its recomputation; "
                "call backward() before the change"
            )

    def __reduce__(self) -> tuple[type[Changes], tuple[()]]:
        return Changes, ()
