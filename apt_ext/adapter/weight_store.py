"""Where the whole weight of a compacted layer is: in its place, or in host memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PLACES = ("keep", "cpu")


class WeightStore:
    """The base layer's weight while a layer is compacted.

    place  "keep": it stays where it is. "cpu": in host memory, and the Parameter reads NaN.
    host   the weight as it is stored ([N, K], or Conv1D's [K, N]) while it is in host memory, else None. It is replaced,
           never written.
    """

    def __init__(self) -> None:
        self.place = "keep"
        self.host: Tensor | None = None

    @property
    def is_offloaded(self) -> bool:
        """True while the Parameter reads NaN."""
        return self.host is not None

    def offload(self, weight: Tensor | None, shape: tuple[int, int]) -> None:
        """Give the memory of `weight` back, where `place` says so; `shape` is what it reads from then on."""
        if self.place == "keep" or weight is None or weight.is_meta:
            return
        if self.host is None:
            with torch.inference_mode(False), torch.no_grad():
                self.host = weight.detach().to("cpu", copy=True)
        self.blank(weight, shape)

    def restore(self, weight: Tensor | None) -> None:
        """Let `weight` hold what it says again."""
        if self.host is None or weight is None:
            return
        with torch.inference_mode(False), torch.no_grad():
            if self.host.is_meta:
                value = torch.empty(self.host.shape, dtype=weight.dtype, device=weight.device)
            else:
                value = self.host.to(weight.device, copy=True)  # a teacher may share the host's copy
            weight.set_(value)  # type: ignore[call-overload]
        self.host = None

    def blank(self, weight: Tensor | None, shape: tuple[int, int]) -> None:
        """Let `weight` be of `shape` and read NaN everywhere, in the memory of one value."""
        if weight is not None:
            with torch.inference_mode(False), torch.no_grad():
                weight.set_(weight.new_full((), float("nan")).expand(shape))  # type: ignore[call-overload]

    def empty(self, weight: Tensor | None) -> None:
        """Let `weight` have no entries: what moves a module would give each of them memory."""
        if self.host is not None and weight is not None:
            with torch.inference_mode(False), torch.no_grad():
                weight.set_(weight.new_empty(weight.shape[:1])[:0])  # type: ignore[call-overload]

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply what `nn.Module._apply` does to a module's tensors; the copy stays on the host."""
        if self.host is not None:
            moved = fn(self.host)
            self.host = moved if moved.is_meta else moved.cpu()
