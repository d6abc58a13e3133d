"""Merge into a base layer, exactly undone: the part of an adapter that writes into the weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..common.checks import checked_choice
from ..distributed.dtensor import is_sharded
from ..optim.resize import refuse_gathered
from ..reference import scale_lanes
from .recompute_check import version
from .shared_memory import hold, merged_into, next_mark, release

if TYPE_CHECKING:
    from .layer import APTAdapter


class Merge:
    """A merge of s B A and both masks into a base layer.

    active     True from `make` to `undo`
    keep       where `make` kept the originals: "device" or "cpu"
    originals  "weight" and "bias" as they were before, while active
    mark       tells this merge from every other, -1 before the first
    foreign    {mark: why the base layer is not what it was}, by merges of others into its memory
    """

    def __init__(self) -> None:
        self.active = False
        self.keep = "device"
        self.originals: dict[str, Tensor] = {}
        self.mark = -1
        self.foreign: dict[int, str] = {}

    def make(self, adapter: APTAdapter, keep: str) -> None:
        """Do what `APTAdapter.merge_weights` promises."""
        if adapter.base_layer is None:
            raise RuntimeError("merge_weights: this APTAdapter has no base layer; build it with APTAdapter.from_linear")
        checked_choice("keep", keep, ("device", "cpu"))
        if self.active:
            return
        adapter.settle("merge_weights")
        weight, bias, matrix = adapter.weight, adapter.bias, adapter.matrix
        assert weight is not None and matrix is not None
        if is_sharded(weight) or is_sharded(adapter.lora_A):
            raise RuntimeError("merge_weights: FSDP2 has sharded this layer; load its full state_dict into a model that is not sharded")
        refuse_gathered(adapter.lora_A, "merge_weights")
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and merged_into(tensor):
                raise RuntimeError(f"merge_weights: this {name} already carries the merge of another adapter; unmerge that one first")
        with torch.inference_mode(False), torch.no_grad():
            originals = {"weight": _copy(weight, keep)}
            masked_bias = None
            if bias is not None:
                originals["bias"] = _copy(bias, keep)
                masked_bias = scale_lanes(bias.detach(), adapter.mask_out)
                if not bias.is_meta and not bool(torch.isfinite(masked_bias).all()):
                    raise RuntimeError("merge_weights: the merged bias would not be finite; weight and bias are unchanged")
        with _writable(weight, bias):
            A, B, masks = adapter.lora_A, adapter.lora_B, (adapter.mask_in, adapter.mask_out)
            ops.merge_(matrix.detach(), A, B, adapter.scaling, *masks, check=True)
            if bias is not None and masked_bias is not None:
                bias.copy_(masked_bias)
        self.originals, self.keep, self.active, self.mark = originals, keep, True, next_mark()
        hold(adapter)
        adapter.history.note(merge=(version(A), version(B)))  # of the same factors it is the same function

    def undo(self, adapter: APTAdapter) -> None:
        """Do what `APTAdapter.unmerge_weights` promises."""
        if adapter.base_layer is None:
            raise RuntimeError("unmerge_weights: this APTAdapter has no base layer; build it with APTAdapter.from_linear")
        if not self.active:
            return
        with _writable(adapter.weight, adapter.bias):
            for name, value in self.originals.items():
                getattr(adapter.base_layer, name).copy_(value)
        self.active, self.originals = False, {}
        release(adapter)
        adapter.history.note(merge=None)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "originals": dict(self.originals), "foreign": dict(self.foreign)}

    def move(self, fn: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The originals as `nn.Module._apply` would make them; those on the host stay there."""
        moved = {name: fn(value) for name, value in self.originals.items()}
        return {name: value.cpu() if self.keep == "cpu" and not value.is_meta else value for name, value in moved.items()}


@contextmanager
def _writable(*tensors: Tensor | None) -> Iterator[None]:
    """No graph; in inference mode where a tensor was made in it, since torch writes to those only there."""
    born_there = any(tensor is not None and tensor.is_inference() for tensor in tensors)
    with torch.inference_mode(born_there), torch.no_grad():
        yield


def _copy(tensor: Tensor, keep: str) -> Tensor:
    return tensor.detach().to("cpu", copy=True) if keep == "cpu" else tensor.detach().clone()
