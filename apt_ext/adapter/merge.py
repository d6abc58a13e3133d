"""Merge into a base layer, exactly undone: the part of an adapter that writes into the weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from ..common.checks import checked_choice, error_prefix
from ..distributed.dtensor import is_sharded
from ..optim.resize import refuse_gathered
from .mask_change import settle_all
from .recompute_check import version
from .shared_memory import hold, indexed, merged_into, next_mark, readers_of, release

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
        own = _own(adapter)
        _check(adapter, own)
        with torch.inference_mode(False), torch.no_grad():
            originals = {name: _copy(tensor, keep) for name, tensor in own.items()}
        fault = _merge_all(parts := list(_parts(adapter, own)))
        if fault is not None:
            raise parts[fault].refusal()
        self.originals, self.keep, self.active, self.mark = originals, keep, True, next_mark()
        hold(adapter)
        # Of the same factors it is the same function.
        adapter.history.note(merge=(version(adapter.lora_A), version(adapter.lora_B)))

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


def merge_for_good(adapters: Mapping[str, APTAdapter]) -> None:
    """Merge every adapter that is not merged yet into its base layer, or none; their weights are ordinary ones then.

    adapters  {name: one with a base layer}, not to be used again

    Everything is checked before the first write, in one wait for each device, and nothing of a weight's size is allocated.
    RuntimeError where a merged value would not be finite, a weight carries the merge of another adapter, or FSDP2 has
    sharded it; it begins with the name, and every bit is then as before.
    """
    fresh = {name: adapter for name, adapter in adapters.items() if not adapter.merged}
    with indexed():
        settle_all(list(fresh.values()), "merge_weights")
        tensors = {name: _own(adapter) for name, adapter in fresh.items()}
        seen: set[int] = set()
        for name, adapter in fresh.items():
            with error_prefix(name):
                _check(adapter, tensors[name])
                _refuse_shared(tensors[name], seen)
            seen.add(id(adapter))
        try:
            for adapter in fresh.values():
                adapter.packing.store.restore(adapter.weight)
            parts = [(name, part) for name, adapter in fresh.items() for part in _parts(adapter, tensors[name])]
            fault = _merge_all([part for _, part in parts])
            if fault is not None:
                with error_prefix(parts[fault][0]):
                    raise parts[fault][1].refusal()
        except BaseException:
            for adapter in fresh.values():
                adapter.packing.offload(adapter)
            raise
        for adapter in fresh.values():
            adapter.merge.mark = next_mark()
        for adapter in adapters.values():
            release(adapter, for_good=True)


class _Part(NamedTuple):
    """What `_C.merge_all` takes of one matrix, and `name`: "weight" or "bias"."""

    name: str
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    mask_in: Tensor | None
    mask_out: Tensor | None

    def refusal(self) -> RuntimeError:
        """The error where its merge would not be finite."""
        dtype = str(self.weight.dtype).removeprefix("torch.")
        return RuntimeError(
            f"merge_weights: the merged {self.name} would not be finite (NaN or Inf in a kept lane, or a sum beyond {dtype}'s range); "
            "weight and bias are unchanged"
        )


def _merge_all(parts: Sequence[_Part]) -> int | None:
    """Merge all, or none where a result of one would not be finite: its index."""
    if not parts:
        return None
    _, *arguments = zip(*parts, strict=True)
    with torch.no_grad():
        fault = _C.merge_all(*arguments)
    return None if fault < 0 else fault


def _own(adapter: APTAdapter) -> dict[str, Tensor]:
    """The base layer's weight and bias, as it stores them."""
    weight, bias = adapter.weight, adapter.bias
    assert weight is not None
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


def _parts(adapter: APTAdapter, own: Mapping[str, Tensor]) -> Iterator[_Part]:
    """What is merged into which of its own tensors: a bias [N] is a row without factors, under mask_out."""
    with torch.no_grad():
        matrix = own["weight"].t() if adapter.is_transposed else own["weight"]
        yield _Part("weight", matrix, adapter.lora_A, adapter.lora_B, adapter.scaling, adapter.mask_in, adapter.mask_out)
        if "bias" in own:
            row = own["bias"].unsqueeze(0)
            yield _Part("bias", row, row[:0], row.new_empty(1, 0), 1.0, adapter.mask_out, None)


def _check(adapter: APTAdapter, own: Mapping[str, Tensor]) -> None:
    """Raise RuntimeError for what no merge writes into."""
    if is_sharded(own["weight"]) or is_sharded(adapter.lora_A):
        raise RuntimeError("merge_weights: FSDP2 has sharded this layer; load its full state_dict into a model that is not sharded")
    refuse_gathered(adapter.lora_A, "merge_weights")
    for name, tensor in own.items():
        if merged_into(tensor):
            raise RuntimeError(f"merge_weights: this {name} already carries the merge of another adapter; unmerge that one first")


def _refuse_shared(own: Mapping[str, Tensor], seen: set[int]) -> None:
    """Raise RuntimeError where an adapter of which the id was seen reads the same memory."""
    for name, tensor in own.items():
        other = next((one for one, _ in readers_of(tensor) if id(one) in seen), None)
        if other is not None:
            raise RuntimeError(
                f"merge_weights: this {name} shares memory with that of {other.label or 'another adapter'}, which would be merged "
                "into it, too"
            )


@contextmanager
def _writable(*tensors: Tensor | None) -> Iterator[None]:
    """No graph; in inference mode where a tensor was made in it, since torch writes to those only there."""
    born_there = any(tensor is not None and tensor.is_inference() for tensor in tensors)
    with torch.inference_mode(born_there), torch.no_grad():
        yield


def _copy(tensor: Tensor, keep: str) -> Tensor:
    return tensor.detach().to("cpu", copy=True) if keep == "cpu" else tensor.detach().clone()
