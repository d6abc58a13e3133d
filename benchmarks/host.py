"""Where the host time of one forward call goes: the same call entered at one level after the other, and what each level adds."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F

import apt_ext
from apt_ext import _C


class Nothing(nn.Module):
    def forward(self, x, mask_in=None, mask_out=None):
        return x


def host_time(peers, rounds, device):
    """{name: seconds until one call returns, the device idle, one value a call}; interleaved."""
    times = {name: [] for name in peers}
    for _ in range(rounds * 10):
        for name, call in peers.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def levels(adapter, x):
    """{level: (call, whether gradients are on)} of one adapter without masks, outermost first, and a few yardsticks."""
    W, A, B, scaling = adapter.weight, adapter.lora_A, adapter.lora_B, adapter.scaling
    layer = (W, None, A, B, None, None, scaling, 0.0, None)
    none = x[:0]
    N, nothing, bare = W.shape[0], Nothing(), _C.apt_linear
    t, y = x @ A.detach().t(), x @ W.detach().t()
    return {
        "adapter(x)": (lambda: adapter(x), True),
        "adapter(x), no_grad": (lambda: adapter(x), False),
        "adapter.forward(x), no_grad": (lambda: adapter.forward(x), False),
        "ops.apt_linear, no_grad": (lambda: apt_ext.ops.apt_linear(x, *layer), False),
        "op, typed door": (lambda: bare(x, *layer), True),
        "op, typed door, no_grad": (lambda: bare(x, *layer), False),
        "op, no tokens": (lambda: bare(none, *layer), False),
        "F.linear": (lambda: F.linear(x, W), False),
        "x A^T": (lambda: torch.mm(x, A.t()), False),
        "y += s t B^T": (lambda: y.addmm_(t, B.t(), alpha=scaling), False),
        "empty y": (lambda: torch.empty(x.shape[0], N, device=x.device, dtype=x.dtype), False),
        "a module that does nothing": (lambda: nothing(x), False),
    }


# (what a level costs, the level with it, the level without it)
STAGES = [
    ("nn.Module's call", "adapter.forward(x), no_grad", "adapter(x), no_grad"),
    ("forward in Python: masks, state, Parameters", "ops.apt_linear, no_grad", "adapter.forward(x), no_grad"),
    ("choosing the door", "op, typed door, no_grad", "ops.apt_linear, no_grad"),
    ("autograd: node and saved tensors", "op, typed door, no_grad", "op, typed door"),
    ("arguments, dispatcher, checks, allocation", None, "op, no tokens"),
    ("three products, or launches", "op, no tokens", "op, typed door, no_grad"),
]


def profile_rows(adapter, x, rounds, device, labels):
    """One row a level: microseconds a call with quartiles. The last rows are stages: differences of two levels' medians."""
    calls = levels(adapter, x)

    times = {}
    for grad in (True, False):  # the mode is set outside the clock
        group = {name: call for name, (call, on) in calls.items() if on == grad}
        with torch.set_grad_enabled(grad):
            host_time(group, 2, device)
            times.update(host_time(group, rounds * 4, device))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name in calls:
        low, _, high = statistics.quantiles(times[name], n=4)
        yield {**labels, "work": "host profile", "peer": name, "us": medians[name] * 1e6, "low": low * 1e6, "high": high * 1e6}
    for what, without, level in STAGES:
        value = medians[level] - (medians[without] if without else 0.0)
        yield {**labels, "work": "host profile: stages", "peer": what, "us": value * 1e6}
