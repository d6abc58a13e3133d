"""Ratios to the frozen GEMM of the same run: F.linear(x, W) without bias (forward), plus g @ W (forward + backward).

    python benchmarks/bench.py [--device cuda] [--dtype bfloat16] [--rounds 12] [--quick] [--json FILE]

Peers are interleaved: every round times each of them once, on random data, and the table shows medians over the rounds, with the
quartiles in the JSON. "masks" has 1 % zeros and 1 % at 0.5 in every mask; "none" has masks of ones.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import apt_ext
from apt_ext import APTAdapter

SHAPES = {
    "cuda": [(8192, 4096, 4096), (8192, 11008, 4096), (8192, 4096, 11008), (4096, 768, 768), (4096, 3072, 768)],
    "cpu": [(1024, 768, 768), (1024, 3072, 768), (1024, 768, 3072)],
}


def spread(size, device):
    """1 % zeros, 1 % at 0.5, the rest ones."""
    mask = torch.ones(size)
    order = torch.randperm(size)
    few = max(1, size // 100)
    mask[order[:few]], mask[order[few : 2 * few]] = 0, 0.5
    return mask.to(device)


def measure(peers, rounds, device, inner):
    """{name: seconds a call, one value a round}; device events on CUDA, the wall clock on the CPU."""
    times = {name: [] for name in peers}
    for call in peers.values():
        for _ in range(3):
            call()
    for _ in range(rounds):
        for name, call in peers.items():
            if device == "cuda":
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda._sleep(400_000)  # the queue fills while the device sleeps, so host time stays out
                start.record()
                for _ in range(inner):
                    call()
                end.record()
                end.synchronize()
                times[name].append(start.elapsed_time(end) / 1e3 / inner)
            else:
                start = time.perf_counter()
                for _ in range(inner):
                    call()
                times[name].append((time.perf_counter() - start) / inner)
    return times


def host_time(peers, rounds, device):
    """Seconds until one call returns, the device idle."""
    times = {name: [] for name in peers}
    for _ in range(rounds * 10):
        for name, call in peers.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def rows_of(times, base, **labels):
    divisor = statistics.median(times[base])
    for name, values in times.items():
        low, _, high = statistics.quantiles(values, n=4)
        yield {**labels, "peer": name, "ratio": statistics.median(values) / divisor, "low": low / divisor, "high": high / divisor}


def layer_rows(M, N, K, rank, dtype, device, rounds):
    x, grad = (torch.randn(M, side, device=device).to(dtype) for side in (K, N))
    linear = nn.Linear(K, N, bias=False, device=device, dtype=dtype)
    plain = APTAdapter.from_linear(linear, rank)
    masked = APTAdapter.from_linear(linear, rank)
    masked.set_masks(spread(K, device), spread(N, device))
    with torch.no_grad():
        plain.lora_B.normal_(), masked.lora_B.normal_()
    W, A, B, s = linear.weight, plain.lora_A, plain.lora_B, plain.scaling
    m_in, m_out = masked.mask_in.to(dtype), masked.mask_out.to(dtype)
    leaf = x.clone().requires_grad_()

    def naive(x):
        h = x * m_in
        return m_out * (F.linear(h, W) + s * F.linear(F.linear(h, A), B))

    forwards = {"apt none": plain, "apt masks": masked, "naive eager, masks": naive}
    peers = {"frozen": lambda: F.linear(x, W), **{n: (lambda f=f: f(x)) for n, f in forwards.items()}}
    inner = 5 if device == "cuda" else 2
    labels = {"M": M, "N": N, "K": K, "rank": rank, "dtype": str(dtype).removeprefix("torch.")}
    with torch.no_grad():
        yield from rows_of(measure(peers, rounds, device, inner), "frozen", work="forward", **labels)

    def train(f):
        torch.autograd.grad(f(leaf), (leaf, A if f is not masked else masked.lora_A, B if f is not masked else masked.lora_B), grad)

    peers = {"frozen": lambda: (F.linear(x, W), grad @ W), **{n: (lambda f=f: train(f)) for n, f in forwards.items()}}
    yield from rows_of(measure(peers, rounds, device, inner), "frozen", work="forward+backward", **labels)
    small = x[:1]
    hosts = {"F.linear": lambda: F.linear(small, W), "apt none": lambda: plain(small), "apt masks": lambda: masked(small)}
    with torch.no_grad():
        yield from rows_of(host_time(hosts, rounds, device), "F.linear", work="host time a call, M=1", **labels)


def merge_rows(N, K, rank, dtype, device, rounds):
    W = torch.randn(N, K, device=device).to(dtype)
    A, B = torch.randn(rank, K, device=device).to(dtype) * 1e-4, torch.randn(N, rank, device=device).to(dtype) * 1e-4
    peers = {
        "one pass over W": lambda: W.mul_(1.0),
        "merge_ check=False": lambda: apt_ext.ops.merge_(W, A, B, 1e-3, None, None, False),
        "merge_ check=True": lambda: apt_ext.ops.merge_(W, A, B, 1e-3),
        "W += s (B @ A)": lambda: W.add_(1e-3 * (B @ A)),
    }
    labels = {"M": 0, "N": N, "K": K, "rank": rank, "dtype": str(dtype).removeprefix("torch.")}
    yield from rows_of(measure(peers, rounds, device, 5), "one pass over W", work="merge_", **labels)


def mask_rows(tensors, dtype, device, rounds):
    grads = [torch.randn(16, 4096, device=device).to(dtype) for _ in range(tensors)]
    masks, dims = [torch.rand(4096, device=device) for _ in grads], [1] * tensors
    copies = [torch.empty_like(g) for g in grads]
    peers = {
        "foreach copy": lambda: torch._foreach_copy_(copies, grads),
        "mask_grads_": lambda: apt_ext.ops.mask_grads_(grads, masks, dims),
        "foreach mul (no selection)": lambda: torch._foreach_mul_(grads, masks),
    }
    labels = {"M": 0, "N": tensors, "K": 4096, "rank": 16, "dtype": str(dtype).removeprefix("torch.")}
    yield from rows_of(measure(peers, rounds, device, 2), "foreach copy", work=f"mask_grads_ of {tensors} tensors", **labels)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default=None, help="float32, float16 or bfloat16; default: bfloat16 on cuda, float32 on the CPU")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="the first shape and rank 16 only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype or ("bfloat16" if options.device == "cuda" else "float32"))
    torch.manual_seed(0)
    shapes = SHAPES[options.device][: 1 if options.quick else None]
    jobs = [(layer_rows, (*shape, rank, dtype)) for shape in shapes for rank in ((16,) if options.quick else (16, 64))]
    side = 4096 if options.device == "cuda" else 1024
    jobs += [(merge_rows, (side, side, 16, dtype)), (mask_rows, (448 if options.device == "cuda" else 64, dtype))]
    rows = [row for job, arguments in tqdm(jobs, unit="case") for row in job(*arguments, options.device, options.rounds)]

    print(f"{'work':<24} {'M':>6} {'N':>6} {'K':>6} {'rank':>5}  {'peer':<28} ratio (quartiles)")
    for r in rows:
        size = f"{r['M']:>6} {r['N']:>6} {r['K']:>6} {r['rank']:>5}"
        print(f"{r['work']:<24} {size}  {r['peer']:<28} {r['ratio']:6.3f} ({r['low']:.3f}-{r['high']:.3f})")
    if options.json:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        name = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
        build = {**apt_ext.ops.build_info(), "torch": torch.__version__}
        header = {"commit": commit, "device": name, "threads": torch.get_num_threads(), "rounds": options.rounds, "build": build}
        options.json.write_text(json.dumps({**header, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
