"""How an adapter computes on kept channels alone, and keeps its copy of them up to date.

A Packing is in no registry of the module: DDP would broadcast it and a state_dict hold it. It follows from W and the masks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, cuda, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from ..common import own_capture
from ..common.checks import checked_bool, checked_choice
from ..distributed.dtensor import is_sharded
from ..optim.step_guard import is_guarded
from .chain import Chain
from .mask import Mask
from .packed_weight import PackedWeight
from .recompute_check import version
from .shared_memory import is_read_by_other
from .weight_store import PLACES, WeightStore

if TYPE_CHECKING:
    from .layer import APTAdapter


class Packing:
    """What of an adapter computes on kept channels.

    current               the copy of what is kept of W, and its indices; None while the adapter computes full-size
    store                 where the whole W is meanwhile
    chain_in, chain_out   who hands over kept channels to the adapter, and to whom it does
    """

    def __init__(self) -> None:
        self.current: PackedWeight | None = None
        self.store = WeightStore()
        self.chain_in: Chain | None = None
        self.chain_out: Chain | None = None
        self._seen: tuple[Tensor, int | None] | None = None  # see remember_weight

    # -- on and off ----------------------------------------------------------------------------------------------------

    def check(self, adapter: APTAdapter, on: bool, dense: str) -> None:
        """Raise what `APTAdapter.compact` refuses."""
        checked_bool("on", on)
        if dense == "release":
            raise ValueError("dense must be 'keep' or 'cpu', got 'release', which is gone; cut() gives the memory of what is pruned back")
        checked_choice("dense", dense, PLACES)
        if adapter.merged:
            raise RuntimeError("compact: the weight is merged; call unmerge_weights() first")
        if on and dense != "keep" and adapter.disabled:
            raise RuntimeError(
                f"compact: dense={dense!r} cannot offload the weight inside disable_adapter(), which needs it; call compact() "
                "outside the context"
            )
        if on and dense != "keep" and is_read_by_other(adapter):
            raise RuntimeError(f"compact: dense={dense!r} cannot offload a weight that another adapter reads, too; use dense='keep'")
        if on:
            refuse_sharded(adapter, "compact")
            if adapter.mask_in.is_meta:
                raise RuntimeError("compact: masks on meta have no values; call it where the module has its memory")

    def switch(self, adapter: APTAdapter, on: bool, dense: str) -> None:
        """Pack or unpack, after `check`. Where memory is short all is as it was."""
        undo = self._undo(adapter)
        try:
            self.store.restore(adapter.weight)
            self.current = self._packed(adapter) if on else None
            self.store.place = dense if on else "keep"
            self.offload(adapter)
            self.remember_weight(adapter)
        except BaseException:
            undo()
            raise
        self.compare_chains()

    def _packed(self, adapter: APTAdapter) -> PackedWeight:
        """Return a copy of what is kept now: the present one written anew where a CUDA graph reads it."""
        kept, source = self.current, self.source(adapter)
        size = len(adapter.mask_out), len(adapter.mask_in)
        if kept is None or not kept.is_captured or kept.full_size() != size:
            return PackedWeight(adapter.mask_in, adapter.mask_out, source)
        kept.change(**adapter.host_masks(), matrix=source, anew=True)()
        return kept

    def _undo(self, adapter: APTAdapter) -> Callable[[], None]:
        """A function that brings back what is now, without allocating anything."""
        plain, store, weight = (self.current, self._seen), vars(self.store).copy(), adapter.weight
        memory = None if weight is None else weight.detach()

        def undo() -> None:
            if weight is not None and memory is not None and weight.data_ptr() != memory.data_ptr():
                with torch.inference_mode(False), torch.no_grad():
                    weight.set_(memory)  # type: ignore[call-overload]
            self.current, self._seen = plain
            vars(self.store).update(store)

        return undo

    def offload(self, adapter: APTAdapter) -> None:
        """Let the base layer's weight go, where the store says so."""
        if self.current is not None and not adapter.merged:
            self.store.offload(adapter.weight, adapter.stored_shape())
            if self.store.is_offloaded:
                self.remember_weight(adapter)

    def refuse_offloaded(self, what: str) -> None:
        """Raise RuntimeError where the whole weight is in host memory."""
        if self.store.is_offloaded:
            raise RuntimeError(
                f"{what} needs the whole weight, which compact(dense={self.store.place!r}) has offloaded; call compact(False) first"
            )

    # -- changes -------------------------------------------------------------------------------------------------------

    def already_applied(self, adapter: APTAdapter) -> bool:
        """True if the copy is that of the present masks and weight, whoever has written them."""
        kept = self.current
        return kept is None or kept.knows(*adapter.host_masks().values()) and not self._weight_changed(adapter, adapter.weight)

    def change(self, adapter: APTAdapter, masks: dict[str, Mask]) -> Callable[[], None]:
        """Prepare what follows from a change to these checked masks: what can fail is done here, unless sizes change (a cut)."""
        kept = self.current
        if kept is None:
            return lambda: self.renew(adapter)
        present = adapter.host_masks()
        if any(mask.values.shape != present[name].shape for name, mask in masks.items()):
            return lambda: self.renew(adapter)
        refuse_sharded(adapter, "set_masks")
        stale = self._weight_changed(adapter, adapter.weight)
        if stale and not _is_gathered(adapter):
            self.refuse_offloaded("another weight in the place of the base layer's")
        offloaded = self.store.is_offloaded
        change = kept.change(**(present | masks), matrix=self.source(adapter), anew=stale and not offloaded)

        def make() -> None:
            change()
            if stale:
                self.remember_weight(adapter)
            self.compare_chains()

        return make

    def change_with_weight(self, adapter: APTAdapter, masks: dict[str, Mask]) -> Callable[[], None]:
        """Prepare as `change` does, for a weight that is written before the change is made."""
        kept = self.current
        if kept is None:
            return lambda: self.renew(adapter)
        change = kept.change(**(adapter.host_masks() | masks), matrix=adapter.matrix, anew=True)

        def make() -> None:
            change(self.source(adapter))
            self.offload(adapter)
            self.remember_weight(adapter)
            self.compare_chains()

        return make

    def follow_written(self, adapter: APTAdapter) -> None:
        """Follow masks that others wrote into their buffers."""
        if self.current is not None:
            self.change(adapter, {})()

    def renew(self, adapter: APTAdapter) -> None:
        """Copy anew: the weight is another, or the sizes are."""
        kept = self.current
        if kept is not None and kept.full_size() == (len(adapter.mask_out), len(adapter.mask_in)):
            kept.change(**adapter.host_masks(), matrix=self.source(adapter), anew=True)()
        elif kept is not None:
            self.current = kept = None  # its memory first
            self.current = PackedWeight(adapter.mask_in, adapter.mask_out, self.source(adapter))
        self.offload(adapter)
        self.remember_weight(adapter)
        self.compare_chains()

    def compare_chains(self) -> None:
        """Let the chains look again."""
        for chain in (self.chain_in, self.chain_out):
            if chain is not None:
                chain.compare()

    def unchain(self) -> None:
        """Forget both chains."""
        self.chain_in = self.chain_out = None

    def source(self, adapter: APTAdapter) -> Tensor | None:
        """W [N, K] as it is without a merge."""
        weight = self.store.host if self.store.host is not None else adapter.merge.originals.get("weight", adapter.weight)
        return weight.t() if weight is not None and adapter.is_transposed else weight

    def remember_weight(self, adapter: APTAdapter, weight: Tensor | None = None) -> None:
        """Remember what is in the place of the base layer's weight, its memory (so that no other gets the address) and its version."""
        weight = adapter.weight if weight is None and self.current is not None else weight
        self._seen = None if weight is None else (weight.detach(), version(weight))

    def _weight_changed(self, adapter: APTAdapter, weight: Tensor | None) -> bool:
        """True if somebody has written into the weight since then, or put another into its place."""
        if weight is None or self._seen is None:
            return False
        memory, counted = self._seen
        if weight.data_ptr() != memory.data_ptr():
            return True
        return not self.store.is_offloaded and version(weight) != counted  # nobody writes into a blank, whose counter an alias may share

    # -- forward -------------------------------------------------------------------------------------------------------

    def compute(self, adapter: APTAdapter, kept: PackedWeight, x: Tensor, compiling: bool) -> Tensor:
        """Eq. 2 under the masks of the module, in products of the kept channels."""
        base, packed = adapter._modules["base_layer"], kept.packed
        A, B = adapter._parameters["lora_A"], adapter._parameters["lora_B"]
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
            if not compiling and self._weight_changed(adapter, weight) and not _is_gathered(adapter):
                self.refuse_offloaded("another weight in the place of the base layer's")
                kept.pack(weight.t() if adapter.is_transposed else weight)
                self.remember_weight(adapter, weight)
        masks = adapter._buffers["mask_in"], adapter._buffers["mask_out"]
        if not compiling and not kept.holds(*masks):
            kept = self._in_step(adapter, kept, masks[0])
            packed = kept.packed
        before, after = self.chain_in, self.chain_out
        compact = (
            before is not None and isinstance(x, Tensor) and x.shape[-1] != kept.position_in.shape[0] and before.is_open(),
            after is not None and after.is_open(),
        )
        dropout = adapter.dropout if adapter.training else 0.0
        return kept.apply(x, packed, bias, A, B, masks, adapter.scaling, *compact, dropout)

    def _in_step(self, adapter: APTAdapter, kept: PackedWeight, mask: Tensor | None) -> PackedWeight:
        """`kept`, once what others have written into masks on the CPU is in it, or the capture that this forward is part of."""
        assert mask is not None
        if mask.is_cpu:
            adapter.see_written_masks()
        elif mask.is_cuda and cuda.is_current_stream_capturing() and not own_capture.is_recording():
            kept.note_capture()
        return self.current or kept

    # -- moving and copying --------------------------------------------------------------------------------------------

    def moved(self, adapter: APTAdapter, move: Callable[[], Any], fn: Callable[[Tensor], Tensor]) -> None:
        """Call `move`, which applies `fn` to the adapter's tensors, and apply it to what is packed and stored."""
        changed = self._weight_changed(adapter, adapter.weight)
        self.store.empty(adapter.weight)
        move()
        if self.current is not None:
            self.current.move(fn)
        if self.store.is_offloaded:
            self.store.move(fn)
            self.store.blank(adapter.weight, adapter.stored_shape())
        if not changed or self.store.is_offloaded:
            self.remember_weight(adapter)

    def __getstate__(self) -> dict[str, Any]:
        # Found again from weight and masks. A chain is the model's: a copy of one adapter computes full-size.
        return {**vars(self), "store": copy.copy(self.store), "current": None, "_seen": None, "chain_in": None, "chain_out": None}

    def copied(self, adapter: APTAdapter, compacted: bool) -> None:
        """Pack anew in a copy of an adapter."""
        if self.store.is_offloaded:
            self.store.blank(adapter.weight, adapter.stored_shape())  # a copy is not expanded
        self.current = PackedWeight(adapter.mask_in, adapter.mask_out, self.source(adapter)) if compacted else None
        self.remember_weight(adapter)


def refuse_sharded(adapter: APTAdapter, call: str) -> None:
    """Raise RuntimeError where no rank has the whole weight."""
    weight, shape = adapter.matrix, (len(adapter.mask_out), len(adapter.mask_in))
    if is_sharded(adapter.lora_A) or (weight is not None and (is_sharded(weight) or weight.shape != shape)):
        raise RuntimeError(f"{call}: FSDP has sharded this layer, so no rank has the whole weight to copy kept rows and columns from")


def has_own_weight(base: nn.Module | None) -> bool:
    """False where ``torch.func`` has put a weight without memory in the place of the base layer's, to transform it."""
    weight = None if base is None else base._parameters.get("weight")
    return weight is None or not is_functorch_wrapped_tensor(weight)


def _is_gathered(adapter: APTAdapter) -> bool:
    """True if FSDP2 may have put tensors of its own, of the same values, in the place of the adapter's."""
    return not is_guarded(adapter.lora_A) and torch.distributed.is_available() and torch.distributed.is_initialized()
