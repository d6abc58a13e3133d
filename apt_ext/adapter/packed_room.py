"""Memory for what is kept of a weight.

room           a vector of a size that a compiler does not compile in
CapturedRooms  the vectors that CUDA graphs read, which live as long as somebody may replay them
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 8  # values: a compiler takes sizes of 0 and 1 for constants


def room(values: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate a vector for so many values, uninitialised; where they are few it is larger."""
    with torch.inference_mode(False), torch.no_grad():  # as an inference tensor no backward could read it
        return as_dynamic(torch.empty(max(_LEAST, values), dtype=dtype, device=device))


def as_dynamic(vector: Tensor) -> Tensor:
    """Mark the size as one that changes, so that a compiler keeps it open from its first compilation.

    This is what `torch._dynamo.maybe_mark_dynamic(vector, 0)` leaves on a tensor. Importing that takes
    seconds, and whoever compiles may import it long after this vector was made.
    """
    vector._dynamo_weak_dynamic_indices = {0}  # type: ignore[attr-defined]
    vector._has_dynamo_dim_marking = True  # type: ignore[attr-defined]
    return vector


class CapturedRooms:
    """The vectors that CUDA graphs were captured with.

    They take memory whether they are used or not, so what is kept later lies in one of them as long as it
    fits. What nobody has written there for the present masks reads NaN.
    """

    def __init__(self) -> None:
        self._held: list[Tensor] = []

    def hold(self, vector: Tensor) -> None:
        """Keep `vector` for life."""
        if not self._holds(vector):
            self._held.append(vector)

    def fitting(self, values: int) -> Tensor | None:
        """Return the smallest one that has room for so many values."""
        return min((one for one in self._held if len(one) >= values), key=len, default=None)

    def blank(self, vector: Tensor | None, used: int) -> None:
        """Let what lies beyond `used` values read NaN where `vector` is one of these: a graph may read it."""
        if vector is not None and self._holds(vector):
            with torch.inference_mode(False), torch.no_grad():
                vector[used:].fill_(float("nan"))

    def _holds(self, vector: Tensor) -> bool:
        return any(one is vector for one in self._held)
