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
from .obstacles import obstacle
from .standing import Standing

_HELD = "legacy stream"  # in CUDA's words where a node of an earlier forward joins the capture

Lines = Callable[[Any], Any]  # of a batch: forward and backward; what comes back is detached


class CaptureFailed(Exception):
    """Why, in words. The pool that it used is not to be used again."""


def _leave_capture() -> None:
    """After a capture that the device has ended: torch leaves its generators in it, until the end of a capture that succeeds."""
    place = torch.zeros(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        place.add_(1)


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
            self._capture(lines, pool, around)
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

    def _capture(self, lines: Lines, pool: Any, around: AbstractContextManager[None]) -> None:
        cause: list[Exception] = []
        try:
            # Other threads may allocate meanwhile: a DataLoader pins memory.
            captured = torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local")
            with around, own_capture.recording() as self._host, captured:
                try:
                    self._output = lines(self._batch)
                    for module in self._host.modules:
                        if (why := obstacle(module)) is not None:
                            raise RuntimeError(why)
                    sums = [listener.sums() for listener in self._listeners]
                    self._sizes = [[len(one) for one in found] for found in sums]
                    flat = [one for found in sums for one in found]
                    self._sums = torch.cat(flat) if flat else None
                except Exception as error:
                    cause.append(error)
                    raise
        except BaseException as error:
            del self._graph
            _leave_capture()
            if not isinstance(error, Exception):
                raise
            first = cause[0] if cause else error
            words = str(first).strip().split("\n", 1)[0]
            if _HELD in words:
                words += "; a loss or outputs of an earlier forward still hold its graph of autograd: detach them, or let go of them"
            raise CaptureFailed(f"capturing it failed with {type(first).__name__}: {words}") from first

    def outdated(self) -> str | None:
        """Return why this graph is not to be replayed any more, as far as the lines themselves know it; None where it may be."""
        for module, before in self._beside:
            if not Standing(module, frozenset()).is_like(before):
                return f"the {type(module).__name__} beside the model is another than it was"
        return self._host.outdated()

    def replay(self, batch: Any, device: torch.device) -> Any:
        """Run the launches on `batch`. Returns copies of what `lines` gave. The gradients are then in their buffers."""
        for update in self._host.updates:
            update()
        for mine, given in zip(self._inputs, signature(batch, device)[1], strict=True):
            mine.copy_(given, non_blocking=True)
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
