"""Runs of a Trainer that a Controller cannot drive."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..method.refusals import apt_model_in
from ..model import APTModel, adapters


def refuse_run(args: Any, model: Any) -> None:
    """TypeError for a model without adapters; RuntimeError for a run whose gradients no Controller sees."""
    if not isinstance(model, nn.Module) or not any(isinstance(module, APTModel) for module in model.modules()):
        inside = isinstance(model, nn.Module) and any(True for _ in adapters(model))
        remedy = "give it the APTModel, not the model inside" if inside else "make one with apt_ext.get_apt_model(model, config)"
        raise TypeError(f"model: expected an APTModel, got a {type(model).__name__}; {remedy}")
    apt_model_in(model)
    if getattr(args, "deepspeed", None) or getattr(args, "hf_deepspeed_config", None):
        raise RuntimeError(
            "deepspeed: expected no DeepSpeed, which steps its own copies of the weights within the backward, so ranks cannot grow, "
            "nothing can be cut and no gradient is seen before the step; use DDP or FSDP2"
        )
    if getattr(args, "n_gpu", 1) > 1:
        raise RuntimeError(
            f"n_gpu: expected one device a process, got {args.n_gpu}: nn.DataParallel trains copies whose gradients no Controller sees; "
            "start with torchrun, or set CUDA_VISIBLE_DEVICES to one"
        )
