"""What others do with the same layer, as functions of x with gradients: the naive formula, eager and compiled, two cuBLAS products by hand,
PEFT, and LoRAFusion where it is installed."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.nn import functional as F


def naive(W, A, B, scaling, mask_in, mask_out):
    """The masked formula in eager torch; masks in the layer's dtype."""

    def forward(x):
        h = x * mask_in
        return mask_out * (F.linear(h, W) + scaling * F.linear(F.linear(h, A), B))

    return forward


class _ByHand(torch.autograd.Function):
    """LoRA without masks from library products alone, the second one added in place: what fast trainers write."""

    @staticmethod
    def forward(ctx, x, W, A, B, scaling):
        t = x @ A.t()
        ctx.save_for_backward(x, W, A, B, t)
        ctx.scaling = scaling
        return (x @ W.t()).addmm_(t, B.t(), alpha=scaling)

    @staticmethod
    def backward(ctx, g):
        x, W, A, B, t = ctx.saved_tensors
        u = g @ B
        dx = (g @ W).addmm_(u, A, alpha=ctx.scaling)
        return dx, None, (u.t() @ x).mul_(ctx.scaling), (g.t() @ t).mul_(ctx.scaling), None


def by_hand(W, A, B, scaling):
    return lambda x: _ByHand.apply(x, W, A, B, scaling)


def peft_linear(linear: nn.Linear, rank: int, scaling: float):
    """PEFT's LoRA layer around `linear`, adapters in its dtype, or None where PEFT is not installed."""
    try:
        from peft import LoraConfig
        from peft.tuners.lora.layer import Linear
    except ImportError:
        return None
    config = LoraConfig(r=rank, lora_alpha=int(scaling * rank))
    try:
        layer = Linear(linear, "default", config=config, r=rank, lora_alpha=int(scaling * rank))
    except TypeError:  # PEFT before 0.18 takes no config
        layer = Linear(linear, "default", r=rank, lora_alpha=int(scaling * rank))
    return layer.to(linear.weight.device, linear.weight.dtype)


def peft_model(model: nn.Module, rank: int, targets: list[str], dropout: float = 0.0):
    """`model` with PEFT's LoRA in its dtype."""
    from peft import LoraConfig, get_peft_model

    dtype = next(model.parameters()).dtype
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's own, about transformers
        return get_peft_model(model, LoraConfig(r=rank, lora_dropout=dropout, target_modules=targets)).to(dtype)


def compiled(W, A, B, scaling, mask_in, mask_out):
    """The naive formula through torch.compile, for one shape: compiled at the first call, once with and once without gradients."""
    return torch.compile(naive(W, A, B, scaling, mask_in, mask_out), dynamic=False, fullgraph=True)


def lorafusion(W, A, B, scaling, x):
    """LoRAFusion's fused layer without masks; None where it is not installed, not for this device and dtype, or fails at `x`."""
    if not W.is_cuda or W.dtype not in (torch.float16, torch.bfloat16):
        return None
    try:
        from lorafusion.ops.lora_v1 import fused_linear_lora
    except ImportError:
        return None

    def forward(x):  # its rows are [batch, tokens]
        return fused_linear_lora(x=x[None], linear_w=W, lora_a=A, lora_b=B, alpha=scaling)[0]

    try:
        forward(x)
    except Exception as error:  # its Triton kernels are tuned for shapes and versions of their own
        warnings.warn(f"LoRAFusion is left out of {list(W.shape)}: {type(error).__name__}: {error}", stacklevel=2)
        return None
    return forward
