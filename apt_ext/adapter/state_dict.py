"""What an adapter writes into a state_dict and how it reads one back: rank, masks, the merged flag, older key names."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..common.checks import checked_mapping, checked_mask
from ..optim import resize
from .mask import Mask
from .shared_memory import hold, merged_into

if TYPE_CHECKING:
    from .layer import APTAdapter

_SEED_NAMES = {"Wa": "lora_A", "Wb": "lora_B"}
_CHECKED = "checked_before_loading"
Hook = TypeVar("Hook", bound=Callable[..., None])


def checked_before(hook: Hook) -> Hook:
    """Mark a hook before torch's load_state_dict that refuses nothing which `check_loadable` and its caller did not refuse before."""
    setattr(hook, _CHECKED, True)
    return hook


def install(adapter: APTAdapter) -> None:
    """Let torch's own recursion call the hooks below, in any model."""
    adapter._register_state_dict_hook(_save)  # type: ignore[no-untyped-call]
    adapter._register_load_state_dict_pre_hook(_load, with_module=True)  # type: ignore[no-untyped-call]
    adapter.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class PendingLoad:
    """What is left to do once torch has copied the tensors of a state.

    masks       what the state holds of them
    has_weight  the state holds the base layer's weight
    follow      what follows for a compacted adapter
    undo        where the state is merged: what brings back all that was before, since merging again can fail
    """

    masks: dict[str, Mask]
    has_weight: bool
    follow: Callable[[], None]
    undo: Callable[[], None] | None


