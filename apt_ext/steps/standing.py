"""What a graph stands on: everything that the host knows of a model and that decides on what a step launches, or where it reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.carrier import MaskCarrier
from ..adapter.layer import APTAdapter
from .obstacles import HOOKS

_PLAIN = frozenset((bool, int, float, str, type(None), torch.dtype, torch.device))
_ATTENTION = ("flash", "mem_efficient", "math", "cudnn")
_QUIET = (APTAdapter, nn.Linear, nn.Embedding)  # their forward reads no attribute that users change
_LONGEST = 64  # entries of a list or a dict that are looked at
_TORCHS = frozenset(vars(nn.Module())) - {"training"}  # registries and flags of nn.Module itself
_OWN = frozenset(("training", "placed", "history", "controller_state", "_target"))  # looked at above, or of no matter to a step


class Standing:
    """What is compared before each replay.

    memory  the modules and tensors of the model, by identity and place: a graph reads and writes there
    mode    plain values: training or not, which masks take part, settings, hooks
    names   of attributes of modules and of their config: (identity of their owner, name)
    values  theirs: a plain value itself, a list, tuple or dict entry by entry, another object by its identity. What changes inside such
            an object is not seen.
    """

    def __init__(self, model: nn.Module, volatile: frozenset[tuple[int, str]]) -> None:
        memory: list[Any] = []
        mode: list[Any] = [_global_mode()]
        held: list[Any] = []  # what was looked at, so that no other object gets an identity of it
        names: list[tuple[int, str]] = []
        values: list[Any] = []
        configs: dict[int, Any] = {}
        for module in _modules(model):
            held.append(module)
            own, number = module.__dict__, id(module)
            memory.append(number)
            mode.append(own["training"])
            for registry in HOOKS:
                if own[registry]:
                    mode.append((number, registry, *own[registry]))
            for tensor in own["_parameters"].values():
                if tensor is not None:
                    held.append(tensor)
                    memory += (id(tensor), tensor.data_ptr(), tensor.numel(), tensor.requires_grad)
            for tensor in own["_buffers"].values():
                if tensor is not None:
                    held.append(tensor)
                    memory += (id(tensor), tensor.data_ptr(), tensor.numel())
            if "placed" in own:
                _look_at_carrier(module, mode, memory, held)
            if isinstance(module, _QUIET):
                if "forward" in own:
                    held.append(own["forward"])
                    memory.append(id(own["forward"]))
                continue
            for name, value in own.items():
                if name in _TORCHS or name in _OWN:
                    continue
                names.append((number, name))
                values.append(value if type(value) in _PLAIN else _seen(value, held))
                if name == "config":
                    configs[id(value)] = value
        for number, config in configs.items():
            held.append(config)
            for name, value in getattr(config, "__dict__", {}).items():
                if type(value) in _PLAIN:
                    names.append((number, name))
                    values.append(value)
        if volatile:
            values = [None if name in volatile else value for name, value in zip(names, values, strict=True)]
        self.memory, self.mode, self.names, self.values, self._held = memory, mode, names, values, held

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Standing)
            and self.memory == other.memory
            and self.mode == other.mode
            and self.values == other.values
            and self.names == other.names
        )

    __hash__ = None  # type: ignore[assignment]

    def is_like(self, before: Standing) -> bool:
        """Whether memory and mode are those of `before`, whatever plain values are."""
        return self.memory == before.memory and self.mode == before.mode

    def changed_since(self, before: Standing) -> frozenset[tuple[int, str]]:
        """Return the plain values that are others than `before`, of modules that were there."""
        old = dict(zip(before.names, before.values, strict=True))
        return frozenset(name for name, value in zip(self.names, self.values, strict=True) if name in old and old[name] != value)


def _seen(value: Any, held: list[Any], depth: int = 2) -> Any:
    """What is compared of an attribute; whatever is compared by identity is added to `held`."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if depth and kind in (list, tuple) and len(value) <= _LONGEST:
        return [_seen(one, held, depth - 1) for one in value]
    if depth and kind is dict and len(value) <= _LONGEST:
        return [(key if type(key) in _PLAIN else id(key), _seen(one, held, depth - 1)) for key, one in value.items()]
    held.append(value)
    return (id(value), value.data_ptr(), value.numel()) if isinstance(value, Tensor) else id(value)


def _modules(model: nn.Module) -> list[nn.Module]:
    """All modules, each once; `nn.Module.modules` takes several times as long."""
    found = [model]
    seen = {id(model)}
    for module in found:  # which grows meanwhile
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                found.append(child)
    return found


def _look_at_carrier(module: nn.Module, mode: list[Any], memory: list[Any], held: list[Any]) -> None:
    """What an adapter, or another module with masks, decides on beside its tensors."""
    assert isinstance(module, MaskCarrier)
    placed, buffers = module.placed, module._buffers
    mode += (module.disabled, placed.moving)
    for name in placed.names:
        mode.append(placed.is_ones(name, buffers[name]))
    if not isinstance(module, APTAdapter):
        return
    merge, packing = module.merge, module.packing
    mode += (merge.active, bool(merge.foreign), module.scaling, module.dropout, packing.store.is_offloaded)
    packed = packing.current
    if packed is None:
        return
    held.append(packed)
    memory.append(id(packed))
    chains = tuple(chain is not None and chain.is_open() for chain in (packing.chain_in, packing.chain_out))
    mode += (int(packed.kept), chains)
    if packed.packed is not None:
        held.append(packed.packed)
        memory += (id(packed.packed), packed.packed.data_ptr())


def _global_mode() -> tuple[Any, ...]:
    cuda = torch.backends.cuda
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        torch.are_deterministic_algorithms_enabled(),
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        *(getattr(cuda, f"{kernels}_sdp_enabled")() for kernels in _ATTENTION),
        torch.backends.cudnn.benchmark,
        _float32_precision(),
    )


def _float32_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set by torch's newer functions, which do not mix with this one
        return str(torch.backends.cuda.matmul.fp32_precision)
