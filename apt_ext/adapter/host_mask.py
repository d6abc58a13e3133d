"""A mask on the host and what follows from it."""

from __future__ import annotations

import ctypes
import hashlib
from functools import cached_property

import torch
from torch import Tensor

from ..common.checks import on_host


class HostMask:
    """A mask [size] float32 on the host, and what follows from it: found out once, however many adapters carry it.

    Nobody writes into `values`, which are its own, so nothing here becomes old. Meta has no values, and only `ones` may be asked.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @classmethod
    def of(cls, mask: Tensor | HostMask) -> HostMask:
        """Of a copy of `mask`, unless it is one already."""
        if isinstance(mask, HostMask):
            return mask
        with torch.inference_mode(False), torch.no_grad():
            return cls(on_host(mask).clone())

    def known(self) -> HostMask:
        """Itself, once what a note of it needs is found out: later that could fail."""
        _ = self.ones, self.digest
        return self

    @cached_property
    def whole(self) -> int:
        """How many lanes are exactly 1; none on meta."""
        return 0 if self.values.is_meta else int((self.values == 1).count_nonzero())

    @property
    def ones(self) -> bool:
        """Whether it masks nothing, as far as is known."""
        return not self.values.is_meta and self.whole == len(self.values)

    @cached_property
    def digest(self) -> object:
        """Equal for equal values; on meta equal to nothing else."""
        if self.values.is_meta:
            return object()
        values = self.values.contiguous()
        return hashlib.blake2b(ctypes.string_at(values.data_ptr(), values.nbytes), digest_size=16).digest()

    @cached_property
    def live(self) -> Tensor:
        """[size] bool: the lanes that are kept."""
        return self.values.bool()

    @cached_property
    def kept(self) -> int:
        """How many those are."""
        return int(self.live.count_nonzero())

    @property
    def soft(self) -> bool:
        """Whether there are fractions among them."""
        return self.whole < self.kept

    @cached_property
    def lanes(self) -> Tensor:
        """int64 [kept]: the kept lanes ascending."""
        return self.live.nonzero().flatten()

    @cached_property
    def positions(self) -> Tensor:
        """int32 [size]: a lane's place among the kept ones; of a pruned lane ~(the kept lanes before it)."""
        before = self.live.cumsum(0)
        return torch.where(self.live, before - 1, ~before).to(torch.int32)

    def index(self, capacity: int) -> Tensor:
        """int32 [capacity]: the kept lanes ascending, then -1."""
        index = torch.full((capacity,), -1, dtype=torch.int32, device="cpu")
        index[: self.kept] = self.lanes
        return index
