"""What a compacted layer computes with: the kept channels of both sides as indices, and a copy of W's kept rows and columns.

PackedWeight  the operands of torch.ops.apt_ext.compact_linear, of a size that does not change with the masks
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
from ..ops import call
from .mask import Mask

_compact_linear = torch.ops.apt_ext.compact_linear.default
_pack_kept_ = torch.ops.apt_ext.pack_kept_.default

Masks = tuple[Tensor | None, Tensor | None]  # (mask_in, mask_out)
_MOST = (1 << 30) - 1  # channels of a side that `kept` can say
_INDICES = ("index_in", "index_out", "position_in", "position_out")


def width(kept: int, size: int) -> int:
    """Kept channels are padded with zeros to whole 16 bytes; a side that keeps all of its channels is left as it is."""
    return size if kept == size else max(8, -(-kept // 8) * 8)


class PackedWeight:
    """The kept channels of an adapter, N out_features and K in_features; each [n] is a capacity, at least the size and a multiple of 8.

    packed                      [n_out * n_in] of W's dtype: W's kept rows and columns come first, contiguous; None without a base layer
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
        with torch.inference_mode(False), torch.no_grad():  # a tensor born in inference mode could not be saved for a backward
            self.packed = None if matrix is None else torch.empty(n_in * n_out, dtype=matrix.dtype, device=device)
            sizes = (n_in, n_out, len(mask_in), len(mask_out))
            for name, size in zip(_INDICES, sizes, strict=True):
                setattr(self, name, torch.full((size,), -1, dtype=torch.int32, device=device))
            self.kept = torch.zeros((), dtype=torch.int64, device="cpu")
        self._masks: dict[str, Mask] = {}  # {"in" or "out": the mask whose kept channels these are}
        self._on_host: tuple[Tensor, Tensor] | None = None  # the values of both, where the masks are on the CPU themselves
        self._captured = False  # a CUDA graph has been captured since the widths last changed
        self.change(mask_in, mask_out, matrix, anew=True)()

    def change(self, mask_in: Tensor | Mask, mask_out: Tensor | Mask, matrix: Tensor | None, anew: bool = False) -> Callable[[], None]:
        """The change to what these masks keep: what can fail is done here. W is copied where the exact zeros changed, or `anew`.

        Masks on the host make no device wait.
        """
        masks = {"in": self._known("in", mask_in), "out": self._known("out", mask_out)}
        if any(mask.values.is_meta for mask in masks.values()):
            return lambda: None
        word = 0
        new: dict[str, Tensor] = {}
        for i, (side, mask) in enumerate(masks.items()):
            word |= mask.num_kept << 30 * i | mask.has_fractions << 60 + i
            if anew or not torch.equal(mask.nonzero, self._masks[side].nonzero):
                capacity = len(getattr(self, f"index_{side}"))
                new |= {f"index_{side}": mask.index(capacity), f"position_{side}": mask.positions}

        def make() -> None:
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
                self.pack(matrix)
            if self._captured and self._sides(before) != self._sides(word):
                self._leave_captured(before)

        return make

    def note_capture(self) -> None:
        """A CUDA graph is captured with the widths of now."""
        self._captured = True

    def _sides(self, word: int) -> tuple[tuple[int, bool, bool], ...]:
        """Of each side what a captured graph keeps: its width, whether all channels are kept, and whether the mask has fractions."""
        counts = (word & _MOST, word >> 30 & _MOST)
        sizes = (len(self.position_in), len(self.position_out))
        return tuple((width(n, size), n == size, bool(word >> 60 + i & 1)) for i, (n, size) in enumerate(zip(counts, sizes, strict=True)))

    def _leave_captured(self, before: int) -> None:
        """Graphs that were captured with the widths of `before` are not to be replayed: say it, and let their weights read NaN.

        They read further than what is kept now, where less is.
        """
        self._captured = False
        if self.packed is not None:
            last, used = ((n_in[0] * n_out[0]) for n_in, n_out in (self._sides(before), self._sides(int(self.kept))))
            with torch.inference_mode(False), torch.no_grad():
                self.packed[used:last].fill_(float("nan"))
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
            expected = [len(self.position_out), len(self.position_in)]
            if list(matrix.shape) != expected:
                raise ValueError(
                    f"weight must have shape [N={expected[0]}, K={expected[1]}] to fit the masks, lora_B [N, R] and lora_A [R, K] of this "
                    f"compacted layer, got {list(matrix.shape)}"
                )
            _pack_kept_(self.packed, matrix.detach().to(self.packed.device), self.index_in, self.index_out, self.kept)

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """What `nn.Module._apply` does to a module's tensors; indices are written anew, since `to_empty` leaves them without values."""
        self.packed = None if self.packed is None else fn(self.packed)
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
    ) -> Tensor:
        """y [..., N] of x [..., K], in the products of the kept channels; compact: [..., width], the kept channels and then zeros."""
        indices = (self.channels_in if compact_in else self.index_in, self.channels_out if compact_out else self.index_out)
        given = (*masks, *indices, self.position_in, self.position_out, self.kept, scaling, compact_in, compact_out)
        # As in ops.apt_linear: the typed door is faster, and only for plain tensors.
        if type(x) is Tensor and not is_compiling() and not _is_torch_function_mode_enabled():
            return _C.compact_linear(x, packed, bias, A, B, *given)
        return call(_compact_linear, x, packed, bias, A, B, *given)  # type: ignore[no-any-return]
