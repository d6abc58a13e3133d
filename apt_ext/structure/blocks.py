"""What carries the mask of a block, and how it is set and read: adapters, also of rank 0, and linears that train whole."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..adapter import APTAdapter, checked_mask
from ..reference import scale_lanes
from .architectures import Block


class MaskedLinear(APTAdapter):
    """A linear that trains whole (modules_to_save) and lies in a block: the masks select its input and output, it is otherwise ordinary.

    y = mask_out * ((mask_in * x) W^T + b). Rank 0 for life. `base_layer` is the linear, with its own gradients.
    """

    @classmethod
    def around(cls, linear: nn.Module) -> MaskedLinear:
        """Wrap a linear; it keeps its requires_grad."""
        flags = [(parameter, parameter.requires_grad) for parameter in linear.parameters()]
        masked = cls.from_linear(linear, 0, max_rank=0)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        return masked  # type: ignore[return-value]  # from_linear builds a cls

    def forward(self, x: Tensor, mask_in: Tensor | None = None, mask_out: Tensor | None = None) -> Tensor:
        """x [..., K] -> y [..., N], with gradients for the weight and bias too."""
        if self.merged or self._disabled or self.base_layer is None:
            return super().forward(x, mask_in, mask_out)
        for name, mask, size in (("mask_in", mask_in, self.in_features), ("mask_out", mask_out, self.out_features)):
            if mask is not None:
                self._check_override(name, mask, size, x)
        mask_in = self._effective_mask("mask_in") if mask_in is None else mask_in
        mask_out = self._effective_mask("mask_out") if mask_out is None else mask_out
        return scale_lanes(self.base_layer(scale_lanes(x, mask_in)), mask_out)


def carriers(model: nn.Module, block: Block) -> list[APTAdapter]:
    """The adapter on each side of the block, in the order of `block.sides`."""
    found = [model.get_submodule(side.linear) for side in block.sides]
    return [module for module in found if isinstance(module, APTAdapter)]


def set_mask(model: nn.Module, name: str, block: Block, mask: Tensor) -> None:
    """Give every side of the block its mask: all of `mask` where the side scales, else its exact zeros alone.

    mask [count], floating, values in [0, 1], any device. TypeError, ValueError and, while an adapter of the block is merged, RuntimeError;
    no mask has then changed.
    """
    adapters = carriers(model, block)
    merged = next((side.linear for side, adapter in zip(block.sides, adapters, strict=True) if adapter.merged), None)
    if merged is not None:
        raise RuntimeError(f"set_block_mask: {merged} of block {name!r} is merged under its present masks; unmerge it first")
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask of block {name!r} must be a Tensor, got {type(mask).__name__}")
    values = checked_mask(f"mask of block {name!r}", mask, torch.empty(block.count, device=mask.device))
    kept = (values != 0).to(values.dtype)
    for side, adapter in zip(block.sides, adapters, strict=True):
        own = (values if side.scales else kept).to(adapter.mask_in.device)
        adapter.set_masks(**{f"mask_{side.side}": own})


def get_mask(model: nn.Module, block: Block) -> Tensor:
    """A copy of the block's mask [count], float32: what its scaling side carries."""
    adapter = model.get_submodule(block.scaling_side.linear)
    mask = adapter.get_buffer(f"mask_{block.scaling_side.side}")
    return mask.detach().clone()


def merged_linear(adapter: APTAdapter) -> nn.Module:
    """The adapter's base layer with low-rank product and masks in it for good; the adapter is not to be used again.

    RuntimeError where the merged weight would not be finite or there is no base layer; the layer is then unchanged.
    """
    adapter.merge_weights()
    linear = adapter.base_layer
    if linear is None:
        raise RuntimeError("merged_linear: this APTAdapter has no base layer")
    linear.weight._apt_merged = False  # type: ignore[union-attr]  # an ordinary weight again, which another adapter may merge into
    return linear
