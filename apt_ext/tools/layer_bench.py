"""`apt-ext bench`: layers on this machine, in turn with a plain linear one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import apt_ext

from ..common.clock import in_turn, spread, waiting_for

_SHAPES = {
    "cpu": ((512, 384, 384), (512, 1536, 384), (512, 384, 1536)),
    "cuda": ((8192, 1024, 1024), (8192, 4096, 1024), (8192, 1024, 4096)),
}


def bench_layers(device: str, rounds: int, rank: int) -> dict[str, Any]:
    """Seconds of a forward and of a forward and backward pass of each layer, and their ratio to `F.linear`'s, with quartiles.

    On a CPU in float32, on CUDA in bfloat16. "half": half of the inputs and outputs are pruned; "cut": as a cut leaves it.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "rank": rank,
        "rows": [],
    }
    for tokens, out, inside in _SHAPES[device]:
        for passes in ("forward", "forward and backward"):
            calls = _calls(tokens, out, inside, rank, device, dtype, backward=passes != "forward")
            seconds = in_turn(calls, rounds, waiting_for(torch.device(device)))
            base = spread(seconds["F.linear"])["median"]
            ratios = {name: spread([one / base for one in values]) for name, values in seconds.items()}
            found["rows"].append({"tokens": tokens, "out": out, "in": inside, "passes": passes, "seconds": base, "ratio": ratios})
    return found


def _calls(
    tokens: int, out: int, inside: int, rank: int, device: str, dtype: torch.dtype, backward: bool
) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    on: dict[str, Any] = {"device": device, "dtype": dtype}
    x, linear = torch.randn(tokens, inside, **on), nn.Linear(inside, out, **on)
    linear.requires_grad_(False)

    def adapter(of: nn.Linear) -> apt_ext.APTAdapter:
        made = apt_ext.APTAdapter.from_linear(of, rank)
        nn.init.normal_(made.lora_B, std=0.02)
        return made

    half = adapter(nn.Linear(inside, out, **on))
    half.set_masks((torch.arange(inside) % 2).float(), (torch.arange(out) % 2).float())
    compacted = adapter(nn.Linear(inside, out, **on))
    compacted.set_masks((torch.arange(inside) % 2).float(), (torch.arange(out) % 2).float())
    compacted.compact()
    full, cut = adapter(linear), adapter(nn.Linear(inside // 2, out // 2, **on))
    calls: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]] = {
        "F.linear": (lambda one: F.linear(one, linear.weight, linear.bias), x),
        "adapter": (full, x),
        "adapter, half": (half, x),
        "adapter, half, compact": (compacted, x),
        "adapter, cut to half": (cut, x[:, : inside // 2].contiguous()),
    }
    return {name: partial(_run, call, given, backward) for name, (call, given) in calls.items()}


def _run(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, backward: bool) -> None:
    if not backward:
        with torch.no_grad():
            call(x)
        return
    leaf = x.detach().requires_grad_()
    call(leaf).sum().backward()  # type: ignore[no-untyped-call]


def table(found: dict[str, Any]) -> str:
    """The ratios, for people: median and quartiles."""
    threads = f", {found['threads']} thread{'s' * (found['threads'] != 1)}" if found["device"].startswith("CPU") else ""
    lines = [f"{found['device']}{threads}, {found['dtype']}, rank {found['rank']}; time over F.linear's, median (quartiles)"]
    for row in found["rows"]:
        lines.append(f"{row['tokens']} tokens, {row['in']} -> {row['out']}, {row['passes']}: F.linear {1e3 * row['seconds']:.3g} ms")
        for name, ratio in row["ratio"].items():
            if name != "F.linear":
                lines.append(f"  {name:24}{ratio['median']:>8.2f}  ({ratio['low']:.2f}-{ratio['high']:.2f})")
    return "\n".join(lines)
