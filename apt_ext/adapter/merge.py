"""Merge and exact unmerge: the part of the adapter that writes into its base layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..common.checks import checked_choice
from ..distributed.dtensor import is_sharded
from ..optim import resize
from ..reference import scale_lanes
from .recompute_check import Changes, version
from .shared_memory import hold, join, merged_into, next_mark, release


class Merging(nn.Module):
    """Merges s B A and both masks into the base layer and restores it bitwise. State: the originals, and nothing else."""

    base_layer: nn.Module | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    mask_in: Tensor
    mask_out: Tensor
    scaling: Any

    def __init__(self) -> None:
        super().__init__()
        self._merged = False
        self._keep = "device"
        self._kept: dict[str, Tensor] = {}  # "weight" and "bias" as they were before the merge
        self._transposed = False  # Conv1D stores [K, N]
        self._warned = False
        self._changes = Changes(merge=None, disabled=False)
        self._label = ""  # its name in the model, for messages
        self.merge_mark = -1  # of its last merge
        self.foreign_merges: dict[int, str] = {}  # {mark: why its base layer is not what it was}, by merges of others into its memory
        join(self)

    @property
    def label(self) -> str:
        """Its name in the model, for messages; empty where it is in none."""
        return self._label

    @label.setter
    def label(self, name: str) -> None:
        self._label = name

    @property
    def merged(self) -> bool:
        return self._merged

    @property
    def weight(self) -> Tensor | None:
        """The base layer's weight as it stores it, read-only: [N, K], or Conv1D's [K, N]."""
        base = self._modules.get("base_layer")  # the registry itself: attribute access through nn.Module is slow
        return None if base is None else base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias [N], read-only."""
        return None if self.base_layer is None else self.base_layer.bias  # type: ignore[return-value]

    def _matrix(self) -> Tensor | None:
        """The weight as W [N, K]; a transposed view for Conv1D, which merge_ writes through."""
        weight = self.weight
        return weight.t() if weight is not None and self._transposed else weight

    def merge_weights(self, keep: str = "device") -> None:
        """W <- diag(mask_out) (W + s B A) diag(mask_in), b <- mask_out * b, so ``base_layer(x)`` is the adapter's output.

        The original weight and bias are kept on the device, or with keep="cpu" on the host, until
        :meth:`unmerge_weights` restores them bitwise. Idempotent.

        Raises:
            RuntimeError: no base layer; a weight merged by another adapter; a merged value that would not be finite.
            ValueError: keep is neither "device" nor "cpu". The layer is then bitwise as before.
        """
        if self.base_layer is None:
            raise RuntimeError("merge_weights: this APTAdapter has no base layer; build it with APTAdapter.from_linear")
        checked_choice("keep", keep, ("device", "cpu"))
        if self._merged:
            return
        self.settle("merge_weights")
        weight, bias, matrix = self.weight, self.bias, self._matrix()
        assert weight is not None and matrix is not None
        if is_sharded(weight) or is_sharded(self.lora_A):
            raise RuntimeError("merge_weights: FSDP2 has sharded this layer; load its full state_dict into a model that is not sharded")
        resize.refuse_gathered(self.lora_A, "merge_weights")
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and merged_into(tensor):
                raise RuntimeError(f"merge_weights: this {name} already carries the merge of another adapter; unmerge that one first")
        with torch.inference_mode(False), torch.no_grad():
            kept = {"weight": _copy(weight, keep)}
            masked_bias = None
            if bias is not None:
                kept["bias"] = _copy(bias, keep)
                masked_bias = scale_lanes(bias.detach(), self.mask_out)
                if not bias.is_meta and not bool(torch.isfinite(masked_bias).all()):
                    raise RuntimeError("merge_weights: the merged bias would not be finite; weight and bias are unchanged")
        with _writable(weight, bias):
            ops.merge_(matrix.detach(), self.lora_A, self.lora_B, self.scaling, self.mask_in, self.mask_out, check=True)
            if bias is not None and masked_bias is not None:
                bias.copy_(masked_bias)
        self._kept, self._keep, self._merged, self.merge_mark = kept, keep, True, next_mark()
        hold(self)
        self._changes.note(merge=(version(self.lora_A), version(self.lora_B)))  # of the same factors it is the same function

    def unmerge_weights(self) -> None:
        """Restore the base layer bitwise from what :meth:`merge_weights` kept. Idempotent."""
        if self.base_layer is None:
            raise RuntimeError("unmerge_weights: this APTAdapter has no base layer; build it with APTAdapter.from_linear")
        if not self._merged:
            return
        with _writable(self.weight, self.bias):
            for name, value in self._kept.items():
                getattr(self.base_layer, name).copy_(value)
        self._merged, self._kept = False, {}
        release(self)
        self._changes.note(merge=None)

    def _through_base(self, x: Tensor, compiling: bool) -> Tensor:
        """base_layer(x). Where that fails because of x, the error names x; what does not fail pays nothing."""
        base, weight = self.base_layer, self.weight
        assert base is not None and weight is not None
        if compiling:
            return base(x)  # type: ignore[no-any-return]
        try:
            return base(x)  # type: ignore[no-any-return]
        except (RuntimeError, TypeError, IndexError, AttributeError):
            K = weight.shape[0] if self._transposed else weight.shape[1]
            if not isinstance(x, Tensor):
                raise TypeError(f"x must be a Tensor, got {type(x).__name__}") from None
            if x.dim() == 0 or x.shape[-1] != K:
                raise ValueError(f"x must have shape [..., K={K}], got {list(x.shape)}") from None
            if x.device != weight.device:
                raise ValueError(f"x must be on weight's device {weight.device}, got {x.device}") from None
            if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
                raise TypeError(f"x must have weight's dtype {weight.dtype}, got {x.dtype}") from None
            raise

    def _merge_for_good(self) -> None:
        """The merged weight is an ordinary one again, which another adapter may merge into. This one is not to be used again."""
        release(self, for_good=True)

    def settle(self, call: str) -> None:
        """At an event: take what others have written into masks and factors for what it is, and say so."""

    def merged_names(self) -> list[str]:
        """Of "weight" and "bias" those that carry its merge."""
        return list(self._kept)

    def _refuse_foreign(self) -> None:
        raise RuntimeError(f"{self._what('forward')}: {next(iter(self.foreign_merges.values()))}")

    def _what(self, call: str) -> str:
        """`call`, and which adapter it is about."""
        return f"{call} of {self.label or type(self).__name__}"

    def _warn_if_learning(self) -> None:
        if self.training and torch.is_grad_enabled() and not self._warned and not torch.compiler.is_compiling():
            self._warned = True
            warnings.warn("this APTAdapter is merged: lora_A and lora_B get no gradient until unmerge_weights()", stacklevel=3)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Merging:
        moved = {name: fn(value) for name, value in self._kept.items()}
        if self._keep == "cpu":
            moved = {name: value if value.is_meta else value.cpu() for name, value in moved.items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._kept = moved
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        join(self)
        if self._merged:
            hold(self)


@contextmanager
def _writable(*tensors: Tensor | None) -> Iterator[None]:
    """No graph; in inference mode where a tensor was made in it, since torch writes to those only there."""
    born_there = any(tensor is not None and tensor.is_inference() for tensor in tensors)
    with torch.inference_mode(born_there), torch.no_grad():
        yield


def _copy(tensor: Tensor, keep: str) -> Tensor:
    return tensor.detach().to("cpu", copy=True) if keep == "cpu" else tensor.detach().clone()
