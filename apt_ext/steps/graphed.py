"""GraphedStep: forward and backward of a training step as one CUDA graph, captured anew by itself when masks, ranks or sizes change."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..common.checks import checked_int, checked_number
from .batches import with_tensors
from .replayer import Replayer

Loss = Callable[[Any, Any], Any]


class GraphedStep:
    """Forward and backward of one batch, replayed as one CUDA graph where that is possible. The optimizer stays yours.

        step = apt_ext.GraphedStep(model)
        for batch in batches:
            out = step(**batch)  # instead of out = model(**batch); out.loss.backward()
            controller.observe()
            optimizer.step()
            optimizer.zero_grad()
            controller.step()

    It leaves in `.grad` what the eager lines leave there, added to what is there. The first batch of each shape runs eagerly; with the
    second the step is captured, and from then on replayed. Whatever the host knows of the model may change between two calls (masks,
    ranks, a cut, a merge, another mode, loaded weights): the next batch runs eagerly and the one after it is captured anew. While masks
    move from step to step one graph serves all their values. What salience hears is part of the graph.

    A gradient that a replay leaves in `.grad` is a buffer of the graph: it holds until the next call, unless it is not set to None before
    it. Python code runs at the capture only: what a `loss` of your own reads beside the model and the batch is as it was then, so hand
    over what changes as a tensor of the batch. A Distiller's loss is followed where its progress is a function.

    Where a step cannot be captured (on the CPU, under DDP and FSDP, a model that waits for the device, hooks of others) the same lines
    run eagerly; the logger says why, once, and so does `reason`.

    Args:
        model: an APTModel or another module, on one GPU.
        loss: called with (model, batch), returns a scalar or (scalar, outputs); None: the model's own, `model(**batch).loss`. The batch
            is what `step(**batch)` is given by name, or what it is given by position.
        accumulate: micro-batches of one optimizer step; each loss is divided by it.
        autocast: torch.bfloat16 or torch.float16: the forward runs under `torch.autocast` of it. None: as the caller's context says.
        scaler: a GradScaler whose scale the loss is multiplied with before the backward.
        shapes: graphs that are kept at once, one a shape of batch; batches of further shapes run eagerly. They share their memory, so
            all of them take about what the largest takes.
        enabled: "auto"; False: always eagerly; True: a RuntimeError instead of an eager step where a step cannot be captured.

    Raises TypeError and ValueError for these arguments. A call raises TypeError or ValueError for a loss that is no scalar, and what
    model, loss and backward raise.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | None = None,
        *,
        accumulate: int = 1,
        autocast: torch.dtype | None = None,
        scaler: Any = None,
        shapes: int = 8,
        enabled: str | bool = "auto",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a Module, got {type(model).__name__}")
        if loss is not None and not callable(loss):
            raise TypeError(f"loss: expected a function of (model, batch) or None, got {type(loss).__name__}")
        if autocast is not None and autocast not in (torch.bfloat16, torch.float16):
            raise TypeError(f"autocast: expected torch.bfloat16, torch.float16 or None, got {autocast!r}")
        if scaler is not None and not callable(getattr(scaler, "scale", None)):
            raise TypeError(f"scaler: expected a GradScaler or None, got {type(scaler).__name__}")
        if enabled != "auto" and not isinstance(enabled, bool):
            raise ValueError(f'enabled: expected "auto", True or False, got {enabled!r}')
        self._model, self._loss, self._autocast, self._scaler = model, loss, autocast, scaler
        self._named = _named_arguments(model)
        self._accumulate = checked_int("accumulate", accumulate, 1)
        self._replayer = Replayer(model, checked_int("shapes", shapes, 1), enabled)

    # -- what it tells ---------------------------------------------------------------------------------------------------

    @property
    def graphed(self) -> bool:
        """Whether there is a graph that the next batch of its shape is replayed from."""
        return self._replayer.graphed

    @property
    def reason(self) -> str | None:
        """Why the last call ran eagerly, in words; None where it was replayed, or was the first of its shape."""
        return self._replayer.reason

    @property
    def captures(self) -> int:
        """How many graphs have been captured so far."""
        return self._replayer.captures

    @property
    def memory(self) -> int:
        """Bytes of device memory that the graphs hold for their activations, gradients and outputs."""
        return self._replayer.memory

    def reset(self) -> None:
        """Let go of all graphs and their memory, and forget why captures failed."""
        self._replayer.reset()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "GraphedStep: expected to stay with its model, got a copy or a pickle of one; make another for the copy of the model"
        )

    # -- a step ----------------------------------------------------------------------------------------------------------

    def __call__(self, /, *inputs: Any, _divide: float | None = None, **batch: Any) -> Any:
        """Run forward and backward of one batch.

        `_divide` takes the place of `accumulate` this once. Returns what the model gives (loss=None), or what `loss` gives: detached
        tensors, which are yours.
        """
        divide = self._accumulate if _divide is None else checked_number("_divide", _divide)
        if not divide > 0:
            raise ValueError(f"_divide: expected a number above 0, got {_divide!r}")
        if self._loss is None:  # a function of the batch may read its order, and so may a forward of what it has no name for
            named = self._named & batch.keys()
            batch = {name: batch[name] for name in sorted(named)} | {name: value for name, value in batch.items() if name not in named}
        return self._replayer.run(self._lines, inputs, batch, divide)

    # -- the lines themselves --------------------------------------------------------------------------------------------

    def _lines(self, inputs: tuple[Any, ...], batch: dict[str, Any], divide: float, leaves: list[Tensor] | None) -> Any:
        """Forward and backward, as a loop has them."""
        with self._precision():
            if self._loss is None:
                found = self._model(*inputs, **batch)
                loss = _own_loss(found)
            else:
                found = self._loss(self._model, _one_batch(inputs, batch))
                loss = found[0] if isinstance(found, tuple) and found else found
        _check_loss(loss)
        scaled = loss if divide == 1 else loss / divide
        if self._scaler is not None:
            scaled = self._scaler.scale(scaled)
        if leaves is not None:
            leaves.extend(_leaves(scaled))
        scaled.backward()
        return with_tensors(found, Tensor.detach)

    def _precision(self) -> AbstractContextManager[Any]:
        if self._autocast is None:
            return nullcontext()
        kind = next((one.device.type for one in self._model.parameters()), "cpu")
        return torch.autocast(kind, self._autocast)


