"""transformers' Trainer with a Controller in it, and each step as one CUDA graph."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from ..method.controller import Controller
from ..steps.replayer import Replayer
from .callback import APTCallback
from .refusals import refuse_run

logger = logging.getLogger("apt_ext")

_SHAPES = 8  # graphs that are kept at once


class APTTrainer(Trainer):
    """A Trainer that prunes the APTModel it trains.

        trainer = APTTrainer(apt_model, args, train_dataset=data, apt=dict(density=0.4, prune=["neurons"]))

    On a GPU forward and backward of a step are one CUDA graph, as `apt_ext.GraphedStep` describes it.

    Args:
        args, kwargs: what Trainer takes.
        apt: what a Controller takes by name, a dict; or an APTCallback. None: the one among `callbacks`, or what the model's config says.
        graph: "auto": a graph where a step can be captured and the loss is Trainer's own. A `compute_loss` or
            `compute_loss_func` of yours may read what changes from step to step, which a graph would not see, so it runs eagerly. True: a
            graph for a loss of yours, too, and a RuntimeError where a step cannot be captured. False: eagerly.

    Attributes:
        loss_is_graphable: of a subclass, True where its `compute_loss` reads nothing beside its arguments that changes from step to step
            without a graph knowing of it (as a Distiller's loss that is given a function as its progress); "auto" then takes it, too.
        apt: the APTCallback; `controller` is its Controller.
        graphed: whether steps are replayed from a graph now. graph_reason: why the last one was not, in words, or None.

    Raises TypeError and ValueError for these arguments, and what Trainer and APTCallback raise.
    """

    loss_is_graphable = False

    def __init__(self, *args: Any, apt: Mapping[str, Any] | APTCallback | None = None, graph: str | bool = "auto", **kwargs: Any) -> None:
        if graph != "auto" and not isinstance(graph, bool):
            raise ValueError(f'graph: expected "auto", True or False, got {graph!r}')
        if not (apt is None or isinstance(apt, Mapping | APTCallback)):
            raise TypeError(f"apt: expected a dict of a Controller's arguments, an APTCallback or None, got {type(apt).__name__}")
        callback = apt if isinstance(apt, APTCallback) else APTCallback(**(apt or {}))
        super().__init__(*args, **kwargs)
        there = [one for one in self.callback_handler.callbacks if isinstance(one, APTCallback)]
        if there and apt is not None or len(there) > 1:
            raise ValueError(f"apt: expected one APTCallback, got another among the {len(there)} of callbacks; give one of the two")
        if not there:
            refuse_run(self.args, self.model)
            self.add_callback(callback)
        self.apt = there[0] if there else callback
        self.graph = graph
        self._replayer: Replayer | None = None
        self._eager_reason: str | None = None

    @property
    def controller(self) -> Controller | None:
        """The Controller of the run; None before the first."""
        return self.apt.controller

    @property
    def graphed(self) -> bool:
        """Whether steps are replayed from a graph now."""
        return self._replayer is not None and self._replayer.graphed

    @property
    def graph_reason(self) -> str | None:
        """Why the last step ran eagerly, in words; None where it was replayed, or was the first of its shape."""
        return self._eager_reason if self._replayer is None else self._replayer.reason

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Trainer's own, replayed as one graph where `graph` says so."""
        why = self._why_eager()
        if why is not None:
            if self.graph is True:
                raise RuntimeError(f"graph: expected a step that can be captured for graph=True, got one that cannot: {why}")
            if why != self._eager_reason and self.graph == "auto":
                logger.log(logging.WARNING if self.args.device.type == "cuda" else logging.INFO, "APTTrainer: steps run eagerly: %s", why)
            self._eager_reason, self._replayer = why, None
            return super().training_step(model, inputs, num_items_in_batch)
        self._eager_reason = None
        if self._replayer is None or self._replayer.model is not model:
            self._replayer = Replayer(model, _SHAPES, self.graph)
        # What a step does on the host is done before it is replayed.
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # type: ignore[union-attr]
        batch = {"num_items_in_batch": num_items_in_batch, **self._prepare_inputs(inputs)}
        found: Tensor = self._replayer.run(self._lines, (), batch, self.current_gradient_accumulation_steps)
        return found

    def _lines(self, _: tuple[Any, ...], batch: dict[str, Any], __: Any, leaves: list[Tensor] | None) -> Tensor:
        assert self._replayer is not None
        given = dict(batch)
        items = given.pop("num_items_in_batch")
        return super().training_step(self._replayer.model, given, items)

    def _why_eager(self) -> str | None:
        """Why no step is captured, as far as it does not depend on the model."""
        if self.graph is False:
            return "graph=False"
        if self.args.device.type != "cuda":
            return f"CUDA graphs need a GPU, and the model is on {self.args.device}"
        if self.args.torch_empty_cache_steps is not None:
            return "torch_empty_cache_steps empties the cache within a step"
        own = "compute_loss_func" if self.compute_loss_func is not None else "compute_loss"
        own_loss = _has_own_loss(self) and not self.loss_is_graphable
        if self.graph == "auto" and (self.compute_loss_func is not None or own_loss):
            return f"{own} is yours, and what it reads beside its arguments would stay as it was at the capture; graph=True allows it"
        return None


def _has_own_loss(trainer: APTTrainer) -> bool:
    """Whether `compute_loss` is not Trainer's."""
    return "compute_loss" in vars(trainer) or type(trainer).compute_loss is not Trainer.compute_loss
