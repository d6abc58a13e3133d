"""A model's own state and its Controller's as one flat state: the model.safetensors of a Trainer checkpoint.

Trainer writes one file a checkpoint and gives it to `load_state_dict` when it resumes. It holds what `APTModel.own_state` does
under the keys of `APTModel.state_dict`, the target, and the Controller's state as "controller.*".
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.layer import APTAdapter
from ..common.checks import error_prefix
from ..pruning.target import KEY
from ..storage import nested

MODEL = "model."  # where an APTModel holds the model
_OWN = "apt_"  # entries that are no part of the model
FORMAT = f"{_OWN}format"  # a state with this entry is complete without the base
_SCALINGS = f"{_OWN}scalings"  # float64, of the adapters in the order of their names
_DIGEST = f"{_OWN}sha256"  # of all other entries: Trainer reads the file without the manifest
_FORMAT = 1
_CONTROLLER = "controller."
_VALUES = f"{_CONTROLLER}values"  # JSON, as bytes

_controllers: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def note_controller(model: nn.Module, controller: Any) -> None:
    """Note that `controller` is the last one of this APTModel."""
    _controllers[model] = weakref.ref(controller)


def controller_of(model: nn.Module) -> Any | None:
    """Return the last Controller of an APTModel if it still exists, also one that has finished."""
    return _controllers[model]() if model in _controllers else None


def scalings_of(model: nn.Module) -> dict[str, float]:
    """{adapter: scaling}."""
    return {name: module.scaling for name, module in model.named_modules() if isinstance(module, APTAdapter)}


def packed(
    own: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
    controller: Mapping[str, Any] | None,
    processes: int,
    scalings: Mapping[str, float],
) -> dict[str, Tensor]:
    """Return one flat state.

    own         with keys of the model inside
    others      with keys of the APTModel: what cuts have left, the target
    controller  its `state_dict()`; None: there is none
    processes   how many trained it together
    scalings    {adapter: what its low-rank product is multiplied by}
    """
    about = torch.tensor([_FORMAT, processes], device="cpu")
    state = {f"{MODEL}{key}": value for key, value in own.items()} | dict(others) | {FORMAT: about}
    if controller is not None:
        values, tensors = nested.split(controller)
        text = json.dumps(values).encode()
        state |= {f"{_CONTROLLER}{name}": value for name, value in tensors.items()}
        state[_VALUES] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    state[_SCALINGS] = torch.tensor([scalings[name] for name in sorted(scalings)], dtype=torch.float64, device="cpu")
    return signed(state)


def signed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` with the digest that `check` looks at."""
    tensors = {name: value for name, value in state.items() if name != _DIGEST}
    return {**tensors, _DIGEST: _digest(tensors)}


def _digest(state: Mapping[str, Tensor]) -> Tensor:
    """SHA-256 of names, dtypes, shapes and bytes, uint8 [32]."""
    found = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {list(value.shape)};".encode())
        if value.numel():
            found.update(ctypes.string_at(value.data_ptr(), value.numel() * value.element_size()))
    return torch.tensor(list(found.digest()), dtype=torch.uint8, device="cpu")


def check(state: Mapping[str, Any], scalings: Mapping[str, float]) -> None:
    """ValueError unless a state that `packed` made is as it was made, and of adapters with these scalings."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor) and name != _DIGEST}
    digest, there = state.get(_DIGEST), state.get(_SCALINGS)
    if not isinstance(digest, Tensor) or digest.tolist() != _digest(tensors).tolist():
        raise ValueError(
            "state_dict: expected the tensors that were saved, by their SHA-256, got others: the file was changed or damaged; take an "
            "earlier checkpoint"
        )
    found = there.flatten().tolist() if isinstance(there, Tensor) else []
    ours = [scalings[name] for name in sorted(scalings)]
    for name, expected, got in zip(sorted(scalings), ours, found if len(found) == len(ours) else ours, strict=True):
        if not math.isclose(expected, got, rel_tol=1e-9):
            raise ValueError(
                f"state_dict: expected adapters of the scalings of this model (lora_alpha / r), {expected:g} for {name}, got {got:g}; "
                "make the model with the r, lora_alpha and alpha_pattern that it was trained with"
            )


def own(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `packed` was given as `own`, and what cuts have left, of a state that it made."""
    return {key.removeprefix(MODEL): value for key, value in without_run(state).items() if key != KEY}


def processes_of(state: Mapping[str, Any], prefix: str = "") -> int | None:
    """Return how many processes trained together what `packed` made; None for any other state, ValueError for another version."""
    if prefix + FORMAT not in state:
        return None
    value = state[prefix + FORMAT]
    found = value.flatten().tolist() if isinstance(value, Tensor) else []
    if len(found) != 2 or found[0] != _FORMAT or not isinstance(found[1], int):
        raise ValueError(f"{prefix}{FORMAT}: expected [{_FORMAT}, processes], which this version of apt_ext reads, got {found}")
    return found[1]


def controller_state(state: Mapping[str, Any], prefix: str = "") -> dict[str, Any] | None:
    """Return the Controller's state that `packed` was given; None: there was none. ValueError for what is damaged."""
    start = prefix + _CONTROLLER
    entries = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
    if not entries:
        return None
    with error_prefix(f"{start}*", ValueError):
        text = state.get(prefix + _VALUES)
        if not isinstance(text, Tensor) or text.dtype != torch.uint8 or text.dim() != 1:
            raise ValueError(f"expected {prefix}{_VALUES} as a Tensor of torch.uint8 of one dimension, got another")
        try:
            values = json.loads(bytes(text.tolist()))
        except (ValueError, RecursionError) as error:  # JSON's and Unicode's
            raise ValueError(f"expected JSON in {prefix}{_VALUES}, got something else ({error})") from None
        return nested.joined(values, {name: value for name, value in entries.items() if isinstance(value, Tensor)})


def without_run(state: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `state` without the Controller's entries and those that are about the state itself."""
    return {key: value for key, value in state.items() if not key.startswith((prefix + _OWN, prefix + _CONTROLLER))}