def _named_arguments(model: nn.Module) -> frozenset[str]:
    """Names of what the forward takes by name, whatever the order; none where it cannot be told."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return frozenset()
    return frozenset(one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY))


def _own_loss(found: Any) -> Any:
    loss = found.get("loss") if isinstance(found, Mapping) else getattr(found, "loss", None)
    if loss is None and isinstance(found, tuple) and found:
        loss = found[0]
    if loss is None and isinstance(found, Tensor):
        loss = found
    if loss is None:
        raise ValueError(
            f"loss: expected the model to give one, got {type(found).__name__} without; put labels into the batch, or give a loss"
        )
    return loss


def _one_batch(inputs: tuple[Any, ...], batch: dict[str, Any]) -> Any:
    if inputs and batch:
        raise TypeError(f"batch: expected all of it by name or all by position, got {len(inputs)} by position beside {sorted(batch)}")
    return batch if not inputs else inputs[0] if len(inputs) == 1 else inputs


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss: expected a scalar tensor, or (scalar, outputs), got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"loss: expected one value, got a tensor of shape {list(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError(
            "loss: expected one with a gradient, got a constant: grad mode is off, nothing that it was made of requires a gradient, or it "
            "was detached, as what GraphedStep returns is, because it has run the backward already"
        )


def _leaves(loss: Tensor) -> list[Tensor]:
    """The tensors that a backward of `loss` gives a gradient, but for those within functions that run a backward of their own."""
    found: dict[int, Tensor] = {}
    waiting: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        waiting.extend(one for one, _ in node.next_functions)
    return list(found.values())
