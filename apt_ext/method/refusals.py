"""What a Controller does not work with: an optimizer of other Parameters, a second Controller, a step without gradients, scores that say
nothing, a state that is not whole."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..adapter.layer import APTAdapter
from ..common.checks import checked_choice, checked_int, checked_keys, checked_mapping, checked_number
from ..distributed.dtensor import is_sharded
from ..model import APTModel, adapters
from ..optim.initial_state import OptimizerLike, state_starts
from ..optim.resize import refuse_gathered, resizable_state
from ..pruning.block_masks import submodule
from ..wrapping.run_state import controller_of

MODES = ("cut", "compact", "none")  # what becomes of what a Controller prunes


def apt_model_in(model: nn.Module) -> APTModel:
    """The APTModel itself, or the one that a wrapper holds; TypeError where there is none."""
    found = [module for module in model.modules() if isinstance(module, APTModel)] if isinstance(model, nn.Module) else []
    if len(found) != 1:
        raise TypeError(f"model: expected an APTModel or a module that holds one, got {type(model).__name__} that holds {len(found)}")
    return found[0]


def refuse_second(model: APTModel, expected: str = "no other Controller") -> None:
    """RuntimeError while a Controller is at work on `model`: it hears every backward, and does not know masks and ranks that others set."""
    other = controller_of(model)
    if other is not None and other.listening:
        raise RuntimeError(
            f"model: expected {expected} at work on it, got one at step {other.now} of {other.steps.end}; call its remove() first"
        )


def check_held(found: Mapping[str, APTAdapter], optimizers: Sequence[Optimizer]) -> None:
    """ValueError unless the optimizers hold every factor that requires a gradient, but those that a cut has emptied."""
    held = {id(parameter) for one in optimizers for group in one.param_groups for parameter in group["params"]}
    factors = {f"{name}.{factor}": getattr(adapter, factor) for name, adapter in found.items() for factor in ("lora_A", "lora_B")}
    wanted = {name: one for name, one in factors.items() if one.requires_grad and one.numel()}
    missing = [name for name, one in wanted.items() if id(one) not in held]
    if missing:
        refuse_gathered(factors[missing[0]], "Controller")
        raise ValueError(
            "optimizer: expected the factors of all adapters that require a gradient, as apt_ext.adapter_parameters(model) gives them "
            f"(after fully_shard), got {len(missing)} of {len(factors)} missing, {missing[0]} first; add them, or requires_grad_(False)"
        )


def check_can_grow(adapters: Mapping[str, APTAdapter], optimizers: Sequence[Optimizer], budget: float) -> None:
    """ValueError or RuntimeError unless these adapters can grow at an event with the optimizers that hold them.

    adapters  those that may grow and have no storage reserved
    budget    of the growth
    """
    factors = [factor for adapter in adapters.values() for factor in (adapter.lora_A, adapter.lora_B)]
    wanted = {id(factor) for factor in factors}
    for one in optimizers:
        held = any(id(parameter) in wanted for group in one.param_groups for parameter in group["params"])
        if held and state_starts(one) is None:
            raise ValueError(
                f"optimizer: expected one whose state can follow ranks that grow, got {type(one).__name__}; reserve the rows with "
                "APTConfig(max_rank=...), or let no rank grow with growth=1"
            )
    try:
        resizable_state(factors, list(optimizers))
    except RuntimeError as error:
        raise RuntimeError(f"growth: expected at most 1, or APTConfig(max_rank=...), got {budget:g}: {error}") from error


def check_change(model: APTModel, touched: Collection[str], grow: Collection[str], optimizer: OptimizerLike) -> None:
    """RuntimeError for what an event would be refused, before anything changes.

    touched  the modules whose masks or ranks change
    grow     of these, the adapters that grow
    """
    found = {name: module for name in touched if isinstance(module := submodule(model.model, name), APTAdapter)}
    if any(adapter.merged for adapter in found.values()):
        merged = next(name for name, adapter in adapters(model) if name in touched and adapter.merged)
        raise RuntimeError(f"step: {merged} is merged under its present masks; call unmerge_weights() first")
    free = [factor for name in grow if found[name].max_rank is None for factor in (found[name].lora_A, found[name].lora_B)]
    resizable_state(free, optimizer)


def gradients_came(adapters: Collection[APTAdapter], listened: bool, heard: bool) -> bool:
    """Whether observe() finds the gradients of a backward; RuntimeError where it is called at the wrong time.

    listened  there are blocks whose salience is wanted
    heard     a backward since the last step has reached one

    Some adapters may be without (layers that a batch does not use). False where FSDP2 holds gradients back till the last micro-batch.
    """
    when = "call observe() after backward(), before the optimizer's step and before zero_grad()"
    factors = (factor for adapter in adapters for factor in (adapter.lora_A, adapter.lora_B) if factor.requires_grad)
    without: list[Tensor] = []  # up to the first that has one, as a rule none: every step comes here
    for factor in factors:
        if factor.grad is not None:
            without.clear()
            break
        without.append(factor)
    if without:
        if heard and any(map(is_sharded, without)):
            return False
        raise RuntimeError(f"observe: expected gradients of adapters, got none; {when}")
    if listened and not heard:
        raise RuntimeError(f"observe: expected a backward since the last step that reached a block to be pruned, got none; {when}")
    return True


def checked_log(log: Any) -> None:
    """TypeError unless a line can be logged by `log`."""
    if log is not None and not callable(log):
        raise TypeError(f"log: expected a function of one line, or None, got {type(log).__name__}")


def checked_scores(call: str, scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """`scores` {block: [count], on the host}; RuntimeError where choosing by them would be chance: one is not finite, or all are 0."""
    every = torch.cat(list(scores.values()))
    if not bool(every.isfinite().all()):
        bad = next(name for name, score in scores.items() if not bool(score.isfinite().all()))
        raise RuntimeError(
            f"{call}: expected finite salience, got {scores[bad][~scores[bad].isfinite()][0].item()} for block {bad!r}: activations, "
            "gradients or weights were not finite"
        )
    if not bool(every.any()):
        raise RuntimeError(f"{call}: expected salience above 0 for some block, got 0 for all: every gradient was 0 there, or came to none")
    return scores


def check_state(state: Any, own: Mapping[str, Any]) -> None:
    """TypeError or ValueError unless `state` is one of this model and schedule.

    own  the Controller's own state_dict() at this moment, with the masks that the model has
    """
    checked_keys("state", state, own)
    for key in ("scores", "importance", "masks", "live", "ranks", "initial", "schedule"):
        checked_mapping(f"state[{key!r}]", state[key])
    checked_keys("state['schedule']", state["schedule"], own["schedule"])
    if not (state["schedule"]["total_steps"] is own["schedule"]["total_steps"] is None):
        checked_int("state['schedule']['total_steps']", state["schedule"]["total_steps"], 1)
    ours, theirs = ({key: value for key, value in one["schedule"].items() if key != "total_steps"} for one in (own, state))
    if not _same(theirs, ours):
        other = sorted(key for key in ours.keys() | theirs.keys() if not _same({key: theirs.get(key)}, {key: ours.get(key)}))
        expected, got = ({key: one.get(key) for key in other} for one in (ours, theirs))
        raise ValueError(f"state: expected the schedule and settings of this Controller, {expected}, got {got}")
    if not _same(state["ranks"], own["ranks"]):
        raise ValueError(
            f"state: expected the ranks of the model, {own['ranks']}, got {dict(state['ranks'])}; load the model's state first"
        )
    for key in ("masks", "live"):
        checked_keys(f"state[{key!r}]", state[key], own[key])
        for name, mine in own[key].items():
            tensor_like(f"state[{key!r}][{name!r}]", state[key][name], mine)
    if not all(torch.equal(mask, state["masks"][name].cpu()) for name, mask in own["masks"].items()):
        raise ValueError("state: expected the masks of the model, got others; load the model's state first")
    dead = next((name for name, live in state["live"].items() if bool((own["masks"][name][~live.cpu()] != 0).any())), None)
    if dead is not None:
        raise ValueError(f"state['live']: expected all that a mask keeps, got False where the mask of block {dead!r} is above 0")
    checked_int("state['step']", state["step"], 0)
    checked_choice("state['shrink']", state["shrink"], MODES)
    generator_state("state['generator']", state["generator"])
    initial = state["initial"]
    checked_keys("state['initial']", initial, own["initial"])
    if not 0.0 <= checked_number("state['initial']['density']", initial["density"]) <= 1.0:
        raise ValueError(f"state['initial']['density'] must lie in [0, 1], got {initial['density']}")
    checked_int("state['initial']['parameters']", initial["parameters"], 0)
    checked_keys("state['initial']['ranks']", initial["ranks"], own["ranks"])
    for name, rank in initial["ranks"].items():
        if checked_int(f"state['initial']['ranks'][{name!r}]", rank, 1) > own["ranks"][name]:
            raise ValueError(f"state['initial']['ranks'][{name!r}] must be at most the rank {own['ranks'][name]} of now, got {rank}")


def check_place(step: int, end: int, total: int | None, masks: Collection[Tensor], density: float, target: float) -> None:
    """ValueError where a state of this step cannot have these masks, of what is pruned, and this density.

    end    the step of the last event
    total  steps of the whole run, where they are known
    """
    if total is not None and step > total:
        raise ValueError(f"state['step']: expected at most total_steps = {total}, got {step}")
    moving = sum(int((mask * (1 - mask) != 0).sum()) for mask in masks)
    if step >= end and masks and (moving or density > target * (1 + 1e-9)):
        raise ValueError(
            f"state['step']: expected less than {end}, from where on masks are 0 or 1 and density is at its target "
            f"{target:g}, got {step} with {moving} masks between and a density of {density:.4f}"
        )


def _same(given: Mapping[Any, Any], own: Mapping[Any, Any]) -> bool:
    """Of plain values: a tensor among them equals none."""

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    return given.keys() == own.keys() and not any(
        isinstance(value, Tensor) or plain(value) != plain(own[key]) for key, value in given.items()
    )


def tensor_like(name: str, value: Any, mine: Tensor) -> Tensor:
    """`value`, or TypeError and ValueError unless it is a tensor of the dtype and shape of `mine`."""
    if not isinstance(value, Tensor) or value.dtype != mine.dtype:
        raise TypeError(f"{name}: expected a tensor of {mine.dtype}, got {getattr(value, 'dtype', type(value).__name__)}")
    if value.shape != mine.shape:
        raise ValueError(f"{name}: expected shape {list(mine.shape)}, got {list(value.shape)}")
    return value


def generator_state(name: str, value: Any) -> Tensor:
    """`value` on the host, where a generator takes it."""
    generator = torch.Generator()
    state = tensor_like(name, value, generator.get_state()).cpu()
    try:
        generator.set_state(state)
    except RuntimeError as error:
        raise ValueError(f"{name}: expected the state of a generator, got another ({str(error).splitlines()[0]})") from error
    return state
