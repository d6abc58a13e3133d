"""A model of two adapters that is the same on every rank, and the list of checks that two ranks make together."""

import torch
from torch import distributed as dist
from torch import nn

from apt_ext import APTAdapter

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


class Two(nn.Module):
    """Two adapters in a row, the same on every rank; within max_rank 5 they grow in place."""

    def __init__(self, max_rank=5):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.first = APTAdapter.from_linear(nn.Linear(8, 7), 2, max_rank=max_rank)
        self.second = APTAdapter.from_linear(nn.Linear(7, 6), 2, max_rank=max_rank)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=draw))
            for adapter in self.adapters():
                adapter.lora_A[2:].zero_()
                adapter.lora_B[:, 2:].zero_()

    def adapters(self):
        return [self.first, self.second]

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))

    def change(self, step, optimizer=None):
        """What happens after each step; the generators of the ranks are not alike."""
        if step in (1, 3):
            for adapter in self.adapters():
                adapter.increase_rank(adapter.rank + 1, optimizer=optimizer)
        if step in (2, 3):
            mask = torch.ones(7)
            mask[step] = 0
            self.first.set_masks(mask_out=mask)
            self.second.set_masks(mask_in=mask)


def batch(rank, step):
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(10 * step + rank))


def loss(model, rank, step):
    return model(batch(rank, step)).square().mean()


def gathered(tensor):
    """The tensor of each rank; a sharded one whole."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()
    both = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(both, tensor.contiguous())
    return both


def state(*adapters):
    return [(a.rank, *(t.clone() for t in (*a.get_masks(), a.lora_A.detach(), a.lora_B.detach()))) for a in adapters]


def assert_same(before, after):
    for old, new in zip(before, after, strict=True):
        assert old[0] == new[0] and all(map(torch.equal, old[1:], new[1:]))


def whole(tensor):
    return tensor.full_tensor().detach() if hasattr(tensor, "full_tensor") else tensor.detach()
