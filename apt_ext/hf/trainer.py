"""transformers' Trainer with a Controller in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Trainer

from ..method.controller import Controller
from .callback import APTCallback
from .refusals import refuse_run


class APTTrainer(Trainer):
    """A Trainer that prunes the APTModel it trains.

        trainer = APTTrainer(apt_model, args, train_dataset=data, apt=dict(density=0.4, prune=["neurons"]))

    Args:
        args, kwargs: what Trainer takes.
        apt: what a Controller takes by name, a dict; or an APTCallback. None: the one among `callbacks`, or what the model's config says.
        graph: "auto" or False: every step runs eagerly. True is refused, because this version captures no whole steps.

    Attributes:
        apt: the APTCallback; `controller` is its Controller.

    Raises TypeError and ValueError for these arguments, and what Trainer and APTCallback raise.
    """

    def __init__(self, *args: Any, apt: Mapping[str, Any] | APTCallback | None = None, graph: str | bool = "auto", **kwargs: Any) -> None:
        if graph not in ("auto", False):
            raise ValueError(f'graph: expected "auto" or False, because this version captures no whole steps, got {graph!r}')
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

    @property
    def controller(self) -> Controller | None:
        """The Controller of the run; None before the first."""
        return self.apt.controller
