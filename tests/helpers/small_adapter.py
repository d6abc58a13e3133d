"""A small adapter around a linear of 10 inputs and 7 outputs, masks for it, and what it must compute."""

import torch
from torch import nn

from apt_ext import APTAdapter, reference


def make(device="cpu", dtype=torch.float64, rank=3, trained=True, bias=True, **options):
    linear = nn.Linear(10, 7, bias=bias, device=device, dtype=dtype)
    adapter = APTAdapter.from_linear(linear, rank, **options)
    if trained:
        with torch.no_grad():
            adapter.lora_B[:, :rank].normal_()
    return adapter


def masks(device="cpu"):
    m_in = torch.tensor([1, 0, 1, 0.5, 1, 1, 0, 1, 0.01, 1], device=device)
    m_out = torch.tensor([0, 1, 1, 0.37, 1, 0, 1], device=device)
    return m_in, m_out


def expected(adapter, x, m_in=None, m_out=None):
    m_in = adapter.mask_in if m_in is None else m_in
    m_out = adapter.mask_out if m_out is None else m_out
    return reference.apt_linear(x, adapter.matrix, adapter.bias, adapter.Wa, adapter.Wb, m_in, m_out, adapter.scaling)


def outcome(adapter, x):
    """(y, and the gradients of its squares' sum: of x, lora_A and lora_B)"""
    y = adapter(x)
    return y, *torch.autograd.grad(y.square().sum(), (x, adapter.lora_A, adapter.lora_B))
