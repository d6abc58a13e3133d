"""One forward and backward as a CUDA graph: captured, and replayed with other batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..common import own_capture
from .batches import signature, with_tensors
from .capture import capture
from .obstacles import obstacle
from .standing import Standing

Lines = Callable[[Any], Any]  # of a batch: forward and backward; what comes back is detached


class Recording:
    """The launches of `lines(batch)` for batches of one signature.

    Gradients lie in buffers of the graph, as what is handed back and what salience hears does: they are valid until any graph of the same
    pool is replayed.

    gradients   {Parameter: its gradient's buffer}
    """

    def __init__(
        self,
        lines: Lines,
        batch: Any,
        device: torch.device,
        parameters: Sequence[Tensor],
        listeners: Sequence[_C.Listener],
        pool: Any,
        around: AbstractContextManager[None],
    ) -> None:
        """Capture; nothing runs on the device. CaptureFailed leaves gradients, listeners and generators as they were."""
        self._batch = with_tensors(batch, torch.clone)
        self._inputs = signature(self._batch, device)[1]
        self._listeners = listeners
        self._output: Any = None
        gradients = [parameter.grad for parameter in parameters]
        heard = [listener.sums() for listener in listeners]
        self._graph = torch.cuda.CUDAGraph()
        try:
            for parameter in parameters:
                parameter.grad = None
            for listener in listeners:
                listener.forget()
            torch.clear_autocast_cache()
            self._capture(lines, pool, around, device)
            self._beside = [(module, Standing(module, frozenset())) for module in self._host.modules]
            self.gradients = {one: one.grad for one in parameters if one.grad is not None}
        finally:
            torch.clear_autocast_cache()
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            for listener, found in zip(listeners, heard, strict=True):
                listener.forget()
                if found:
                    listener.add(found)

    def _capture(self, lines: Lines, pool: Any, around: AbstractContextManager[None], device: torch.device) -> None:
        with around, own_capture.recording() as self._host:
            capture(self._graph, lambda: self._run(lines), pool, device)

    def _run(self, lines: Lines) -> None:
        self._output = lines(self._batch)
        for module in self._host.modules:
            if (why := obstacle(module)) is not None:
                raise RuntimeError(why)
        sums = [listener.sums() for listener in self._listeners]
        self._sizes = [[len(one) for one in found] for found in sums]
        flat = [one for found in sums for one in found]
        self._sums = torch.cat(flat) if flat else None

    def outdated(self) -> str | None:
        """Return why this graph is not to be replayed any more, as far as the lines themselves know it; None where it may be."""
        for module, before in self._beside:
            if not Standing(module, frozenset()).is_like(before):
                return f"the {type(module).__name__} beside the model is another than it was"
        return self._host.outdated()

    def replay(self, tensors: Sequence[Tensor], device: torch.device) -> Any:
        """Run the launches on the tensors of a batch, as its signature lists them.

        Returns copies of what `lines` gave. The gradients are then in their buffers.
        """
        for update in self._host.updates:
            update()
        for mine, given in zip(self._inputs, tensors, strict=True):
            mine.copy_(given, non_blocking=True)
        with torch.cuda.device(device):
            self._graph.replay()
        if self._sums is not None:
            parts = iter(torch.split(self._sums.clone(), [size for sizes in self._sizes for size in sizes]))
            for listener, sizes in zip(self._listeners, self._sizes, strict=True):
                if sizes:
                    listener.add([next(parts) for _ in sizes])
        return with_tensors(self._output, torch.clone)


def take_over(gradients: dict[Tensor, Tensor], owned: dict[Tensor, Tensor]) -> None:
    """Give every Parameter the gradient of a replay, added to what it has, as a backward does."""
    added: list[tuple[Tensor, Tensor]] = []
    for parameter, gradient in gradients.items():
        if parameter.grad is None:
            parameter.grad = gradient
            owned[parameter] = gradient
        else:
            added.append((parameter.grad, gradient))
    if added:
        with torch.no_grad():
            torch._foreach_add_([old for old, _ in added], [new for _, new in added])


def let_go(owned: dict[Tensor, Tensor]) -> None:
    """Copy the gradients that still are a graph's own buffers, before the next replay writes there."""
    mine = [parameter for parameter, gradient in owned.items() if parameter.grad is gradient]
    if mine:
        with torch.no_grad():
            copies = torch._foreach_mul([owned[parameter] for parameter in mine], 1.0)
        for parameter, copy in zip(mine, copies, strict=True):
            parameter.grad = copy
    owned.clear()


def reserved(pools: Sequence[Any]) -> int:
    """Return the bytes of device memory in pools of graphs."""
    if not pools:
        return 0
    ours = set(map(tuple, pools))
    segments: list[dict[str, Any]] = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    return sum(one["total_size"] for one in segments if tuple(one["segment_pool_id"]) in ours)
