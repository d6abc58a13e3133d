"""What carries a block's mask beside the adapters: other linears, embeddings, and norms over the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ..adapter.carrier import MaskCarrier
from ..adapter.layer import APTAdapter
from ..adapter.mask import Mask
from ..common.checks import on_host
from ..reference import scale_lanes
from .float32_heads import hooks_aside, through_door


class MaskedLinear(APTAdapter):
    """A linear that keeps training as it did and lies in a block: the masks select its input and output, it is otherwise ordinary.

    y = mask_out * ((mask_in * x) W^T + b). Rank 0 for life. `base_layer` is the linear, with its own gradients.
    """

    @classmethod
    def around(cls, linear: nn.Module) -> MaskedLinear:
        """Wrap a linear; it keeps its requires_grad."""
        flags = [(parameter, parameter.requires_grad) for parameter in linear.parameters()]
        with hooks_aside(linear):
            masked = cls.from_linear(linear, 0, max_rank=0)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for factor in (masked.lora_A, masked.lora_B):  # empty for life, and no part of any graph: DDP would wait for their gradients
            factor.requires_grad_(False)
        return masked  # type: ignore[return-value]  # from_linear builds a cls

    def compact(self, on: bool = True, dense: str = "keep") -> None:
        """Refused: the weight trains, so a copy of what is kept of it would be old at every step."""
        if on:
            raise RuntimeError("compact: this module trains whole; only an adapter, whose weight is frozen, computes on kept channels")

    def compute(self, x: Tensor, mask_in: Tensor | None, mask_out: Tensor | None) -> Tensor:
        """With gradients for the weight and bias too."""
        assert self.base_layer is not None
        return scale_lanes(self.base_layer(scale_lanes(x, mask_in)), mask_out)


class StreamCarrier(MaskCarrier):
    """A module with one mask over its output channels, mask_out [width] float32; unknown attributes are those of `base_layer`."""

    base_layer: nn.Module
    mask_out: Tensor

    def __init__(self, base_layer: nn.Module, width: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.train(base_layer.training)
        device = next(base_layer.parameters()).device
        with torch.inference_mode(False):  # a buffer born in inference mode could not be written outside it
            self.register_buffer("mask_out", torch.ones(width, dtype=torch.float32, device=device))
        self.begin_masks("mask_out")
        self.note_mask("mask_out", Mask(torch.ones(width, dtype=torch.float32, device="cpu")))
        self.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("__"):
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def set_masks(self, mask_out: Tensor) -> None:
        """A mask [width] that was checked."""
        self.mask_change({"mask_out": mask_out})()

    def mask_change(self, masks: Mapping[str, Tensor | Mask]) -> Callable[[], None]:
        """As APTAdapter's: what can fail is done here, calling the result makes the change; another width replaces the buffer."""
        with torch.inference_mode(False), torch.no_grad():
            (given,) = masks.values()
            mask = Mask.of(given).known()
            new = mask.values.to(self.mask_out.device, copy=True)
            derived = self.derived(mask.values)

        def make() -> None:
            with torch.no_grad():
                if new.shape == self.mask_out.shape:
                    self.mask_out.copy_(new)
                else:
                    self._buffers["mask_out"] = new
            self._buffers.update(derived)
            self.note_mask("mask_out", mask)

        return make

    def host_mask(self, name: str) -> Tensor:
        """The values of "mask_out", to be read only; waits for the device each time, so that writes through `.data` are seen."""
        return on_host(self.get_buffer(name))

    def derived(self, mask_out: Tensor) -> dict[str, Tensor | None]:
        """Further buffers that follow from the mask."""
        return {}

    def _apply(self, fn: Any, recurse: bool = True) -> StreamCarrier:
        mask, ones = self.mask_out, self.known_ones()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.mask_out.dtype != torch.float32:  # .half() and friends: masks keep every digit
            self._buffers["mask_out"] = mask.to(self.mask_out.device)
        self.note_ones(ones)
        return self


def _after_load(carrier: StreamCarrier, _incompatible: Any) -> None:
    with torch.inference_mode(False), torch.no_grad():
        carrier._buffers.update(carrier.derived(carrier.mask_out))
    carrier.note_mask("mask_out", Mask.of(carrier.mask_out))
    carrier.history.note(parameters=object())  # others than before


class MaskedEmbedding(StreamCarrier):
    """An embedding whose output is scaled by mask_out [embedding_dim]; zeros select."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__(embedding, int(embedding.weight.shape[1]))  # type: ignore[index]

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., embedding_dim]."""
        if not torch.compiler.is_compiling():
            self.history.check()
        found: Tensor = self.base_layer(ids)
        return found if self.disabled else scale_lanes(found, self.mask_out)


class MaskedNorm(StreamCarrier):
    """A norm over the dimensions that mask_out [width] keeps: they are gathered, normed by the stock module, and scattered into zeros.

    A masked sum would not do: stock RMSNorm adds up in float32, and the cut model adds other terms.
    """

    kept: Tensor | None  # [kept] int64; None where all are

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(norm, int(norm.weight.shape[0]))  # type: ignore[index]
        self.register_buffer("kept", None, persistent=False)

    def derived(self, mask_out: Tensor) -> dict[str, Tensor | None]:
        kept = mask_out.nonzero().flatten()
        if len(kept) == len(mask_out):
            return {"kept": None}
        there = self.kept  # while masks move a captured graph reads it
        if there is not None and there.device == self.mask_out.device and torch.equal(on_host(there), on_host(kept)):
            return {"kept": there}
        return {"kept": kept.to(self.mask_out.device)}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> the same shape, 0 in pruned dimensions."""
        if not torch.compiler.is_compiling():
            self.history.check()
        kept = self.kept
        if kept is None or self.disabled:
            return self.base_layer(x)  # type: ignore[no-any-return]
        norm, gathered = self.base_layer, x.index_select(-1, kept)
        parameters = {name: parameter.index_select(0, kept) for name, parameter in norm.named_parameters()}
        width = (len(kept),)  # which torch's norms hold beside their Parameters
        weight, bias = parameters["weight"], parameters.get("bias")
        if isinstance(norm, nn.LayerNorm):
            y = through_door(norm, gathered, lambda kept: F.layer_norm(kept, width, weight, bias, norm.eps))
        elif isinstance(norm, nn.RMSNorm):
            y = through_door(norm, gathered, lambda kept: F.rms_norm(kept, width, weight, norm.eps))
        else:
            y = functional_call(norm, parameters, (gathered,))
        return y.new_zeros(x.shape).index_copy(-1, kept, y)


def carrier_for(module: nn.Module, of: str) -> nn.Module:
    """What carries masks for a module that has none yet; `of` is "linear", "embedding" or "norm"."""
    if of == "linear":
        return MaskedLinear.around(module)
    return MaskedEmbedding(module) if of == "embedding" else MaskedNorm(module)


def is_carrier(module: nn.Module) -> bool:
    """Whether a block's mask can be set on the module."""
    return isinstance(module, APTAdapter | StreamCarrier)
