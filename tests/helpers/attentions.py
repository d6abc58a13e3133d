"""Adapters that read one x, as q, k and v of an attention do."""

import torch
from torch import nn

from apt_ext import APTAdapter
from apt_ext.adapter.shared_inputs import SharedInput

WIDTHS = {"q": 12, "k": 6, "v": 6}


def attention(ranks=(3, 2, 4), bias=True, dtype=torch.float64, **options):
    """q, k and v of a group, with random factors."""
    torch.manual_seed(1)
    found = {}
    for (name, width), rank in zip(WIDTHS.items(), ranks, strict=True):
        found[name] = APTAdapter.from_linear(nn.Linear(10, width, bias, dtype=dtype), rank, 1.0 + rank, **options)
        with torch.no_grad():
            found[name].lora_B.normal_()
    group = nn.ModuleDict(found)
    SharedInput(list(found.values()))
    return group


def an_x(seed=0, **options):
    return torch.randn(2, 4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), **options)
