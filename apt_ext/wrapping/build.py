"""Wrap the linears of a model in place, and put everything back where that fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..adapter.layer import APTAdapter
from ..common.checks import checked_module, error_prefix, linear_shape, listed
from ..common.names import covered, parameters_of
from ..common.patterns import ends_with
from ..common.stock_class import LooksStock
from ..config import APTConfig, select
from ..pruning.architectures.lookup import (
    Blocks,
    architecture_of,
    find_blocks,
    is_linear,
    output_layer,
    task_heads,
)
from ..pruning.block_masks import missing_carriers, put_carriers
from ..pruning.float32_heads import narrowing, train_in_float32
from ..pruning.row_check import check_row
from ..pruning.wrappers import MaskedLinear
from .bases import is_quantised, refuse_peft, refuse_quantised
from .compiled import unwrap
from .drawn import drawn_anew
from .experts import expert_parameters, not_adapted, not_linear

# They hand the weights of their linears to a fused function, so an adapter's forward would never be called.
_READ_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)

_SHOWN = 8  # names in a message
_DRAWN_AND_SAVED = (
    "{}: not in the checkpoint that from_pretrained read, so the values are random; trained whole and saved "
    "(modules_to_save=[...] says otherwise)"
)
_DRAWN_AND_LEFT = (
    "{}: not in the checkpoint that from_pretrained read, so the values are random, and save_pretrained will "
    "not write them; name them in modules_to_save, or save the base model and load that one next time"
)
_FLOAT16 = (
    "float32_factors: False leaves all that trains in float16, whose gradients torch.amp.GradScaler refuses and whose "
    "small steps are rounded away; APTConfig(float32_factors=True) trains it in float32"
)

logger = logging.getLogger("apt_ext")


class Adapted(LooksStock):
    """The root of a model with adapters, which it holds as `model`."""


@dataclass(frozen=True)
class Built:
    """A model that was wrapped in place.

    model   the model itself, or what `torch.compile` had wrapped
    blocks  what can be pruned
    saved   names of what trains whole
    """

    model: nn.Module
    blocks: Blocks
    saved: list[str]


@contextmanager
def build(model: nn.Module, config: APTConfig, saved: Callable[[nn.Module], list[str] | None] = lambda model: None) -> Iterator[Built]:
    """Wrap `model` in place for the context, in which the rest is made of it. Whatever raises there or before, all is as it was.

    saved  called with the module: what `match` is given as `saved`
    """
    inner = unwrap(checked_module("model", model))
    try:
        found = match(inner.module, config, saved(inner.module))
        with _all_as_it_was(inner.module, found):
            _wrap(inner.module, config, found)
            yield Built(inner.module, found.blocks, found.saved)
    except BaseException:
        inner.restore()
        raise
    trains = (parameter for parameter in inner.module.parameters() if parameter.requires_grad and parameter.numel())
    float16 = _FLOAT16 if any(parameter.dtype == torch.float16 for parameter in trains) else ""
    for note in filter(None, (inner.note, *found.notes, float16)):
        logger.warning("%s", note)


@contextmanager
def _all_as_it_was(model: nn.Module, found: Match) -> Iterator[None]:
    """Within this context whatever raises takes wrappers away and puts modules and requires_grad back."""
    modules = dict(model.named_modules())
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        narrowing(model, check=False)()
        for name in dict.fromkeys((*found.linears, *(side.module for block in found.blocks.values() for side in block.sides))):
            model.set_submodule(name, modules[name])
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


def _wrap(model: nn.Module, config: APTConfig, found: Match) -> None:
    blocks = found.blocks
    touched = {linear for block in blocks.values() if block.kind != "hidden" for linear in block.linears}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in found.saved:
        for parameter in parameters_of(model, name):
            parameter.requires_grad_(parameter.is_floating_point())
    for name in found.linears:
        if name in found.ranks or name in touched:
            linear = model.get_submodule(name)
            with error_prefix(name):
                if name in found.whole:
                    adapter: APTAdapter = MaskedLinear.around(linear)
                else:
                    rank = found.ranks.get(name, 0)
                    reserved = config.max_rank if name in found.ranks else None
                    exact = torch.float32 if config.float32_factors and _is_16_bit(linear) else None
                    adapter = APTAdapter.from_linear(
                        linear, rank, config.scaling_of(name), max_rank=reserved, dropout=config.lora_dropout, dtype=exact
                    )
            adapter.label = name
            model.set_submodule(name, adapter)
    for name, block in blocks.items():
        if block.kind != "hidden":  # norms within the attention; their masks change later without changing the modules
            put_carriers(model, missing_carriers(model, name, block))
    if config.float32_factors:
        train_in_float32(model, found.saved)


def _is_16_bit(linear: nn.Module) -> bool:
    return linear.weight.dtype in (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Match:
    """What a configuration means in a model.

    linears  the names of its linears
    saved    the names of the modules and lone Parameters that train whole
    whole    the linears that are or lie in those
    ranks    {name: rank} of the linears that get an adapter
    blocks   what can be pruned
    notes    what is to be said to the user
    """

    linears: list[str]
    saved: list[str]
    whole: set[str]
    ranks: dict[str, int]
    blocks: Blocks
    notes: list[str]


def match(model: nn.Module, config: APTConfig, saved: list[str] | None = None) -> Match:
    """What `config` means in this model, which is not changed; raises what `get_apt_model` does.

    saved  what a checkpoint holds whole; None: what the configuration and the report of `from_pretrained` say
    """
    checked_module("model", model)
    if not isinstance(config, APTConfig):
        raise TypeError(f"config: expected an APTConfig, got {type(config).__name__}")
    if any(isinstance(module, Adapted | APTAdapter) for module in model.modules()):
        raise ValueError("model: expected a model without adapters, got one that has them; merge_and_unload() gives it back")
    refuse_peft("model", model)
    modules = dict(model.named_modules())
    names = [name for name in modules if name]
    drawn, notes = drawn_anew(model), []
    asked = task_heads(model)
    if config.modules_to_save is not None:
        parameters = [name for name in drawn if name not in modules]
        asked = select("modules_to_save", config.modules_to_save, [*names, *parameters])
    if saved is None:
        more = [name for name in drawn if config.modules_to_save is None and not covered(name, asked)]
        notes += [_DRAWN_AND_SAVED.format(listed(more, _SHOWN))] if more else []
        saved = [*asked, *more]
    left = [name for name in drawn if not covered(name, saved)]
    notes += [_DRAWN_AND_LEFT.format(listed(left, _SHOWN))] if left else []
    linears = [name for name in names if is_linear(modules[name]) or is_quantised(modules[name])]
    if not linears:
        raise ValueError(f"model: expected linear layers within it, got a {type(model).__name__} with none (from_linear wraps a lone one)")
    whole = {name for name in linears if covered(name, saved)}
    experts = expert_parameters(model)
    unasked = [name for name in linears if name in whole and not covered(name, asked)]
    targets = config.targets(linears, whole, output_layer(model), drawn=unasked, others=not_linear(model, linears, experts))
    reached = linears if architecture_of(model) is not None else targets  # through blocks
    refuse_quantised((name, modules[name]) for name in reached)
    blocks = find_blocks(model)  # whose linears have weights to look at
    check_row(model, blocks)
    _check_targets(model, targets)
    ranks = _ranks(modules, config, targets, notes)
    if experts:
        notes.append(not_adapted(model, experts))
    return Match(linears, saved, whole, ranks, blocks, notes)


def _ranks(
    modules: dict[str, nn.Module],
    config: APTConfig,
    targets: list[str],
    notes: list[str],
) -> dict[str, int]:
    """{target: rank}: what the configuration says, or less where r alone says more than a linear can hold."""
    ranks, narrow = {}, {}
    for name in targets:
        with error_prefix(name):
            limit = min(linear_shape(modules[name])[:2])
        ranks[name] = config.rank_of(name)
        if ranks[name] > limit:
            if any(ends_with(key, name) for key in config.rank_pattern):
                raise ValueError(_too_high(name, limit, ranks[name]))
            narrow[name] = limit
    by_r = [name for name in targets if not any(ends_with(key, name) for key in config.rank_pattern)]
    if narrow and len(narrow) == len(by_r):
        name, limit = max(narrow.items(), key=lambda entry: entry[1])
        raise ValueError(_too_high(name, limit, config.r))
    if narrow:
        held = [f"{name} ({limit})" for name, limit in narrow.items()]
        notes.append(f"r: {config.r} is more than these linears can hold, so they get what they can: {listed(held, _SHOWN)}")
    return ranks | narrow


def _too_high(name: str, limit: int, rank: int) -> str:
    return f"{name}: rank must be at most min(out_features, in_features) = {limit}, got {rank}"


def _check_targets(model: nn.Module, targets: list[str]) -> None:
    """A target's weight must be its own, and its forward must be what its parent calls."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name in targets:
        tied = owners.get(id(model.get_submodule(name).weight), [])  # none of a weight that is computed
        if len(tied) > 1:
            raise ValueError(f"target_modules: expected weights of their own, but the weight of {name} is tied: {' = '.join(tied)}")
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, _READ_WEIGHTS):
            raise TypeError(
                f"target_modules: expected linears that are called, but {type(parent).__name__} reads the weight of {name} itself, "
                "so an adapter there would be ignored; leave it out with exclude_modules"
            )