def _save(adapter: APTAdapter, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    """Add rank and merged; a merged layer is saved unmerged, so an adapter's state never holds a rounded weight.

    Not even where it is another adapter that merged into a tied weight.
    """
    adapter.settle("state_dict")
    state[prefix + "rank"] = torch.tensor(adapter.rank, device="cpu")
    state[prefix + "merged"] = torch.tensor(adapter.merged, device="cpu")
    for name in ("weight", "bias"):
        tensor = getattr(adapter, name)
        for holder, held in merged_into(tensor) if tensor is not None else ():
            original = holder.merge.originals.get(held)
            if original is not None and original.shape == tensor.shape:
                state[f"{prefix}base_layer.{name}"] = original
    if adapter.packing.store.host is not None:
        state[f"{prefix}base_layer.weight"] = adapter.packing.store.host


@checked_before
def _load(
    adapter: APTAdapter,
    state: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    _strict: bool,
    _missing: list[str],
    _unexpected: list[str],
    _errors: list[str],
) -> None:
    """Check everything, then bring the adapter into the saved rank, so that torch's own copy finds equal shapes.

    ``state`` is torch's private copy of the mapping: entries are rewritten there in today's names and storage shapes.
    """
    own = _own_entries(adapter, state, prefix)
    if not own:
        return
    found = _validate(adapter, own, prefix)
    rank, A, B = found.rank, found.A, found.B
    masks = {name: mask.to(own[name].device) for name, mask in found.masks.items()}
    merged = bool(own["merged"]) if "merged" in own else adapter.merged
    if merged and "merged" in own and any(name in own for name in _SEED_NAMES):
        warnings.warn(f"{prefix or 'state_dict'} says merged, but the seed never merged a weight: loaded unmerged", stacklevel=2)
        merged = False
    merged = merged and adapter.base_layer is not None

    # What can run out of memory, before anything changes.
    held = {name: Mask.of(mask).known() for name, mask in found.masks.items()}
    stored = rank if adapter.max_rank is None else adapter.max_rank
    factors: dict[str, Tensor] = {}
    storages: list[tuple[nn.Parameter, Tensor]] = []
    if A is not None and B is not None:
        storages = _fitting_storages(adapter, stored)
        factors = {"lora_A": _padded(A.detach()[:rank], stored, 0), "lora_B": _padded(B.detach()[:, :rank], stored, 1)}
    bases: dict[str, Tensor] = {}
    if merged and metadata.get("assign_to_params_buffers"):  # the merge writes, and not into the state, nor into what another adapter keeps
        keys = [prefix + f"base_layer.{name}" for name in ("weight", "bias")]
        bases = {key: state[key].detach().clone() for key in keys if key in state}
    follow = adapter.packing.change_with_weight(adapter, held)
    adapter.packing.store.restore(adapter.weight)  # the whole weight, which torch copies into
    try:
        undo = _undo(adapter) if merged else None  # merging again can still fail
    except BaseException:
        adapter.packing.offload(adapter)
        raise

    # Nothing above changed anything; from here on the adapter takes the saved form.
    with torch.inference_mode(False), torch.no_grad():
        for param, storage in storages:
            param.set_(storage)  # type: ignore[call-overload]
            param.grad = None
    if adapter.merged:
        adapter.merge.undo(adapter)  # and not unmerge_weights, which would offload the weight again
    adapter.take_rank(rank)
    for name in ("rank", "merged", *_SEED_NAMES):
        state.pop(prefix + name, None)
    for name, value in {**factors, **masks}.items():
        state[prefix + name] = value
    state |= bases
    adapter.pending_load = PendingLoad(held, "base_layer.weight" in own, follow, undo)


@dataclass(frozen=True)
class _Found:
    """What an adapter will take of a state: `masks` checked and on the host, both factors or neither."""

    rank: int
    A: Tensor | None
    B: Tensor | None
    masks: dict[str, Tensor]


def _entries(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def _own_entries(adapter: APTAdapter, state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The adapter's own entries, with the factors of rank 0: accelerate leaves them out, for empty tensors seem to share memory."""
    own = _entries(state, prefix)
    rank = own.get("rank")
    if isinstance(rank, Tensor) and rank.numel() == 1 and bool(rank == 0) and not _SEED_NAMES.keys() & own.keys():
        like = adapter.lora_A
        empty = {"lora_A": like.new_empty(0, adapter.in_features), "lora_B": like.new_empty(adapter.out_features, 0)}
        own |= {name: value for name, value in empty.items() if name not in own and not adapter.max_rank}
    return own


def _validate(adapter: APTAdapter, own: dict[str, Any], prefix: str) -> _Found:
    """What of its own entries the adapter refuses (RuntimeError: DDP or FSDP holds factors of another rank); changes nothing."""
    _check_entries(own, prefix)
    A, B = (own.get(old, own.get(new)) for old, new in _SEED_NAMES.items())
    rank = _saved_rank(adapter, prefix, A, B, own.get("rank"))
    masks = {
        name: checked_mask(prefix + name, own[name].detach().to(torch.float32), torch.empty(size, device=own[name].device))
        for name, size in (("mask_in", adapter.in_features), ("mask_out", adapter.out_features))
        if name in own
    }
    if A is not None and adapter.lora_A.shape[0] != (rank if adapter.max_rank is None else adapter.max_rank):
        resize.resizable_state([adapter.lora_A, adapter.lora_B], [])
    return _Found(rank, A, B, masks)


def check_loadable(model: nn.Module, state: Any, strict: bool) -> None:
    """What loading `state` into `model` would refuse, found before torch copies the first tensor.

    TypeError for no dict or no tensor, ValueError for another size and what an adapter refuses, RuntimeError as torch's for keys where
    `strict`. A module that loads in a way of its own (a method or hook that is not torch's) is left to torch, with all within it.
    """
    checked_mapping("state_dict", state)
    sizes: dict[str, Tensor] = {}  # what torch will copy into
    read: set[str] = set()  # what the hook of an adapter reads
    free: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if prefix.startswith(free):
            continue
        if _loads_by_itself(module):
            free += (prefix,)
            continue
        wanted = {key: value for key, value in module._buffers.items() if key not in module._non_persistent_buffers_set}
        wanted |= module._parameters
        own = _own_entries(cast("APTAdapter", module), state, prefix) if _is_adapter(module) else {}
        if own:
            _validate(cast("APTAdapter", module), own, prefix)
            taken = {_SEED_NAMES.get(key, key) for key in own if key in (*_SEED_NAMES, *_SEED_NAMES.values(), "mask_in", "mask_out")}
            wanted = {key: value for key, value in wanted.items() if key not in taken}
            read |= {prefix + key for key in (*taken, *_SEED_NAMES, "rank", "merged")}
        sizes |= {prefix + key: value for key, value in wanted.items() if value is not None}
    for key, like in sizes.items():
        if key in state:
            _check_size(key, state[key], like)
    if strict:
        missing = [key for key in sizes if key not in state]
        unknown = [key for key in state if key not in sizes and key not in read and not key.startswith(free)]
        if missing or unknown:
            got = ", ".join(
                f"{len(keys)} {what} key(s) in state_dict ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
                for what, keys in (("Missing", missing), ("Unexpected", unknown))
                if keys
            )
            raise RuntimeError(f"state_dict: expected the keys of this {type(model).__name__}, got {got}; nothing was loaded")


def _check_size(key: str, value: Any, like: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{key} must be a Tensor, got {type(value).__name__}")
    if is_lazy(like) or (like.dim() == 0 and value.shape == (1,)):  # the second as torch itself takes it
        return
    if value.shape != like.shape:
        raise ValueError(f"{key} must have shape {list(like.shape)}, got {list(value.shape)}")


def _is_adapter(module: nn.Module) -> bool:
    """True if `install` was called with it."""
    return any(getattr(hook, "hook", None) is _load for hook in module._load_state_dict_pre_hooks.values())


def _loads_by_itself(module: nn.Module) -> bool:
    kind = type(module)
    ours = sum(getattr(getattr(hook, "hook", None), _CHECKED, False) for hook in module._load_state_dict_pre_hooks.values())
    stock = kind._load_from_state_dict is nn.Module._load_from_state_dict and kind.set_extra_state is nn.Module.set_extra_state
    return not stock or len(module._load_state_dict_pre_hooks) > ours


def _check_entries(own: dict[str, Any], prefix: str) -> None:
    """TypeError or ValueError where an entry is no tensor of the kind that `_save` writes."""
    for name in ("lora_A", "lora_B", *_SEED_NAMES, "mask_in", "mask_out", "rank", "merged"):
        value = own.get(name)
        if name not in own or (name == "merged" and isinstance(value, bool)):
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{prefix}{name} must be a Tensor, got {type(value).__name__}")
        if name in ("rank", "merged"):
            if value.numel() != 1:
                raise ValueError(f"{prefix}{name} must hold one value, got shape {list(value.shape)}")
            if name == "rank" and (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool):
                raise TypeError(f"{prefix}{name} must be a whole number, got {value.dtype}")
        elif name.startswith(("lora", "W")) and not value.is_floating_point():
            raise TypeError(f"{prefix}{name} must be floating, got {value.dtype}")


def _after_load(adapter: APTAdapter, _incompatible: Any) -> None:
    """The base layer is loaded by now: merge again if the state was merged, and note which masks are all ones."""
    loaded, adapter.pending_load = adapter.pending_load, None
    if loaded is not None:
        for name, mask in loaded.masks.items():
            adapter.note_mask(name, mask)
        adapter.history.note(factors=object())  # others than before
        if loaded.has_weight and adapter.weight is not None and not merged_into(adapter.weight):
            adapter.merge.foreign.clear()
    if loaded is None:
        adapter.packing.renew(adapter)
    else:
        loaded.follow()
    adapter.guard_factors()
    if loaded is not None and loaded.undo is not None:
        try:
            adapter.merge_weights(adapter.merge.keep)
        except BaseException:
            loaded.undo()
            raise


def _undo(adapter: APTAdapter) -> Callable[[], None]:
    """A function that brings the adapter back to what it is now, from copies made now."""
    tensors = [adapter.lora_A, adapter.lora_B, adapter.mask_in, adapter.mask_out, adapter.weight, adapter.bias]
    copies = [None if tensor is None else tensor.detach().clone() for tensor in tensors]
    rank, merge, ones = adapter.rank, copy.copy(adapter.merge), adapter.known_ones()
    repack = adapter.packing.change_with_weight(adapter, {})

    def undo() -> None:
        adapter.packing.store.restore(adapter.weight)
        now = [adapter.lora_A, adapter.lora_B, adapter.mask_in, adapter.mask_out, adapter.weight, adapter.bias]
        with torch.inference_mode(False), torch.no_grad():
            for tensor, copy in zip(now, copies, strict=True):
                if tensor is not None and copy is not None:
                    tensor.set_(copy) if tensor.shape != copy.shape else tensor.copy_(copy)  # type: ignore[call-overload]
        adapter.merge = merge
        adapter.take_rank(rank)
        repack()
        if adapter.merged:
            hold(adapter)
        adapter.note_ones(ones)

    return undo


def _saved_rank(adapter: APTAdapter, prefix: str, A: Tensor | None, B: Tensor | None, rank: Tensor | None) -> int:
    if (A is None) != (B is None):
        raise ValueError(f"state_dict must hold both {prefix}lora_A and {prefix}lora_B or neither, got only one")
    if A is None or B is None:
        return adapter.rank
    K, N = adapter.in_features, adapter.out_features
    if A.dim() != 2 or B.dim() != 2 or A.shape[1] != K or B.shape[0] != N or A.shape[0] != B.shape[1]:
        raise ValueError(
            f"{prefix}lora_A and {prefix}lora_B must have shapes [R, K={K}] and [N={N}, R], got {list(A.shape)} and {list(B.shape)}"
        )
    saved = A.shape[0] if rank is None else int(rank)
    if not 0 <= saved <= A.shape[0]:
        raise ValueError(f"{prefix}rank must lie between 0 and lora_A's {A.shape[0]} rows, got {saved}")
    said = saved
    if rank is not None:  # of a copy that took a grown adapter's tensors without its rank, which it may have been saved with
        saved = resize.rank_of(A, B, saved)
    elif A.shape[0] == adapter.max_rank:  # tensors alone, in storage as reserved here
        saved = resize.rank_of(A, B, 0)
    if saved > said:
        resize.say_adopted(f"{prefix}rank", said, saved)
    if adapter.max_rank is not None and saved > adapter.max_rank:
        raise ValueError(f"{prefix}rank must be at most the module's max_rank = {adapter.max_rank}, got {saved}")
    if saved > max(adapter.rank_limit, adapter.rank):  # a cut leaves ranks above min(N, K)
        raise ValueError(f"{prefix}rank must be at most min(out_features, in_features) = {adapter.rank_limit}, got {saved}")
    return saved


def _fitting_storages(adapter: APTAdapter, stored: int) -> list[tuple[nn.Parameter, Tensor]]:
    """New memory for factors of another rank (same Parameter objects will take it), or none where they fit."""
    if adapter.lora_A.shape[0] == stored:
        return []
    shapes = ((adapter.lora_A, (stored, adapter.in_features)), (adapter.lora_B, (adapter.out_features, stored)))
    with torch.inference_mode(False):
        return [(param, torch.empty(shape, dtype=param.dtype, device=param.device)) for param, shape in shapes]


def _padded(value: Tensor, size: int, dim: int) -> Tensor:
    """Zero rows or columns up to the reserved storage."""
    missing = size - value.shape[dim]
    if missing == 0:
        return value
    shape = list(value.shape)
    shape[dim] = missing
    return torch.cat([value, value.new_zeros(shape)], dim)
