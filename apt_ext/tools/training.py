"""The optimizer of a training run, its learning rate, and one step of it: what every command that trains has in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

import apt_ext


def adamw(parameters: list[nn.Parameter], rate: float, steps: int, warm_up: float, **options: Any) -> tuple[torch.optim.AdamW, LRScheduler]:
    """AdamW whose rate rises to `rate` within the first `warm_up` (a share) of `steps`, and then falls to 0."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, **options)
    rising = max(round(warm_up * steps), 1)

    def share(step: int) -> float:
        return min((step + 1) / rising, (steps - step) / max(steps - rising, 1))

    return optimizer, LambdaLR(optimizer, share)


def update(
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    max_norm: float,
    controller: apt_ext.Controller | None = None,
) -> None:
    """One optimizer step after a backward, with gradients clipped to `max_norm`, under a Controller if there is one."""
    nn.utils.clip_grad_norm_([parameter for group in optimizer.param_groups for parameter in group["params"]], max_norm)
    if controller is not None:
        controller.observe()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    if controller is not None:
        controller.step()
