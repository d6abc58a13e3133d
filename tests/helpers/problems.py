"""A random layer with its float64 oracle, and contract's accuracy rule, once."""

from __future__ import annotations

import torch

from apt_ext import reference

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# |error|_2 <= eps * |sum of magnitudes|_2, so that cancellation asks for no digits that nobody has.
EPS = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}


def assert_accurate(actual: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor, dtype: torch.dtype, what: str = "") -> None:
    """``expected`` and ``magnitude`` in float64; NaN and Inf never pass."""
    assert actual.shape == expected.shape, what
    error = torch.linalg.vector_norm(actual.detach().double().cpu() - expected.detach().cpu())
    bound = EPS[dtype] * torch.linalg.vector_norm(magnitude.detach().cpu())
    assert error <= bound, f"{what}: error {error:.3e}, allowed {bound:.3e}"  # false for NaN


class Problem:
    """One random layer with its float64 oracle: forward, gradients and the magnitudes that bound their errors."""

    def __init__(self, shape, N, K, R, dtype, device="cpu", masks="none", weight=True, bias=True, factor_dtype=None, scaling=1.7, seed=0):
        g = torch.Generator().manual_seed(seed)

        def draw(*size, to=dtype):
            return torch.randn(*size, generator=g, dtype=torch.float64).to(to).to(device)

        self.dtype, self.device, self.scaling = dtype, device, scaling
        self.x, self.grad = draw(*shape, K), draw(*shape, N)
        self.weight = draw(N, K) if weight else None
        self.bias = draw(N) if bias else None
        self.lora_A, self.lora_B = draw(R, K, to=factor_dtype or dtype), draw(N, R, to=factor_dtype or dtype)
        self.mask_in, self.mask_out = make_mask(masks, K, g, device), make_mask(masks, N, g, device)

    def run(self, function):
        """(y, dx, dA, dB, db) of ``function``, an apt_linear."""
        leaves = [t.detach().clone().requires_grad_() for t in (self.x, self.lora_A, self.lora_B)]
        bias = None if self.bias is None else self.bias.detach().clone().requires_grad_()
        y = function(leaves[0], self.weight, bias, leaves[1], leaves[2], self.mask_in, self.mask_out, self.scaling)
        inputs = [*leaves, *([] if bias is None else [bias])]
        grads = torch.autograd.grad(y, inputs, self.grad)
        return {"y": y.detach(), **dict(zip(("dx", "dA", "dB", "db"), grads, strict=False))}

    def oracle(self, formula=reference.apt_linear):
        return self._double(lambda t: t).run(formula)

    def magnitudes(self, formula=reference.apt_linear):
        absolute = self._double(torch.abs)
        absolute.scaling = abs(self.scaling)
        return absolute.run(formula)

    def _double(self, change):
        other = object.__new__(Problem)
        other.__dict__.update(self.__dict__)
        for name in ("x", "grad", "weight", "bias", "lora_A", "lora_B", "mask_in", "mask_out"):
            value = getattr(self, name)
            if value is not None and name in ("lora_A", "lora_B"):
                value = value.to(self.dtype)  # float32 factors are rounded once to the compute dtype
            setattr(other, name, None if value is None else change(value.detach().double().cpu()))
        return other

    def poisoned(self):
        """NaN and Inf in every pruned lane of x, grad, lora_A, lora_B and bias."""
        other = object.__new__(Problem)
        other.__dict__.update(self.__dict__)
        for name, mask, dim in (("x", self.mask_in, -1), ("lora_A", self.mask_in, -1), ("grad", self.mask_out, -1)):
            other.__dict__[name] = poison(getattr(self, name), mask, dim)
        other.lora_B = poison(self.lora_B, self.mask_out, 0)
        other.bias = None if self.bias is None else poison(self.bias, self.mask_out, 0)
        return other

    def check(self, got, clean=None, formula=reference.apt_linear):
        expected, magnitude = (clean or self).oracle(formula), (clean or self).magnitudes(formula)
        assert got.keys() == expected.keys()
        for name, value in got.items():
            assert_accurate(value, expected[name], magnitude[name], self.dtype, name)


def make_mask(kind, size, generator, device):
    if kind == "none":
        return None
    mask = (torch.rand(size, generator=generator) > 0.3).float()
    if kind == "soft":
        mask = mask * torch.rand(size, generator=generator)
    elif kind == "zero":
        mask = torch.zeros(size)
    elif kind == "one":
        mask = torch.zeros(size)
        mask[size // 2 : size // 2 + 1] = 1
    return mask.to(device)


def poison(tensor, mask, dim):
    if mask is None:
        return tensor
    tensor = tensor.clone()
    pruned = (mask == 0).nonzero().flatten()
    bad = torch.full((len(pruned),), float("nan"), dtype=tensor.dtype, device=tensor.device)
    bad[::2] = float("inf")
    shape = [1] * tensor.dim()
    shape[dim] = -1
    tensor.index_copy_(dim % tensor.dim(), pruned, bad.view(shape).expand_as(tensor.index_select(dim % tensor.dim(), pruned)).contiguous())
    return tensor
