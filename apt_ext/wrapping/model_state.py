"""The part of a model's state that is trained, and states with other carriers of masks than the model has."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.layer import APTAdapter
from ..adapter.mask_change import settled
from ..adapter.shared_memory import indexed
from ..common.names import covered
from ..pruning.architectures.lookup import Block
from ..pruning.block_masks import missing_carriers, put_carriers
from ..pruning.wrappers import MaskedLinear, StreamCarrier


def own_state(model: nn.Module, saved: list[str]) -> dict[str, Tensor]:
    """What belongs in a checkpoint, with the keys of the model's state_dict: adapters without their frozen bases, and `saved`."""
    with settled_state(model):
        return own_of(model, saved, model.state_dict())


@contextmanager
def settled_state(model: nn.Module) -> Iterator[None]:
    """Within this context `state_dict` of the adapters of a model waits for no device, and looks shared memory up in no time."""
    adapters = [module for module in model.modules() if isinstance(module, APTAdapter)]
    with indexed(), settled(adapters, "state_dict"):
        yield


def own_of(model: nn.Module, saved: list[str], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a state of the model `own_state` returns."""
    carriers = (name for name, module in model.named_modules() if isinstance(module, APTAdapter | StreamCarrier))
    own = tuple(f"{name}." for name in carriers)

    def is_own(key: str) -> bool:
        return _is_saved(key, saved) or (key.startswith(own) and ".base_layer." not in key)

    return {key: value for key, value in state.items() if is_own(key)}


def load_own_state(model: nn.Module, saved: list[str], tensors: dict[str, Tensor]) -> None:
    """Load what was checked; a value that an adapter refuses leaves `saved` as it was and adapters unmerged."""
    before = {key: value.clone() for key, value in own_state(model, saved).items() if _is_saved(key, saved)}
    try:
        model.load_state_dict(tensors, strict=False)
    except BaseException:
        for adapter in model.modules():
            if isinstance(adapter, APTAdapter):
                adapter.unmerge_weights()
        model.load_state_dict(before, strict=False)
        raise


def _is_saved(key: str, saved: list[str]) -> bool:
    """Whether a key of the model's state is of what trains whole, also within a carrier of masks."""
    return covered(key, saved) or covered(key.replace(".base_layer.", "."), saved)


def place_stream_carriers(model: nn.Module, blocks: Mapping[str, Block]) -> dict[str, nn.Module]:
    """Put what carries the masks of hidden dimensions where there is none yet; return {name: what was put there}."""
    block = blocks.get("hidden")
    placed = {} if block is None else missing_carriers(model, "hidden", block)
    put_carriers(model, placed)
    return placed


def holds_stream_masks(state: Mapping[str, Any], blocks: Mapping[str, Block], prefix: str) -> bool:
    """Whether masks of hidden dimensions are in `state`, whose keys of the model begin with `prefix`."""
    block = blocks.get("hidden")
    return block is not None and any(f"{prefix}{side.module}.mask_out" in state for side in block.sides if side.of == "norm")


def with_carriers(model: nn.Module, state: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
    """`state`, or a copy with the keys of what carries masks here and did not when it was made: all ones."""
    for name, carrier in model.named_modules():
        start = f"{prefix}{name}."
        own = [key for key in state if key.startswith(start)] if isinstance(carrier, StreamCarrier | MaskedLinear) else []
        if not own or f"{start}mask_out" in own:
            continue
        fresh = _under_ones(carrier, start)
        renamed = {f"{start}base_layer.{key.removeprefix(start)}": state[key] for key in own}
        versions = getattr(state, "_metadata", None)  # torch's, of each module
        state = OrderedDict({key: value for key, value in state.items() if key not in own} | renamed | fresh)
        if versions is not None:
            state._metadata = versions  # type: ignore[attr-defined]
    return state


def own_carriers(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    """What `own_state` would hold of what carries masks of hidden dimensions, were those all ones; keys begin with `prefix`."""
    found: dict[str, Tensor] = {}
    for name, carrier in model.named_modules():
        if isinstance(carrier, StreamCarrier | MaskedLinear):
            found |= _under_ones(carrier, f"{prefix}{name}.")
    return found


def _under_ones(carrier: nn.Module, start: str) -> dict[str, Tensor]:
    """The state of a carrier without what it wraps, under masks of ones."""
    fresh = {key: value for key, value in carrier.state_dict(prefix=start).items() if not key.startswith(f"{start}base_layer.")}
    fresh |= {key: torch.ones_like(value) for key, value in fresh.items() if key.endswith((".mask_in", ".mask_out"))}
    fresh |= {key: torch.tensor(False, device="cpu") for key in fresh if key.endswith(".merged")}
    return fresh
