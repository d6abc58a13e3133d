"""How an adapter computes on kept lanes alone.

    Compacting    the part of the adapter that makes a Compaction and keeps it up to date
    Chain         adapters that hand over kept lanes alone
    DENSE         where the whole W is meanwhile

A Compaction is in no registry of the module: DDP would broadcast it and a state_dict hold it. It follows from W and the masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, cuda
from torch._C._functorch import is_functorch_wrapped_tensor

from ..common.checks import checked_bool, checked_choice, on_host
from ..distributed.dtensor import is_sharded
from ..ops import dropped
from ..optim.step_guard import is_guarded
from .host_mask import HostMask
from .mask import Masking
from .packed_weight import Compaction
from .recompute_check import version
from .shared_memory import is_read_by_other

DENSE = ("keep", "cpu", "release")


class Chain:
    """Writers whose outputs the reader alone reads, through elementwise functions that are finite at 0: they hand over kept lanes.

    Open where all of them compute on the same kept lanes, fewer than all; else everything is full-size.
    """

    def __init__(self, writers: list[Compacting], reader: Compacting) -> None:
        self.writers, self.reader, self.same = writers, reader, False
        for writer in writers:
            writer._chain_out = self
        reader._chain_in = self
        self.compare()

    def compare(self) -> None:
        """After a change of masks, or of who is compacted."""
        kept, writers = self.reader._compaction, [writer._compaction for writer in self.writers]
        self.same = kept is not None and all(writer is not None and writer.hands_over(kept) for writer in writers)

    def is_open(self) -> bool:
        return self.same and not any(one._merged or one._disabled for one in (*self.writers, self.reader))


class Compacting(Masking):
    """Computes on kept lanes where it is asked to. State: one Compaction or none, and what it is chained to."""

    dropout: float
    _scaling: float
    _disabled: bool

    def __init__(self) -> None:
        super().__init__()
        self._compaction: Compaction | None = None
        self._chain_in: Chain | None = None
        self._chain_out: Chain | None = None
        self._seen: tuple[Tensor, int | None] | None = None  # see _look
        self._dense = "keep"
        self._away = False  # the base layer's weight is a placeholder: one NaN that is read everywhere
        self._host: Tensor | None = None  # what it was, as stored, where dense is "cpu"

    @property
    def compacted(self) -> bool:
        """Whether the products run on kept rows and columns only."""
        return self._compaction is not None

    def compact(self, on: bool = True, dense: str = "keep") -> None:
        """From now on forward and backward compute on kept rows and columns only: the same function, at the cost of what is kept.

        x and y stay full-size, and masks change as before, also back up, without recompiling anything: every change of exact zeros copies
        what is kept of W, in one pass. A captured CUDA graph keeps the widths of its capture: a change of widths after it is logged, and
        where less is kept the old graph gives NaN; capture again.
        ``compact(False)`` undoes it. A state_dict holds nothing of it.

        dense says where the whole W [N, K] is meanwhile:
            "keep"     where it was. The copy has room for all of W: twice W's bytes on the device.
            "cpu"      in host memory: W's bytes there, and the room for all of W on the device. Every change of zeros copies from the host.
            "release"  nowhere: the bytes of what is kept, and nothing else. Masks can only fall, and a change of zeros recompiles; a
                       state_dict, a merge and ``compact(False)`` have zeros where W was pruned.
        With "cpu" and "release" ``weight`` reads NaN, and what computes full-size (a forward with masks of its own, disable_adapter) is
        refused; merge_weights, state_dict and load_state_dict bring the weight back as long as they need it.

        Masks are changed by set_masks, a block's mask or load_state_dict; what is written into a mask's buffer past them is noticed by the
        next forward on the CPU, and on a device by the next such change, state_dict, merge, compact or cut.

        A backward after a change of exact zeros raises torch's error about a tensor modified in place; a second derivative is refused.

        Raises RuntimeError while merged, under FSDP and on meta; nothing has then changed.
        """
        self._check_compact(on, dense)
        self.settle("compact")
        undo = self._undo_of_compact()
        try:
            self._bring_back()
            self._compaction = Compaction(self.mask_in, self.mask_out, self._source()) if on else None
            self._dense = dense if on else "keep"
            self._put_away()
            self._look()
        except BaseException:  # of memory there was not enough
            undo()
            raise
        self._compare_chains()

    def way_back(self, on: bool, dense: str) -> Callable[[], None]:
        """A function that undoes compact(on, dense) after it was done: as little as possible is held for it, and on the host."""
        compacted, was, weight = self.compacted, self._dense, self.weight
        original: Tensor | None = None
        if on and dense == "release" and weight is not None and not (self._away and self._host is None):
            with torch.inference_mode(False), torch.no_grad():
                original = self._host if self._away else weight.detach().to("cpu", copy=True)

        def undo() -> None:
            self.compact(False)
            if original is not None and weight is not None:
                with torch.inference_mode(False), torch.no_grad():
                    weight.set_(original.to(weight.device))  # type: ignore[call-overload]
            if compacted:
                self.compact(True, was)

        return undo

    def _undo_of_compact(self) -> Callable[[], None]:
        """A function that brings back what is now, without allocating anything."""
        plain = {name: self.__dict__[name] for name in ("_compaction", "_dense", "_away", "_host", "_seen")}
        weight = self.weight
        memory = None if weight is None else weight.detach()

        def undo() -> None:
            if weight is not None and memory is not None and weight.data_ptr() != memory.data_ptr():
                with torch.inference_mode(False), torch.no_grad():
                    weight.set_(memory)  # type: ignore[call-overload]
            self.__dict__.update(plain)

        return undo

    def _check_compact(self, on: bool, dense: str) -> None:
        checked_bool("on", on)
        checked_choice("dense", dense, DENSE)
        if self._merged:
            raise RuntimeError("compact: the weight is merged; call unmerge_weights() first")
        if on and dense != "keep" and self._disabled:
            raise RuntimeError(f"compact: dense={dense!r} would put away the weight that disable_adapter computes with; call it outside")
        if on and dense != "keep" and is_read_by_other(self):
            raise RuntimeError(f"compact: dense={dense!r} would put away a weight that another adapter reads, too; use dense='keep'")
        if on:
            self._refuse_sharded("compact")
            if self.mask_in.is_meta:
                raise RuntimeError("compact: masks on meta have no values; call it where the module has its memory")

    # -- the whole weight ----------------------------------------------------------------------------------------------------

    def _put_away(self) -> None:
        """Give the memory of the base layer's weight back, where dense says so."""
        if self._compaction is None or self._dense == "keep":
            return
        weight = self.weight
        if self._merged or weight is None or weight.is_meta:
            return
        with torch.inference_mode(False), torch.no_grad():
            if not self._away:
                self._host = weight.detach().to("cpu", copy=True) if self._dense == "cpu" else None
            if self._dense == "release":
                self._compaction.trim()
        self._away = True
        self._expand()

    def _bring_back(self) -> None:
        """The base layer's weight is what it says again."""
        weight = self.weight
        if not self._away or weight is None:
            return
        with torch.inference_mode(False), torch.no_grad():
            value = self._whole()
            if value.is_meta:
                value = torch.empty(value.shape, dtype=weight.dtype, device=weight.device)
            else:
                value = value.to(weight.device, copy=value is self._host)  # which a teacher may share
            weight.set_(value)  # type: ignore[call-overload]
        self._away, self._host = False, None

    def _whole(self) -> Tensor:
        """The weight that is away, as it is stored: [N, K], or Conv1D's [K, N]."""
        if self._host is not None:
            return self._host
        assert self._compaction is not None
        whole = self._compaction.full()
        return whole.t().contiguous() if self._transposed else whole

    def _stored_elsewhere(self) -> Tensor | None:
        """What holds the weight that is away: the host's copy, or of "release" the kept part. It is replaced, never written."""
        if not self._away or self._host is not None:
            return self._host
        return None if self._compaction is None else self._compaction.packed

    def _refuse_away(self, what: str) -> None:
        if self._away:
            raise RuntimeError(
                f"{what} needs the whole weight, which compact(dense={self._dense!r}) has put away; call compact(False) first"
            )

    def _refuse_rising(self, what: str, masks: dict[str, Tensor]) -> None:
        kept = self._compaction
        if kept is None or not ((self._away or self._merged) and self._dense == "release"):
            return
        for name, mask in masks.items():
            if bool(((on_host(mask) != 0) & ~kept.live(name)).any()):
                raise RuntimeError(f"{what}: {name} must not rise from 0, since compact(dense='release') keeps no pruned weights")

    def merge_weights(self, keep: str = "device") -> None:
        self._bring_back()
        try:
            super().merge_weights(keep)
        except BaseException:
            self._put_away()
            raise

    def unmerge_weights(self) -> None:
        super().unmerge_weights()
        self._put_away()

    def _carries(self, name: str, mask: HostMask) -> bool:
        """Whether this mask is in place already, and so is all that follows from the masks and the weight, whoever has written them."""
        buffer, (placed, _) = self._buffers[name], self._mask_stamps.get(name, (None, None))
        if buffer is None or placed is not buffer or buffer.is_meta or mask.values.is_meta:
            return False
        if not torch.equal(self.host_mask(name), mask.values) or self._known_ones(name) != mask.ones:
            return False
        kept = self._compaction
        return kept is None or kept.knows(self.host_mask("mask_in"), self.host_mask("mask_out")) and not self._is_stale()

    def _compare_chains(self) -> None:
        for chain in (self._chain_in, self._chain_out):
            if chain is not None:
                chain.compare()

    def _unchain(self) -> None:
        self._chain_in = self._chain_out = None

    @property
    def handed_over(self) -> Tensor | None:
        """[in_features] int32: where a channel lies in an input of kept lanes alone, below 0 where it is pruned; None while not compact."""
        return None if self._compaction is None else self._compaction.position_in

    def _compact_anew(self) -> None:
        """The weight is another, or the sizes are."""
        kept = self._compaction
        same = kept is not None and (len(kept.position_in), len(kept.position_out)) == (len(self.mask_in), len(self.mask_out))
        if kept is not None and same and self._dense != "release":
            kept.change(self.host_mask("mask_in"), self.host_mask("mask_out"), self._source(), anew=True)()
        elif kept is not None:
            self._compaction = kept = None  # its memory first
            self._compaction = Compaction(self.mask_in, self.mask_out, self._source())
        self._put_away()
        self._look()
        self._compare_chains()

    def _compaction_change(self, masks: dict[str, HostMask]) -> Callable[[], None]:
        """What follows from a change to masks on the host that were checked: what can fail is done here, unless sizes change (a cut)."""
        kept = self._compaction
        if kept is None:
            return self._compact_anew
        present = {name: self.host_mask(name) for name in ("mask_in", "mask_out")}
        if any(mask.values.shape != present[name].shape for name, mask in masks.items()):
            return self._compact_anew
        self._refuse_sharded("set_masks")
        stale = self._is_stale()
        if stale and not self._is_gathered():
            self._refuse_away("another weight in the place of the base layer's")
        if self._away and self._dense == "release":  # against what the copy holds: buffers may have been written by others
            every = {name: HostMask.of(mask) for name, mask in (present | masks).items()}
            self._refuse_rising("set_masks", {name: mask.values for name, mask in every.items()})
            falls = any(bool((kept.live(name) & ~mask.live).any()) for name, mask in every.items())
            change = kept.narrow(**every) if falls else kept.change(every["mask_in"], every["mask_out"], None)
        else:
            change = kept.change(**(present | masks), matrix=self._source(), anew=stale and not self._away)

        def make() -> None:
            change()
            if stale:
                self._look()
            self._compare_chains()

        return make

    def _refuse_sharded(self, call: str) -> None:
        weight, shape = self._matrix(), (len(self.mask_out), len(self.mask_in))
        if is_sharded(self.lora_A) or (weight is not None and (is_sharded(weight) or weight.shape != shape)):
            raise RuntimeError(f"{call}: FSDP has sharded this layer, so no rank has the whole weight to copy kept rows and columns from")

    def _source(self) -> Tensor | None:
        """W [N, K] as it is without a merge."""
        weight = self._whole() if self._away else self._kept.get("weight", self.weight)
        return weight.t() if weight is not None and self._transposed else weight

    def _look(self, weight: Tensor | None = None) -> None:
        """Remember what is in the place of the base layer's weight, its memory (so that no other gets the address) and its version."""
        weight = self.weight if weight is None and self._compaction is not None else weight
        self._seen = None if weight is None else (weight.detach(), version(weight))

    def _is_stale(self, weight: Tensor | None = None) -> bool:
        """Whether somebody has written into the weight since then, or put another into its place."""
        weight = self.weight if weight is None else weight
        if weight is None or self._seen is None:
            return False
        memory, counted = self._seen
        if weight.data_ptr() != memory.data_ptr():
            return True
        return not self._away and version(weight) != counted  # nobody writes into a placeholder, whose counter an alias may share

    def _is_gathered(self) -> bool:
        """Whether FSDP2 may have put tensors of its own, of the same values, in the place of the adapter's."""
        return not is_guarded(self.lora_A) and torch.distributed.is_available() and torch.distributed.is_initialized()

    def _source_is_own(self) -> bool:
        """Whether W has memory to copy from: what ``torch.func`` puts in its place to transform it does not."""
        base = self._modules["base_layer"]
        weight = None if base is None else base._parameters.get("weight")
        return weight is None or not is_functorch_wrapped_tensor(weight)

    def _compute_kept(self, x: Tensor, kept: Compaction, compiling: bool) -> Tensor:
        """Eq. 2 under the masks of the module, in products of the kept lanes."""
        base, packed = self._modules["base_layer"], kept.packed
        A, B = self._parameters["lora_A"], self._parameters["lora_B"]
        bias: Any = None
        assert A is not None and B is not None
        if base is not None:
            own = base._parameters
            bias = own["bias"] if "bias" in own else base.bias
            weight: Any = own["weight"] if "weight" in own else base.weight
            if weight.requires_grad and torch.is_grad_enabled():
                raise RuntimeError(
                    "weight is a constant of a compacted layer and has no gradient, but it requires one; "
                    "expected weight.requires_grad to be False, got True"
                )
            if not compiling and self._is_stale(weight) and not self._is_gathered():
                self._refuse_away("another weight in the place of the base layer's")
                kept.pack(weight.t() if self._transposed else weight)
                self._look(weight)
        masks = self._buffers["mask_in"], self._buffers["mask_out"]
        if not compiling and not kept.holds(*masks):
            kept = self._in_step(kept, masks[0])
            packed = kept.packed
        before, after = self._chain_in, self._chain_out
        compact = (
            before is not None and isinstance(x, Tensor) and x.shape[-1] != kept.position_in.shape[0] and before.is_open(),
            after is not None and after.is_open(),
        )
        if self.dropout > 0.0 and self.training:
            low_rank = kept.apply(dropped(x, self.dropout), None, None, A, B, masks, self._scaling, *compact)
            return low_rank if packed is None else kept.apply(x, packed, bias, A[:0], B[:, :0], masks, 1.0, *compact) + low_rank
        return kept.apply(x, packed, bias, A, B, masks, self._scaling, *compact)

    def _in_step(self, kept: Compaction, mask: Tensor | None) -> Compaction:
        """`kept`, once what others have written into masks on the CPU is in it, or the capture that this forward is part of."""
        assert mask is not None
        if mask.is_cpu:
            self._see_written_masks()
        elif mask.is_cuda and cuda.is_current_stream_capturing():
            kept.note_capture()
        return self._compaction or kept

    def _see_written_masks(self) -> None:
        self._masks_were_written()
        super()._see_written_masks()

    def _masks_were_written(self) -> None:
        if self._compaction is not None:
            self._compaction_change({})()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Compacting:
        stale = self._is_stale()
        if self._away and self.weight is not None:
            with torch.inference_mode(False), torch.no_grad():
                self.weight.set_(self.weight.new_empty(self.weight.shape[:1])[:0])  # type: ignore[call-overload]  # fn would fill it
        super()._apply(fn, recurse)
        if self._compaction is not None:
            self._compaction.move(fn)
        if self._away:
            host = None if self._host is None else fn(self._host)
            self._host = host if host is None or host.is_meta else host.cpu()
            self._expand()
        if not stale:
            self._look()
        return self

    def _expand(self) -> None:
        """The placeholder anew, of the sizes that the masks say."""
        weight, shape = self.weight, (len(self.mask_out), len(self.mask_in))
        if weight is not None:
            with torch.inference_mode(False), torch.no_grad():
                blank = weight.new_full((), float("nan"))
                weight.set_(blank.expand(shape[::-1] if self._transposed else shape))  # type: ignore[call-overload]
            self._look()

    def __getstate__(self) -> dict[str, Any]:
        # Found again from weight and masks, unless there is no weight. A chain is the model's: a copy of one adapter computes full-size.
        compaction = self._compaction if self._dense == "release" else self.compacted
        gone = dict.fromkeys(("_seen", "_chain_in", "_chain_out"))
        return {**self.__dict__, **gone, "_compaction": compaction, "_mask_values": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._away:
            self._expand()  # a copy is not expanded
        compacted = self.__dict__.get("_compaction")
        if not isinstance(compacted, Compaction):
            self._compaction = Compaction(self.mask_in, self.mask_out, self._source()) if compacted else None
        else:
            compacted._view()
        self._look()
