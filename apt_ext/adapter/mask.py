"""What an adapter knows about the values of its two masks without asking a device: the part that both ways to compute stand on."""

from __future__ import annotations

import warnings

from torch import Tensor, cuda
from torch.compiler import is_compiling

from .. import _C
from ..common.checks import on_host
from .host_mask import HostMask
from .merge import Merging
from .recompute_check import version

MASKS = ("mask_in", "mask_out")


class Masking(Merging):
    """Two masks in buffers. State: which of them is all ones, and on a device the values of each, as of a version of its buffer.

    torch counts the writes into a buffer, so what others write there is noticed. A write through `.data`, NumPy or a pointer is not
    counted: on the CPU the values themselves are looked at in each forward, on a device at the next event (`settle`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._mask_stamps: dict[str, tuple[Tensor, int | None]] = {}  # the buffer, and its version where it is known to be all ones
        self._mask_values: dict[str, tuple[Tensor, int, Tensor]] = {}  # a mask on a device, its version, and its values on the host

    def host_mask(self, name: str) -> Tensor:
        """The values of "mask_in" or "mask_out", to be read only; waits for the device where somebody else has written them."""
        buffer = self._buffers[name]
        assert buffer is not None
        if buffer.is_cpu:
            return buffer.detach()
        placed, counted, values = self._mask_values.get(name, (None, None, buffer))
        if placed is not buffer or counted != buffer._version:
            values = on_host(buffer)
            self._keep_values(name, values)
        return values

    def settle(self, call: str) -> None:
        """Warn where a mask on a device was written without torch counting it, and go on with what is there.

        Waits for the device. On the CPU there is nothing to do: each forward looks at the values.
        """
        found: dict[str, HostMask] = {}
        for name in MASKS:
            buffer = self._buffers[name]
            assert buffer is not None
            if not buffer.is_meta and not _looked_at_each_time(buffer):
                expected, values = self._expected(name, buffer), on_host(buffer)
                if expected is not None and not bool((values == expected).all()):
                    found[name] = HostMask.of(values)
        if not found:
            return
        for name, mask in found.items():
            self._stamp_mask(name, mask)
            self._keep_values(name, mask.values)
        self._masks_were_written()
        warnings.warn(
            f"{self._what(call)}: {' and '.join(found)} was written without torch counting it (through .data, NumPy or a pointer): forward "
            "passes since then may have used the values from before, from now on the new ones are used; set_masks changes masks",
            stacklevel=3,
        )

    def _expected(self, name: str, buffer: Tensor) -> Tensor | float | None:
        """What the mask `name` holds as far as torch has counted; None where nothing is known."""
        if self._known_ones(name):
            return 1.0
        placed, counted, values = self._mask_values.get(name, (None, None, None))
        return values if placed is buffer and counted == version(buffer) else None

    def _masks_were_written(self) -> None:
        """By somebody else: what follows from their values is old."""

    def _keep_values(self, name: str, values: Tensor) -> None:
        buffer: Tensor = getattr(self, name)
        if buffer.device.type not in ("cpu", "meta") and not buffer.is_inference():
            self._mask_values[name] = (buffer, buffer._version, values)

    def _stamp_mask(self, name: str, mask: HostMask) -> None:
        """The mask `name` holds these values now."""
        self._place_stamp(name, mask.ones)
        self._changes.note(**{name: mask.digest})

    def _place_stamp(self, name: str, ones: bool) -> None:
        """Note whether the mask `name`, as it is now, is all ones."""
        buffer: Tensor = getattr(self, name)
        self._mask_stamps[name] = (buffer, version(buffer) if ones else None)

    def _known_ones(self, name: str) -> bool:
        """Whether the mask `name` is noted as all ones and has not changed since."""
        placed, counted = self._mask_stamps.get(name, (None, None))
        return placed is not None and counted is not None and placed is self._buffers[name] and counted == placed._version

    def _masks_are_own(self) -> bool:
        """Whether the masks in place are the adapter's, and not others that ``torch.func.functional_call`` put there for a call."""
        return all(self._mask_stamps[name][0] is self._buffers[name] for name in MASKS)

    def _effective_masks(self, mask_in: Tensor | None, mask_out: Tensor | None, compiling: bool) -> tuple[Tensor | None, Tensor | None]:
        """The overrides, else the masks, or None for one known to be all ones: then it costs nothing, and no device is asked.

        A compiled or captured graph outlives this knowledge, so there the masks always take part. The version counter
        notices a mask written by anybody else (DDP broadcasts buffers).
        """
        own_in, own_out = self._buffers["mask_in"], self._buffers["mask_out"]
        assert own_in is not None and own_out is not None
        ones_in = ones_out = False
        if not compiling:
            (placed_in, version_in), (placed_out, version_out) = self._mask_stamps["mask_in"], self._mask_stamps["mask_out"]
            ones_in = mask_in is None and placed_in is own_in and version_in is not None and version_in == own_in._version
            ones_out = mask_out is None and placed_out is own_out and version_out is not None and version_out == own_out._version
            if ones_in or ones_out:
                if is_compiling():  # by its own frame, where that of the forward is not compiled
                    ones_in = ones_out = False
                elif own_in.is_cpu:
                    if not _C.all_ones(own_in if ones_in else None, own_out if ones_out else None):
                        self._see_written_masks()
                        ones_in, ones_out = ones_in and self._known_ones("mask_in"), ones_out and self._known_ones("mask_out")
                elif own_in.is_cuda and cuda.is_current_stream_capturing():
                    ones_in = ones_out = False
        if mask_in is None and not ones_in:
            mask_in = own_in
        if mask_out is None and not ones_out:
            mask_out = own_out
        return mask_in, mask_out

    def _see_written_masks(self) -> None:
        """On the CPU somebody wrote into a mask that was known: know what it holds now, also as the function that a backward finds."""
        for name in MASKS:
            buffer = self._buffers[name]
            assert buffer is not None
            self._stamp_mask(name, HostMask.of(buffer))
        self._changes.check()


def _looked_at_each_time(buffer: Tensor) -> bool:
    return buffer.is_cpu
