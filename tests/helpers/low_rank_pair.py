"""Two factors that train and grow, every optimizer that can grow with them, and bitwise comparison of all they hold."""

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, Muon, NAdam, RAdam, RMSprop, Rprop

from apt_ext.optim.resize import Resize, draw_rows, resize_parameters

# name: (make the optimizer, {state key: start value})
ADAM = {"exp_avg": 0.0, "exp_avg_sq": 0.0}
OPTIMIZERS = {
    "sgd": (lambda p: SGD(p, lr=0.1), {}),
    "sgd_momentum": (lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01), {"momentum_buffer": 0.0}),
    "sgd_nesterov_foreach": (lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True), {"momentum_buffer": 0.0}),
    "sgd_fused": (lambda p: SGD(p, lr=0.1, momentum=0.9, fused=True), {"momentum_buffer": 0.0}),
    "adam": (lambda p: Adam(p, lr=0.01), ADAM),
    "adam_fused": (lambda p: Adam(p, lr=0.01, fused=True), ADAM),
    "adam_tensor_lr": (lambda p: Adam(p, lr=torch.tensor(0.01)), ADAM),
    "adamw": (lambda p: AdamW(p, lr=0.01), ADAM),
    "adamw_foreach": (lambda p: AdamW(p, lr=0.01, foreach=True), ADAM),
    "adamw_fused": (lambda p: AdamW(p, lr=0.01, fused=True), ADAM),
    "adam_foreach_amsgrad": (lambda p: Adam(p, lr=0.01, amsgrad=True, foreach=True), ADAM | {"max_exp_avg_sq": 0.0}),
    "adamw_amsgrad": (lambda p: AdamW(p, lr=0.01, amsgrad=True), ADAM | {"max_exp_avg_sq": 0.0}),
    "adamw_fused_amsgrad": (lambda p: AdamW(p, lr=0.01, amsgrad=True, fused=True), ADAM | {"max_exp_avg_sq": 0.0}),
    "nadam": (lambda p: NAdam(p, lr=0.01), ADAM),
    "nadam_foreach": (lambda p: NAdam(p, lr=0.01, decoupled_weight_decay=True, weight_decay=0.1, foreach=True), ADAM),
    "radam": (lambda p: RAdam(p, lr=0.01), ADAM),
    "adamax": (lambda p: Adamax(p, lr=0.01), {"exp_avg": 0.0, "exp_inf": 0.0}),
    "rmsprop": (
        lambda p: RMSprop(p, lr=0.01, centered=True, momentum=0.9),
        {"square_avg": 0.0, "momentum_buffer": 0.0, "grad_avg": 0.0},
    ),
    "rmsprop_plain": (lambda p: RMSprop(p, lr=0.01), {"square_avg": 0.0}),
    "adagrad": (lambda p: Adagrad(p, lr=0.1, initial_accumulator_value=0.1), {"sum": 0.1}),
    "adagrad_fused": (lambda p: Adagrad(p, lr=0.1, initial_accumulator_value=0.1, fused=True), {"sum": 0.1}),
    "adadelta": (lambda p: Adadelta(p), {"square_avg": 0.0, "acc_delta": 0.0}),
    "rprop": (lambda p: Rprop(p, lr=0.02), {"prev": 0.0, "step_size": 0.02}),
    "muon": (lambda p: Muon(p, lr=0.02), {"momentum_buffer": 0.0}),
}


class Pair(nn.Module):
    """The two factors of a low-rank path: lora_A [R, 6], lora_B [5, R]."""

    def __init__(self, rank=4, dtype=torch.float32, seed=0):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.lora_A = nn.Parameter(0.3 * torch.randn(rank, 6, generator=draw, dtype=dtype))
        self.lora_B = nn.Parameter(0.3 * torch.randn(5, rank, generator=draw, dtype=dtype))

    def loss(self):
        x = torch.linspace(-1, 1, 18, dtype=self.lora_A.dtype).view(3, 6).sin()
        return ((x @ self.lora_A.T @ self.lora_B.T - 0.3) ** 2).sum()

    def train_steps(self, optimizer, count=3):
        for _ in range(count):
            optimizer.zero_grad()
            self.loss().backward()
            optimizer.step()

    def grow(self, optimizer=None, rank=7):
        A, B, more = self.lora_A.detach(), self.lora_B.detach(), rank - self.lora_A.shape[0]
        rows = draw_rows(more, 6, 0.5, torch.Generator().manual_seed(1), A.device, A.dtype)
        changes = [
            Resize(self.lora_A, torch.cat([A, rows]), 0),
            Resize(self.lora_B, torch.cat([B, B.new_zeros(5, more)], 1), 1),
        ]
        resize_parameters(changes, optimizer)


def bits(thing):
    """`thing` with every tensor replaced by what identifies it and its bytes: compares bitwise, NaN included."""
    if isinstance(thing, torch.Tensor):
        data = thing.detach().contiguous().flatten().view(torch.uint8) if thing.dim() else thing.detach().reshape(1).view(torch.uint8)
        return (tuple(thing.shape), str(thing.dtype), bytes(data.tolist()))
    if isinstance(thing, dict):
        return {key: bits(value) for key, value in thing.items()}
    return [bits(item) for item in thing] if isinstance(thing, list | tuple) else thing


def snapshot(pair, *optimizers):
    """Everything that a refusal must leave alone."""
    params = {name: (id(p), p._version, id(p.grad), bits(p), bits(p.grad)) for name, p in pair.named_parameters()}
    return params, [bits(o.state_dict()) for o in optimizers]


def refused(pair, optimizers, error, match, call):
    before = snapshot(pair, *optimizers)
    with pytest.raises(error, match=match):
        call()
    assert snapshot(pair, *optimizers) == before
