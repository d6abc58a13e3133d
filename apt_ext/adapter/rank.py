"""Growth of an adapter's rank."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..common.checks import checked_choice, checked_int
from ..distributed import agreement
from ..optim import resize
from ..optim.initial_state import OptimizerLike, optimizers_of

if TYPE_CHECKING:
    from .layer import APTAdapter


@dataclass(frozen=True)
class Uncut:
    """An adapter's linear before the first cut of its model.

    lanes_in  int64 [in_features now]: which of its inputs those of now are; None: all of them
    """

    in_features: int
    out_features: int
    lanes_in: Tensor | None = None


def increase_rank(
    adapter: APTAdapter,
    new_rank: int,
    init_type: str = "lora",
    optimizer: OptimizerLike | None = None,
    generator: torch.Generator | None = None,
    uncut: Uncut | None = None,
) -> None:
    """Do what `APTAdapter.increase_rank` promises.

    uncut  whose sizes limit the rank, and for whose inputs new rows are drawn; None: the adapter as it is
    """
    uncut = Uncut(adapter.in_features, adapter.out_features) if uncut is None else uncut
    with agreement.change(adapter.naming(f"increase_rank({new_rank!r})")) as agree:
        checked_int("new_rank", new_rank, 0)
        checked_choice("init_type", init_type, ("lora", "zero"))
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
        adapter.settle("increase_rank")
        if adapter.merged:
            raise RuntimeError("increase_rank: the weight is merged; call unmerge_weights() first")
        limit = min(uncut.in_features, uncut.out_features)
        if adapter.max_rank is not None:
            limit = min(limit, adapter.max_rank)
        limit = max(limit, adapter.rank)  # a cut leaves ranks above min(N, K)
        if not adapter.rank <= new_rank <= limit:
            raise ValueError(f"new_rank must lie between rank = {adapter.rank} and {limit}, got {new_rank}")
        optimizers = optimizers_of(optimizer)
        if new_rank > adapter.rank and adapter.max_rank is None:
            resize.resizable_state([adapter.lora_A, adapter.lora_B], optimizers)
        elif new_rank > adapter.rank:
            resize.refuse_pieces(adapter.lora_A, (adapter.max_rank or 0, adapter.in_features))
            resize.refuse_gathered(adapter.lora_A, "increase_rank")
        agree(init_type, adapter.shared_state())
        if new_rank > adapter.rank:
            if init_type == "zero":
                warnings.warn("init_type='zero' makes both factors zero: the new ranks have no gradient and cannot learn", stacklevel=3)
            _grow(adapter, new_rank, adapter.init_std if init_type == "lora" else 0.0, optimizers, generator, uncut)


def _grow(
    adapter: APTAdapter,
    new_rank: int,
    std: float,
    optimizers: list[torch.optim.Optimizer],
    generator: torch.Generator | None,
    uncut: Uncut,
) -> None:
    A, B = adapter.lora_A, adapter.lora_B
    old, more = adapter.rank, new_rank - adapter.rank
    with torch.inference_mode(False), torch.no_grad():
        rows = resize.draw_rows(more, uncut.in_features, std, generator, A.device, A.dtype)
        if uncut.lanes_in is not None:
            rows = rows.index_select(1, uncut.lanes_in.to(rows.device))
        if adapter.max_rank is None:
            grown_A = torch.cat([A.detach(), rows])
            grown_B = torch.cat([B.detach(), B.new_zeros(adapter.out_features, more)], dim=1)
            resize.resize_parameters([resize.Resize(A, grown_A, 0), resize.Resize(B, grown_B, 1)], optimizers)
        else:
            resize.write_rows(A, rows, old)
    adapter.take_rank(new_rank)


def adopt_ranks(adapters: Sequence[APTAdapter]) -> None:
    """Do what `APTAdapter.adopt_rank` promises for each, with one wait for each device."""
    able = [adapter for adapter in adapters if adapter.max_rank is not None and adapter.rank < adapter.max_rank]
    found = resize.ranks_of([(adapter.lora_A, adapter.lora_B, adapter.rank) for adapter in able])
    for adapter, rank in zip(able, found, strict=True):
        if rank != adapter.rank:
            resize.say_adopted(adapter.naming("rank"), adapter.rank, rank)
            adapter.take_rank(rank)
