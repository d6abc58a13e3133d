"""A mask's values on the host and what follows from them, and what is known of the masks that lie in a module's buffers."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor, cuda
from torch.compiler import is_compiling

from .. import _C
from ..common import own_capture
from ..common.checks import on_host
from .recompute_check import version

SIDES = ("mask_in", "mask_out")
Buffers = Mapping[str, Tensor | None]  # a module's own registry


class Mask:
    """A mask [size] float32 on the host and what follows from it, computed once however many adapters carry it.

    Nobody writes into `values`, so nothing here becomes old. Meta has no values, and only `all_ones` may be asked.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @classmethod
    def of(cls, mask: Tensor | Mask) -> Mask:
        """Return `mask` itself, or a Mask of a copy of the tensor."""
        if isinstance(mask, Mask):
            return mask
        with torch.inference_mode(False), torch.no_grad():
            return cls(on_host(mask).clone())

    def known(self) -> Mask:
        """Compute what is noted of it, which can fail for lack of memory, and return itself."""
        _ = self.all_ones, self.digest
        return self

    @cached_property
    def num_ones(self) -> int:
        """The number of entries that are exactly 1; 0 on meta."""
        return 0 if self.values.is_meta else int((self.values == 1).count_nonzero())

    @property
    def all_ones(self) -> bool:
        """True if every entry is 1; False on meta, where values are unknown."""
        return not self.values.is_meta and self.num_ones == len(self.values)

    @cached_property
    def digest(self) -> object:
        """Equal for equal values; on meta equal to nothing else."""
        if self.values.is_meta:
            return object()
        values = self.values.contiguous()
        return hashlib.blake2b(ctypes.string_at(values.data_ptr(), values.nbytes), digest_size=16).digest()

    @cached_property
    def nonzero(self) -> Tensor:
        """[size] bool: the channels that are kept."""
        return self.values.bool()

    @cached_property
    def num_kept(self) -> int:
        """The number of nonzero entries."""
        return int(self.nonzero.count_nonzero())

    @property
    def has_fractions(self) -> bool:
        """True if an entry lies strictly between 0 and 1."""
        return self.num_ones < self.num_kept

    @cached_property
    def channels(self) -> Tensor:
        """int64 [num_kept]: the kept channels, ascending."""
        return self.nonzero.nonzero().flatten()

    @cached_property
    def positions(self) -> Tensor:
        """int32 [size]: a channel's place among the kept ones; of a pruned one ~(the kept channels before it)."""
        before = self.nonzero.cumsum(0)
        return torch.where(self.nonzero, before - 1, ~before).to(torch.int32)

    def index(self, capacity: int) -> Tensor:
        """int32 [capacity]: the kept channels ascending, then -1."""
        index = torch.full((capacity,), -1, dtype=torch.int32, device="cpu")
        index[: self.num_kept] = self.channels
        return index


class _Placed:
    """What is known of the mask in one buffer, as of a version that torch counts (None: made in inference mode)."""

    def __init__(self, buffer: Tensor, ones: bool, values: Tensor | None = None) -> None:
        self.buffer, self.values = buffer, values
        self.values_at = version(buffer)
        self.ones_at = self.values_at if ones else None


class PlacedMasks:
    """What a module knows of its masks without asking a device. The buffers themselves are the module's.

    torch counts the writes into a buffer, so what others write there is noticed. A write through `.data`, NumPy or a
    pointer is not counted: on the CPU the values are looked at in each forward, on a device at the next event.

    moving  on a device the masks take part even where they are ones, because they are about to move: the arithmetic, and a graph that was
            captured of it, then stay the same while they do
    """

    moving = False

    def __init__(self, ones: Mapping[str, bool], buffers: Buffers) -> None:
        self.names = tuple(ones)
        self._placed: dict[str, _Placed] = {}
        for name, known in ones.items():
            self.note(name, buffers[name], known)

    def note(self, name: str, buffer: Tensor | None, ones: bool, values: Tensor | None = None) -> None:
        """Note whether the mask in `buffer` is all ones, and its values on the host if they are given."""
        assert buffer is not None
        on_device = buffer.device.type not in ("cpu", "meta") and not buffer.is_inference()
        self._placed[name] = _Placed(buffer, ones, values if on_device else None)

    def is_ones(self, name: str, buffer: Tensor | None) -> bool:
        """True if the mask is noted as all ones and nobody wrote into it since."""
        placed = self._placed.get(name)
        return placed is not None and placed.ones_at is not None and placed.buffer is buffer and placed.ones_at == placed.buffer._version

    def lies_in(self, name: str, buffer: Tensor | None) -> bool:
        """True if `buffer` is the one that was noted."""
        return name in self._placed and self._placed[name].buffer is buffer

    def on_host(self, name: str, buffer: Tensor | None) -> Tensor:
        """The values [size], to be read only. Waits for the device where somebody else has written them."""
        assert buffer is not None
        if buffer.is_cpu:
            return buffer.detach()
        values = self._as_counted(name, buffer)
        if values is None:
            values = on_host(buffer)
            placed = self._placed[name]
            if placed.buffer is buffer and buffer.device.type != "meta" and not buffer.is_inference():
                placed.values, placed.values_at = values, version(buffer)
        return values

    def expected(self, name: str, buffer: Tensor) -> Tensor | float | None:
        """What the mask holds as far as torch has counted; None where nothing is known."""
        return 1.0 if self.is_ones(name, buffer) else self._as_counted(name, buffer)

    def _as_counted(self, name: str, buffer: Tensor) -> Tensor | None:
        placed = self._placed.get(name)
        return placed.values if placed is not None and placed.buffer is buffer and placed.values_at == version(buffer) else None

    def effective(
        self, buffers: Buffers, mask_in: Tensor | None, mask_out: Tensor | None, compiling: bool
    ) -> tuple[Tensor | None, Tensor | None, bool]:
        """The overrides, else the masks, or None for one known to be all ones; and whether a write on the CPU was found.

        A mask of ones costs nothing, and no device is asked. A compiled or captured graph outlives this knowledge, so
        there the masks always take part, unless its owner captures it anew when this changes (`own_capture`). The
        version counter notices a mask written by others (DDP broadcasts buffers).
        """
        own_in, own_out = buffers["mask_in"], buffers["mask_out"]
        assert own_in is not None and own_out is not None
        ones_in = ones_out = False
        if not compiling:
            inside, out = self._placed["mask_in"], self._placed["mask_out"]
            at_in, at_out = inside.ones_at, out.ones_at
            ones_in = mask_in is None and at_in is not None and inside.buffer is own_in and at_in == own_in._version
            ones_out = mask_out is None and at_out is not None and out.buffer is own_out and at_out == own_out._version
            if ones_in or ones_out:
                if is_compiling():  # by its own frame, where that of the forward is not compiled
                    ones_in = ones_out = False
                elif own_in.is_cpu:
                    if not _C.all_ones(own_in if ones_in else None, own_out if ones_out else None):
                        return mask_in, mask_out, True
                elif own_in.is_cuda and (self.moving or cuda.is_current_stream_capturing() and not own_capture.is_recording()):
                    ones_in = ones_out = False
        if mask_in is None and not ones_in:
            mask_in = own_in
        if mask_out is None and not ones_out:
            mask_out = own_out
        return mask_in, mask_out, False
