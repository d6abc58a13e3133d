"""What an adapter writes into a state_dict and how it reads one back: ranks, masks, the merged flag, older key names."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import growth
from .arguments import all_ones, checked_mask

if TYPE_CHECKING:
    from .adapter import APTAdapter

_SEED_NAMES = {"Wa": "lora_A", "Wb": "lora_B"}


def install(adapter: APTAdapter) -> None:
    """Register the hooks that save and load ``adapter``; torch's own recursion calls them in any model."""
    adapter._register_state_dict_hook(_save)  # type: ignore[no-untyped-call]
    adapter._register_load_state_dict_pre_hook(_load, with_module=True)  # type: ignore[no-untyped-call]
    adapter.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]


def _save(adapter: APTAdapter, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    """Add rank and merged; a merged layer is saved unmerged, so a state_dict never holds a rounded weight."""
    state[prefix + "rank"] = torch.tensor(adapter.rank)
    state[prefix + "merged"] = torch.tensor(adapter.merged)
    for name, value in adapter._kept.items():
        state[f"{prefix}base_layer.{name}"] = value


def _load(
    adapter: APTAdapter,
    state: dict[str, Any],
    prefix: str,
    _metadata: dict[str, Any],
    _strict: bool,
    _missing: list[str],
    _unexpected: list[str],
    _errors: list[str],
) -> None:
    """Check everything, then bring the adapter into the saved rank, so that torch's own copy finds equal shapes.

    ``state`` is torch's private copy of the mapping: entries are rewritten there in today's names and storage shapes.
    """
    own = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    if not own:
        return
    seed = any(name in own for name in _SEED_NAMES)
    for old, new in _SEED_NAMES.items():
        if old in own:
            own[new] = own.pop(old)
    A, B = own.get("lora_A"), own.get("lora_B")
    rank = _saved_rank(adapter, prefix, A, B, own.get("rank"))
    masks = {
        name: checked_mask(prefix + name, own[name].detach().to(torch.float32), torch.empty(size, device=own[name].device))
        for name, size in (("mask_in", adapter.in_features), ("mask_out", adapter.out_features))
        if name in own
    }
    merged = bool(own["merged"]) if "merged" in own else adapter.merged
    if seed and merged and "merged" in own:
        warnings.warn(f"{prefix or 'state_dict'} says merged, but the seed never merged a weight: loaded unmerged", stacklevel=2)
        merged = False

    # Nothing above changed anything; from here on the adapter takes the saved form.
    if A is not None:
        _fit_storage(adapter, rank)  # the one step that can still refuse
    if adapter.merged:
        adapter.unmerge_weights()
    adapter.__dict__["_merge_after_load"] = merged and adapter.base_layer is not None
    for name in ("rank", "merged", *_SEED_NAMES):
        state.pop(prefix + name, None)
    if A is not None and B is not None:
        stored = adapter.lora_A.shape[0]
        state[prefix + "lora_A"] = _padded(A.detach()[:rank], stored, 0)
        state[prefix + "lora_B"] = _padded(B.detach()[:, :rank], stored, 1)
        adapter._rank = rank
    for name, mask in masks.items():
        state[prefix + name] = mask
    adapter.__dict__["_ones_after_load"] = {name: all_ones(mask) for name, mask in masks.items()}


def _after_load(adapter: APTAdapter, _incompatible: Any) -> None:
    """The base layer is loaded by now: merge again if the state was merged, and note which masks are all ones."""
    for name, ones in adapter.__dict__.pop("_ones_after_load", {}).items():
        adapter._stamp_mask(name, ones)
    adapter._guard()
    if adapter.__dict__.pop("_merge_after_load", False):
        adapter.merge_weights(adapter._keep)


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
    if adapter.max_rank is not None and saved > adapter.max_rank:
        raise ValueError(f"{prefix}rank must be at most the module's max_rank = {adapter.max_rank}, got {saved}")
    if saved > min(N, K):
        raise ValueError(f"{prefix}rank must be at most min(out_features, in_features) = {min(N, K)}, got {saved}")
    return saved


def _fit_storage(adapter: APTAdapter, rank: int) -> None:
    """Without max_rank the storage is as large as the rank: re-allocate in place, same Parameter objects."""
    if adapter.max_rank is not None or adapter.lora_A.shape[0] == rank:
        return
    growth.resizable_state([adapter.lora_A, adapter.lora_B], [])  # refuses what DDP or FSDP holds
    with torch.inference_mode(False), torch.no_grad():
        for param, shape in ((adapter.lora_A, (rank, adapter.in_features)), (adapter.lora_B, (adapter.out_features, rank))):
            param.set_(torch.empty(shape, dtype=param.dtype, device=param.device))  # type: ignore[call-overload]
            param.grad = None


def _padded(value: Tensor, size: int, dim: int) -> Tensor:
    """Zero rows or columns up to the reserved storage."""
    missing = size - value.shape[dim]
    if missing == 0:
        return value
    shape = list(value.shape)
    shape[dim] = missing
    return torch.cat([value, value.new_zeros(shape)], dim)
