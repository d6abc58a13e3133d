"""Check arguments and word the errors: name the argument, what was expected and what came."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def checked_mask(name: str, mask: Any, like: Tensor) -> Tensor:
    """``mask`` as a float32 tensor on the host of ``like``'s shape, values in [0, 1]; else a worded error.

    The one time that a device is asked for the values of a mask: what depends on them is found out on the host. Meta stays meta.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(mask).__name__}")
    if mask.dtype not in FLOATING:
        raise TypeError(f"{name} must be floating (float64, float32, float16 or bfloat16), got {mask.dtype}")
    if mask.layout is not torch.strided or mask.is_nested:
        raise TypeError(f"{name} must be a dense strided tensor, got {'a nested tensor' if mask.is_nested else f'layout {mask.layout}'}")
    if mask.shape != like.shape:
        raise ValueError(f"{name} must have shape {list(like.shape)}, got {list(mask.shape)}")
    if mask.device != like.device:
        raise ValueError(f"{name} must be on the module's device {like.device}, got {mask.device}")
    value = on_host(mask)
    if value.numel() and not value.is_meta:
        low, high = (limit.item() for limit in value.aminmax())
        if not (low >= 0 and high <= 1):  # false for NaN as well; before float64 is rounded
            raise ValueError(f"{name} must hold values in [0, 1], got values from {low} to {high}")
    return value.to(torch.float32)


def on_host(tensor: Tensor) -> Tensor:
    """The values without a graph where they can be looked at without waiting; the tensor's own memory if it is there."""
    return tensor.detach() if tensor.is_meta else tensor.detach().cpu()


def all_on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`on_host` of vectors, with one wait for those of a device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(i)
    found = list(tensors)
    for (device, _), places in groups.items():
        one = [tensors[i].detach() for i in places]
        hosts = one if device.type in ("cpu", "meta") else torch.cat(one).cpu().split_with_sizes([len(tensor) for tensor in one])
        for i, host in zip(places, hosts, strict=True):
            found[i] = host
    return found


def checked_int(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def checked_number(name: str, value: Any, least: float = -math.inf) -> float:
    """A finite float; bool is no number here, and no tensor is one, which might have to be fetched from its device."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # an int beyond float64
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {value}")
    if number < least:
        raise ValueError(f"{name} must be at least {least:g}, got {value}")
    return number


def checked_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return value


def checked_seed(name: str, value: Any) -> torch.Generator:
    """A generator on the host with this seed, of all that torch takes."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"{name} must lie in [-2^63, 2^64), got {value}")
    return torch.Generator().manual_seed(value)


def checked_mapping(name: str, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected a dict, got {type(value).__name__}")
    return value


def checked_keys(name: str, value: Any, keys: Iterable[str]) -> Mapping[Any, Any]:
    """A dict with these keys and no others."""
    expected = dict.fromkeys(keys)
    if checked_mapping(name, value).keys() != expected.keys():
        missing, odd = [key for key in expected if key not in value], [key for key in value if key not in expected]
        words = [f"{len(keys)} {what}, {keys[0]!r} first" for keys, what in ((missing, "missing"), (odd, "unknown")) if keys]
        raise ValueError(f"{name}: expected the keys of a state_dict() made alike, got {' and '.join(words)}")
    return value  # type: ignore[no-any-return]


def checked_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")


def checked_device(device: Any) -> None:
    """Whether a tensor can be made there now."""
    try:
        torch.empty(0, device=device)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:  # the last where torch was built without CUDA
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"device must be one that this torch has, got {device!r} ({str(error).splitlines()[0]})") from error


def checked_path(path: Any) -> Path:
    """A path that names something: the empty one would be the current directory."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected a str or an os.PathLike, got {type(path).__name__}")
    text = os.fspath(path)
    if not isinstance(text, str):
        raise TypeError(f"path: expected a path of text, got one of {type(text).__name__}")
    if not text or "\0" in text:
        raise ValueError(f"path: expected a name without null bytes, got {text!r}")
    return Path(text)


def checked_module(name: str, module: Any) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name}: expected an nn.Module, got {type(module).__name__}")
    return module


def linear_shape(linear: nn.Module) -> tuple[int, int, bool]:
    """(out_features, in_features, weight is stored [K, N]), or TypeError for what is no plain linear layer."""
    kind = type(linear).__name__
    is_linear = isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward
    is_conv1d = kind == "Conv1D" and type(linear).__module__.startswith("transformers.")
    weight = getattr(linear, "weight", None)
    plain = type(weight) is nn.Parameter and weight.dtype in FLOATING
    if not (is_linear or is_conv1d) or not plain:
        dtype = getattr(weight, "dtype", None)
        held = (
            "" if plain or weight is None else f" with a weight of type {type(weight).__name__}" + (f" and dtype {dtype}" if dtype else "")
        )
        raise TypeError(
            f"linear must be an nn.Linear or transformers' Conv1D with a plain floating weight (quantised layers cannot be "
            f"merged or cut), got {type(linear).__module__}.{kind}{held}"
        )
    assert weight is not None
    if weight.dim() != 2:
        raise ValueError(f"weight of {kind} must have two dimensions, got shape {list(weight.shape)}")
    rows, columns = weight.shape
    bias = linear.bias
    if isinstance(bias, Tensor):
        expected, got = ([columns if is_conv1d else rows], weight.dtype, weight.device), (list(bias.shape), bias.dtype, bias.device)
        if got != expected:
            wanted, came = (f"shape {shape}, {dtype} on {device}" for shape, dtype, device in (expected, got))
            raise ValueError(f"bias of {kind} must fit its weight with {wanted}, got {came}")
    return (columns, rows, True) if is_conv1d else (rows, columns, False)


def listed(names: Collection[str], most: int, between: str = ", ") -> str:
    """The first `most` names and how many more there are; "" for none."""
    more = len(names) - most
    return between.join(islice(names, most)) + (f" and {more} more" if more > 0 else "")


@contextmanager
def error_prefix(name: str, kind: type[Exception] | None = None) -> Iterator[None]:
    """Worded errors within this context begin with `name`; with `kind` they become that, whatever they were."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        if kind is None and type(error) not in (ValueError, TypeError, RuntimeError):
            raise
        raise (kind or type(error))(f"{name}: {error}") from error
