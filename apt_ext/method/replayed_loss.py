"""What a CUDA graph of a Distiller's loss reads of the host: the weight of the teacher, and which layers are drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..common import own_capture

Progress = float | Callable[[], float]
PRUNED = (
    "loss: a Distiller in a CUDA graph compares each layer with the teacher's of its number, and of a layer of the student a block is "
    "pruned whole"
)


def weight_of(progress: Progress) -> float:
    """mu: the number, or what the function gives now, taken into [0, 1]. TypeError, ValueError naming `progress`."""
    value = progress() if callable(progress) else progress
    if not isinstance(value, Real) or isinstance(value, bool):
        of = " of the function" if callable(progress) else ""
        raise TypeError(f"progress: expected a number{of}, got {type(value).__name__}")
    if math.isnan(value):
        raise ValueError("progress: expected a number, got NaN")
    return min(max(float(value), 0.0), 1.0)


class Buffers:
    """Where graphs of one Distiller's loss read. Eager calls make them, because what is made within a capture has no values."""

    def __init__(self) -> None:
        self._made: dict[str, Tensor] = {}

    def get(self, name: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[size] on the device. RuntimeError within a capture that no eager call came before."""
        found = self._made.get(name)
        if found is None or found.shape != (size,) or found.device != device:
            if own_capture.is_recording():
                raise RuntimeError("loss: expected an eager call of the Distiller for outputs like these before a graph, got none")
            found = self._made[name] = torch.zeros(size, dtype=dtype, device=device)
        return found


class ReplayedLoss:
    """One graph of the loss.

    stacks   which are compared: whether it is an encoder before a decoder, and the number of its layers

    weights  float64 [2]: mu and 1 - mu
    draw     the layers of a stack of so many, drawn anew; called once a replay for each stack, in the order of the loss
    """

    def __init__(self, progress: Progress, weights: Tensor, draw: Callable[[int], list[int]]) -> None:
        if not callable(progress):
            raise RuntimeError(
                "loss: a Distiller in a CUDA graph needs its progress as a function, such as lambda: controller.progress, and got a "
                "number, which each replay would use again"
            )
        self._progress, self._weights, self._draw = progress, weights, draw
        self.stacks: list[tuple[bool, int]] = []
        self._drawn: list[Tensor] = []  # which layers of each stack

    def write(self) -> None:
        """Bring up to date what the graph reads."""
        mu = weight_of(self._progress)
        self._weights.copy_(torch.tensor([mu, 1.0 - mu], dtype=torch.float64, device="cpu"), non_blocking=True)
        for (_, count), drawn in zip(self.stacks, self._drawn, strict=True):
            drawn.copy_(torch.tensor(self._draw(count), device="cpu"), non_blocking=True)

    def mixed(self, taught: Tensor, task: Tensor) -> Tensor:
        """mu * taught + (1 - mu) * task, as Python numbers give it."""
        mu, rest = self._weights.unbind()
        return _scaled(taught, mu) + _scaled(task, rest)

    def drawn(self, encoder: bool, ours: Sequence[Tensor], theirs: Sequence[Tensor], buffer: Tensor) -> list[tuple[list[Tensor], Tensor]]:
        """Of each drawn layer the student's state, alone in a list, and the teacher's; `buffer` says which they are."""
        self.stacks.append((encoder, len(ours)))
        self._drawn.append(buffer)
        for name, states in (("student", ours), ("teacher", theirs)):
            if len({(one.dtype, one.shape) for one in states}) > 1:
                raise RuntimeError(f"loss: a Distiller in a CUDA graph needs hidden states of one dtype and shape, the {name}'s differ")
        mine, taught = (torch.stack(list(states)).index_select(0, buffer).unbind() for states in (ours, theirs))
        return [([one], other) for one, other in zip(mine, taught, strict=True)]


def _scaled(value: Tensor, weight: Tensor) -> Tensor:
    # A Python number is multiplied in float32 at least, and the product rounded to the value's dtype.
    exact = torch.promote_types(value.dtype, torch.float32)
    return (value.to(exact) * weight.to(exact)).to(value.dtype)


def settings_of(distiller: Any) -> tuple[Any, ...]:
    """What a graph of the loss keeps as it was at the capture, beside tensors."""
    return (
        distiller.teacher,
        distiller.transform,
        distiller.logits,
        distiller.layers,
        distiller.temperature,
        distiller.quarters,
    )
