"""A Controller for the runs of transformers' Trainer."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config import nearest
from ..distributed import agreement
from ..distributed.dtensor import is_sharded
from ..method.controller import Controller
from ..method.refusals import apt_model_in
from ..model import APTModel
from ..storage import state_directory
from .refusals import refuse_run

logger = logging.getLogger("apt_ext")

_OWN = ("self", "model", "optimizer", "total_steps")  # what the run gives
_TAKEN = tuple(name for name in inspect.signature(Controller.__init__).parameters if name not in _OWN)


class APTCallback(TrainerCallback):
    """Prunes the APTModel that a Trainer trains, and lets its ranks grow.

        trainer = Trainer(apt_model, args, train_dataset=data, callbacks=[APTCallback(density=0.4, prune=["neurons"])])
        trainer.train()
        apt_ext.export(apt_model, "smaller-model")

    Each `train()` makes a new Controller once its optimizer exists, with the run's number of steps. Checkpoints hold the Controller's
    state, and `train(resume_from_checkpoint=...)` goes on from it. Density, ranks and what is kept come into the logs, and so to
    TensorBoard and W&B. Until the last event has been, no evaluation counts for the best checkpoint or for early stopping.

    Args:
        controller_arguments: what `apt_ext.Controller` takes by name, but its model, optimizer and total_steps.

    Attributes:
        controller: the Controller of the run; None before the first.

    Raises TypeError for an argument that a Controller does not have. The Trainer's creation raises TypeError for a model without adapters,
    RuntimeError under DeepSpeed and nn.DataParallel. `train` raises what a Controller does, before the first step.
    """

    def __init__(self, **controller_arguments: Any) -> None:
        for name in controller_arguments:
            if name in _OWN:
                raise TypeError(f"{name}: expected no such argument, because the run gives it, got {controller_arguments[name]!r}")
            if name not in _TAKEN:
                raise TypeError(f"{name}: expected an argument of apt_ext.Controller, got another{nearest(name, _TAKEN)}")
        self.arguments = controller_arguments
        self.controller: Controller | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Refuse what cannot be trained so, and come before the callbacks that report."""
        refuse_run(args, model)
        self._come_first()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any) -> None:
        """Make the Controller of this run; of a run that is resumed, as its checkpoint says."""
        refuse_run(args, model)
        self._come_first()
        if self.controller is not None:
            self.controller.remove()
        apt, arguments = apt_model_in(model), dict(self.arguments)
        if getattr(args, "torch_compile", False) and arguments.get("shrink") is None:
            arguments["shrink"] = "compact"
            logger.warning(
                "APTCallback: torch_compile compiles the model, so what is pruned is compacted and not cut; shrink= says otherwise"
            )
        self.controller = Controller(model, optimizer, _total_steps(apt, state), **arguments)
        if state.global_step:
            try:
                _resume(self.controller, apt, state.global_step, _checkpoint(args, state))
            except BaseException:
                self.controller.remove()
                raise
        elif self._counts():
            _forget_best(state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let the Controller read the gradients."""
        if self.controller is not None:
            self.controller.observe()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let the Controller move masks, cut and grow ranks."""
        if self.controller is None:
            return
        unfinished = not self.controller.done
        self.controller.step()
        if unfinished and self._counts():
            _forget_best(state)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the Controller's state beside FSDP's own files, which do not hold it."""
        if self.controller is not None and _is_sharded(self.controller) and state.is_world_process_zero:
            self.controller.save(_checkpoint(args, state))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Add density, ranks and what is kept to what is logged of training."""
        if self.controller is None or logs is None or "loss" not in logs:
            return
        found = measures(self.controller)
        logs.update(found)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(found)  # Trainer has copied the logs already

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say what is unfinished, and take the hooks off."""
        if self.controller is None:
            return
        if not self.controller.done:
            logger.warning("APTCallback: %s", _unfinished(self.controller, state))
        self.controller.remove()

    def _counts(self) -> bool:
        """Whether this run changes masks or ranks, so that a model before its last event is not the one that is wanted."""
        assert self.controller is not None
        return bool(self.controller.blocks) or bool(self.controller.ranks.growing())

    def _come_first(self) -> None:
        """Stand before the callbacks that report logs, which Trainer puts first; it tells callbacks nothing of each other."""
        frame = sys._getframe(1)
        while frame.f_back is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
            frame = frame.f_back
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler) and self in handler.callbacks:
            handler.callbacks.remove(self)
            handler.callbacks.insert(0, self)


def measures(controller: Controller) -> dict[str, float | int]:
    """Return what is logged of a Controller: density, adapter_parameters, rank_mean, rank_max, kept_<kind>."""
    ranks = list(controller.ranks.ranks().values())
    found: dict[str, float | int] = {"density": controller.density, "adapter_parameters": controller.adapter_parameters}
    if ranks:
        found |= {"rank_mean": sum(ranks) / len(ranks), "rank_max": max(ranks)}
    for name, block in controller.blocks.items():
        kind = f"kept_{block.kind}"
        found[kind] = found.get(kind, 0) + int((controller.model.get_block_mask(name) != 0).sum())
    return found


def _forget_best(state: Any) -> None:
    """No evaluation so far counts: neither for the best checkpoint nor for early stopping, whose patience begins anew."""
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None


def _total_steps(apt: APTModel, state: Any) -> int:
    """The run's number of steps; of one that is resumed the number that it was begun with, which its schedule is made of."""
    schedule = (apt.controller_state or {}).get("schedule") if state.global_step else None
    begun: Any = schedule.get("total_steps") if isinstance(schedule, Mapping) else None
    if isinstance(begun, int) and begun != state.max_steps:
        logger.warning(
            "APTCallback: the run was begun with %d steps and goes on to %d; its pruning schedule stays that of %d",
            begun,
            state.max_steps,
            begun,
        )
        return begun
    return int(state.max_steps)


def _checkpoint(args: Any, state: Any) -> Path:
    """Where Trainer saves at this step."""
    return Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def _is_sharded(controller: Controller) -> bool:
    return any(is_sharded(adapter.lora_A) for adapter in controller.ranks.adapters.values())


def _resume(controller: Controller, apt: APTModel, step: int, own: Path) -> None:
    """Go on from the state that came with the model; under FSDP, whose files do not hold it, from the directory `own`."""
    found, processes = apt.controller_state, agreement.ranks()
    if found is None and _is_sharded(controller) and (own / state_directory.VALUES_FILE).is_file():
        controller.load(own)
        return
    if found is None:
        raise RuntimeError(
            f"resume_from_checkpoint: expected a checkpoint with a Controller's state, got one of step {step} without; a run without "
            "APTCallback wrote it, or FSDP did and it is not that of this run's output_dir: begin a new run from its model "
            "(APTModel.from_pretrained), without resume_from_checkpoint"
        )
    if apt.trained_by not in (None, processes):
        logger.warning(
            "APTCallback: %d process(es) wrote the checkpoint and %d go on, so batches and random numbers are others and the run is not "
            "the same bit for bit",
            apt.trained_by,
            processes,
        )
    try:
        controller.load_state_dict(found)
    except (TypeError, ValueError) as error:
        raise type(error)(f"resume_from_checkpoint: the Controller of this run is not that of the checkpoint: {error}") from error


def _unfinished(controller: Controller, state: Any) -> str:
    end, now, skipped = controller.steps.end, controller.now, state.global_step - controller.now
    text = f"the run is not finished: it ended after {now} of the {end} steps to the last event, at a density of {controller.density:.4f} "
    text += f"(target {controller.config.density:g}), so export and merge_and_unload refuse the model"
    if skipped > 0 and state.global_step >= state.max_steps:
        return (
            f"{text}; GradScaler skipped {skipped} of the {state.global_step} optimizer steps: resume with "
            f"max_steps={state.max_steps + skipped}, or use bf16, which skips none"
        )
    return f"{text}; go on with resume_from_checkpoint, or pass unfinished=True to them"
