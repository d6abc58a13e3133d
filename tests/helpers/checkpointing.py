"""Activation checkpoints of adapters, and of other modules that carry masks."""

import pytest
import torch
from torch import nn

from apt_ext.pruning.wrappers import MaskedEmbedding, MaskedLinear, MaskedNorm

REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
CHANGED = pytest.raises(RuntimeError, match="masks changed .* between a checkpointed forward and its recomputation")


def inputs(device="cpu"):
    return torch.randn(4, 10, dtype=torch.float64, device=device, requires_grad=True)


CARRIERS = {
    "linear": lambda: MaskedLinear.around(nn.Linear(10, 10, dtype=torch.float64)),
    "norm": lambda: MaskedNorm(nn.LayerNorm(10, dtype=torch.float64)),
    "embedding": lambda: MaskedEmbedding(nn.Embedding(4, 10, dtype=torch.float64)),
}
