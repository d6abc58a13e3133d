"""Which tokens of a pass count: the masks that a model was called with, found again where the pass is recomputed in a backward."""

from __future__ import annotations

import inspect
import threading
from bisect import bisect_right
from typing import Any

import torch
from torch import Tensor, nn

from .. import _C

MASKS = ("attention_mask", "decoder_attention_mask")


class Passes:
    """The masks of the passes with gradients since the last `forget`, by thread.

    A thread numbers the nodes of its graphs, and a recomputation runs in a node made together with the pass that it repeats.
    """

    def __init__(self, model: nn.Module) -> None:
        self.forget()
        self._positions = [name for name, parameter in _parameters(model).items() if parameter.kind in _POSITIONAL]

    def note(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is called."""
        given = {**dict(zip(self._positions, args, strict=False)), **kwargs}
        masks = {name: given[name] != 0 for name in MASKS if isinstance(given.get(name), Tensor) and given[name].dim() == 2}
        thread, node = _now()
        passes = self._passes.setdefault(thread, [])
        passes.insert(bisect_right(passes, node, key=_node), (node, masks))
        if not _is_in_backward():
            self._here.masks = masks

    def mask(self, name: str) -> Tensor | None:
        """[batch, length] bool: the tokens that count in the pass that runs here, or None where it was given no such mask."""
        if not _is_in_backward():  # at each site of each forward
            return getattr(self._here, "masks", {}).get(name)
        thread, node = _now()
        passes = self._passes.get(thread, [])
        before = bisect_right(passes, node, key=_node)
        return passes[before - 1][1].get(name) if before else None

    def forget(self) -> None:
        self._passes: dict[int, list[tuple[int, dict[str, Tensor]]]] = {}  # {thread: (first node, masks) of each pass, in order}
        self._here = threading.local()  # the masks of this thread's last pass

    def __len__(self) -> int:
        return sum(map(len, self._passes.values()))


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(model.forward).parameters)


def _node(one: tuple[int, dict[str, Tensor]]) -> int:
    return one[0]


def _is_in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _now() -> tuple[int, int]:
    """(thread, number) of the autograd node that runs here, or of the next one made here."""
    node = _C.node_moment() if _is_in_backward() else None
    return node or _C.next_moment()
