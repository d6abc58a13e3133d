"""What a compacted layer computes with: the kept channels of both sides as indices, and a copy of W's kept rows and columns.

PackedWeight  the operands of torch.ops.apt_ext.compact_linear
width         how many channels are computed for so many kept ones
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import _is_torch_function_mode_enabled
from torch.compiler import is_compiling

from .. import _C
from ..common.checks import on_host
from ..common.log import advise
from ..ops import call, drawn_rng
from .mask import Mask
from .packed_room import CapturedRooms, as_dynamic, room

_compact_linear = torch.ops.apt_ext.compact_linear.default
_pack_kept_ = torch.ops.apt_ext.pack_kept_.default

Change = Callable[..., None]  # made by calling it, with or without a W [N, K]
Masks = tuple[Tensor | None, Tensor | None]  # (mask_in, mask_out)
_MOST = (1 << 30) - 1  # channels of a side that `kept` can say
_INDICES = ("index_in", "index_out", "position_in", "position_out")


def width(kept: int, size: int) -> int:
    """Kept channels are padded with zeros to whole 16 bytes; a side that keeps all of its channels is left as it is."""
    return size if kept == size else max(8, -(-kept // 8) * 8)


class PackedWeight:
    """The kept channels of an adapter, N out_features and K in_features; each [n] is a capacity, at least the size and a multiple of 8.

    packed                      a vector of W's dtype: W's kept rows and columns come first, contiguous. None
                                without a base layer. Its size is that of what is kept now, dynamic for a
                                compiler. It may be larger where a CUDA graph reads it: that memory stays, so
                                what is kept later lies there as long as it fits.
    index_in, index_out         int32 [n_in], [n_out]: the kept channels ascending, then -1
    position_in, position_out   int32 [K], [N]: a channel's place among the kept ones; of a pruned channel ~(the kept channels before it)
    kept                        int64 on the CPU, no dimension (only such a tensor may lie beside others on a GPU when traced): how many
                                channels each side keeps, and whether their masks have fractions
    channels_in, channels_out         the part of an index that says the width of kept channels handed over
    """

    packed: Tensor | None
    index_in: Tensor
    index_out: Tensor
    position_in: Tensor
    position_out: Tensor
    kept: Tensor
    channels_in: Tensor
    channels_out: Tensor

    def __init__(self, mask_in: Tensor, mask_out: Tensor, matrix: Tensor | None) -> None:
        """The channels that the masks keep, of W [N, K] (Conv1D: a transposed view)."""
        n_in, n_out = (max(8, -(-len(mask) // 8) * 8) for mask in (mask_in, mask_out))
        device = mask_in.device
        self.packed = None if matrix is None else room(0, matrix.dtype, device)
        with torch.inference_mode(False), torch.no_grad():  # a tensor born in inference mode could not be saved for a backward
            sizes = (n_in, n_out, len(mask_in), len(mask_out))
            for name, size in zip(_INDICES, sizes, strict=True):
                setattr(self, name, torch.full((size,), -1, dtype=torch.int32, device=device))
            self.kept = torch.zeros((), dtype=torch.int64, device="cpu")
        self._masks: dict[str, Mask] = {}  # {"in" or "out": the mask whose kept channels these are}
        self._on_host: tuple[Tensor, Tensor] | None = None  # the values of both, where the masks are on the CPU themselves
        self._captured = False  # a CUDA graph has been captured since the widths last changed
        self.is_captured = False  # a CUDA graph has ever been captured, and may be replayed
        self._rooms = CapturedRooms()
        self.change(mask_in, mask_out, matrix, anew=True)()

    def change(
        self,
        mask_in: Tensor | Mask,
        mask_out: Tensor | Mask,
        matrix: Tensor | None,
        anew: bool = False,
    ) -> Change:
        """The change to what these masks keep: what can fail is done here. W is copied where the exact zeros changed, or `anew`.

        The change takes a W of its own where W is written in between. Masks on the host make no device wait.
        More room is allocated here, beside the present one. Less is allocated by the change itself, which
        stays in the present one where that fails.
        """
        masks = {"in": self._known("in", mask_in), "out": self._known("out", mask_out)}
        if any(mask.values.is_meta for mask in masks.values()):
            return lambda _=None: None
        word = 0
        new: dict[str, Tensor] = {}
        for i, (side, mask) in enumerate(masks.items()):
            word |= mask.num_kept << 30 * i | mask.has_fractions << 60 + i
            if anew or not torch.equal(mask.nonzero, self._masks[side].nonzero):
                capacity = len(getattr(self, f"index_{side}"))
                new |= {f"index_{side}": mask.index(capacity), f"position_{side}": mask.positions}
        enter = self._place(masks, word, matrix) if new and matrix is not None else None

        def make(written: Tensor | None = None) -> None:
            self._masks = masks
            self._hold()
            before = int(self.kept)
            if before != word:
                self.kept.fill_(word)
            if new:
                with torch.no_grad():
                    for name, value in new.items():
                        getattr(self, name).copy_(value, non_blocking=True)  # pageable memory is read before this returns
                self.set_views()
            if enter is not None:
                enter(written)
            if self._captured and self._sides(before) != self._sides(word):
                self._leave_captured()

        return make

    def _place(self, masks: dict[str, Mask], word: int, matrix: Tensor) -> Change | None:
        """Prepare the copying of what is kept of W to where it will lie: what can fail is done here."""
        present, used = self.packed, self._used(word)
        if present is None:
            return None
        self._check_shape(matrix)
        target = self._rooms.fitting(used)
        if target is None and used >= len(present):
            target = present if used == len(present) else room(used, present.dtype, present.device)
        staged = None
        if matrix.is_cpu and not present.is_cpu:  # the device needs no room for the whole of W then
            index_in = masks["in"].index(len(self.index_in))
            index_out = masks["out"].index(len(self.index_out))
            staged = kept_on_host(matrix.detach(), index_in, index_out, word, used)

        def enter(written: Tensor | None = None) -> None:
            self._enter(target, used)
            if written is not None or staged is None:
                self.pack(matrix if written is None else written)
            elif self.packed is not None:
                with torch.no_grad():
                    self.packed[:used].copy_(staged, non_blocking=True)
            self._rooms.blank(self.packed, used)

        return enter

    def _enter(self, target: Tensor | None, used: int) -> None:
        """Go to `target`, or where there is none to as little memory as `used` values need."""
        present = self.packed
        assert present is not None
        if target is None and used != len(present):
            try:
                target = room(used, present.dtype, present.device)
            except (RuntimeError, MemoryError):
                if used > len(present):
                    raise
        if target is not None and target is not present:
            self._rooms.blank(present, 0)
            self.packed = target

    def note_capture(self) -> None:
        """A CUDA graph is captured with the widths of now."""
        self._captured = self.is_captured = True
        if self.packed is not None:
            self._rooms.hold(self.packed)

    def _sides(self, word: int) -> tuple[tuple[int, bool, bool], ...]:
        """Of each side what a captured graph keeps: its width, whether all channels are kept, and whether the mask has fractions."""
        counts = (word & _MOST, word >> 30 & _MOST)
        sizes = (len(self.position_in), len(self.position_out))
        return tuple((width(n, size), n == size, bool(word >> 60 + i & 1)) for i, (n, size) in enumerate(zip(counts, sizes, strict=True)))

    def _used(self, word: int) -> int:
        """Return how many values of `packed` are read."""
        sides = self._sides(word)
        return sides[0][0] * sides[1][0]

    def _leave_captured(self) -> None:
        """Say that graphs that were captured with other widths are not to be replayed."""
        self._captured = False
        advise(
            "capture",
            "compact: masks keep other widths than those that a CUDA graph was captured with, and replaying that graph would give wrong "
            "values; capture it again after a change of masks",
        )

    def holds(self, mask_in: Tensor | None, mask_out: Tensor | None) -> bool:
        """Whether these masks hold the values that it was made of. False on a device, which is not asked."""
        held = self._on_host
        return held is not None and _C.same_masks(mask_in, held[0], mask_out, held[1])

    def _hold(self) -> None:
        """Keep both masks at hand where they are on the CPU themselves."""
        held = tuple(mask.values for mask in self._masks.values())
        self._on_host = (held[0], held[1]) if len(held) == 2 and self.index_in.is_cpu and all(one.is_cpu for one in held) else None

    def _known(self, side: str, mask: Tensor | Mask) -> Mask:
        """The mask with what follows from it, which is known already where the values are those of the last one."""
        if isinstance(mask, Mask):
            return mask
        last = self._masks.get(side)
        return Mask.of(mask) if last is None or mask.is_meta or not torch.equal(on_host(mask), last.values) else last

    def knows(self, mask_in: Tensor, mask_out: Tensor) -> bool:
        """Whether it is that of these masks, which are on the host."""
        return bool(self._masks) and all(torch.equal(m, self._masks[side].values) for side, m in (("in", mask_in), ("out", mask_out)))

    def hands_over(self, other: PackedWeight) -> bool:
        """Whether what this one writes are the channels that the other reads, fewer than all."""
        fewer = other.channels_in.numel() < other.position_in.numel()
        return fewer and torch.equal(self._masks["out"].nonzero, other._masks["in"].nonzero)

    def set_views(self) -> None:
        """The widths as shapes: what a compiler takes for dynamic once they have changed."""
        word = int(self.kept)
        with torch.inference_mode(False):
            self.channels_in = self.index_in[: width(word & _MOST, len(self.position_in))]
            self.channels_out = self.index_out[: width(word >> 30 & _MOST, len(self.position_out))]

    def pack(self, matrix: Tensor | None) -> None:
        """Copy what is kept of W, in one pass over it."""
        if self.packed is not None and matrix is not None:
            self._check_shape(matrix)
            _pack_kept_(self.packed, matrix.detach().to(self.packed.device), self.index_in, self.index_out, self.kept)

    def full_size(self) -> tuple[int, int]:
        """Return (N, K)."""
        return len(self.position_out), len(self.position_in)

    def _check_shape(self, matrix: Tensor) -> None:
        expected = self.full_size()
        if matrix.shape != expected:
            raise ValueError(
                f"weight must have shape [N={expected[0]}, K={expected[1]}] to fit the masks, lora_B [N, R] and lora_A [R, K] of this "
                f"compacted layer, got {list(matrix.shape)}"
            )

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """What `nn.Module._apply` does to a module's tensors; indices are written anew, since `to_empty` leaves them without values."""
        if self.packed is not None:
            moved = fn(self.packed)
            if moved is not self.packed:  # the factors are elsewhere then, too: no graph is to be replayed
                self._rooms = CapturedRooms()
                self.packed = as_dynamic(moved)
        for name in _INDICES:
            kind, side = name.split("_")
            value, mask = getattr(self, name), self._masks.get(side)
            moved = fn(value)
            if moved is not value and not moved.is_meta and mask is not None:
                with torch.no_grad():
                    moved.copy_(mask.index(len(moved)) if kind == "index" else mask.positions)
            setattr(self, name, moved)
        self._hold()
        self.set_views()

    def apply(
        self,
        x: Tensor,
        packed: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        masks: Masks,
        scaling: float,
        compact_in: bool = False,
        compact_out: bool = False,
        dropout: float = 0.0,
        rng: Tensor | None = None,
    ) -> Tensor:
        """y [..., N] of x [..., K], in the products of the kept channels; compact: [..., width], the kept channels and then zeros.

        dropout and rng as in `ops.apt_linear`: what is dropped of the kept channels is what the full-size layer drops of them.
        """
        if rng is None and dropout:
            rng = drawn_rng(x)
        indices = (self.channels_in if compact_in else self.index_in, self.channels_out if compact_out else self.index_out)
        given = (*masks, *indices, self.position_in, self.position_out, self.kept, scaling, compact_in, compact_out, dropout, rng)
        # As in ops.apt_linear: the typed door is faster, and only for plain tensors.
        if type(x) is Tensor and not is_compiling() and not _is_torch_function_mode_enabled():
            return _C.compact_linear(x, packed, bias, A, B, *given)
        return call(_compact_linear, x, packed, bias, A, B, *given)  # type: ignore[no-any-return]


def kept_on_host(matrix: Tensor, index_in: Tensor, index_out: Tensor, word: int, used: int) -> Tensor:
    """Gather what is kept of a W in host memory there, [used]; `word` says what `PackedWeight.kept` does."""
    with torch.inference_mode(False), torch.no_grad():
        found = torch.empty(used, dtype=matrix.dtype, device=matrix.device)
        _pack_kept_(found, matrix, index_in, index_out, torch.tensor(word, device="cpu"))
    return found
