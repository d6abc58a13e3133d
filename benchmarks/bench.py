"""Ratios to the frozen GEMM of the same run: F.linear(x, W) without bias (forward), plus g @ W (forward + backward).

    python benchmarks/bench.py [--device cuda] [--dtype bfloat16] [--only layers,merge] [--json FILE] [--plot FILE]
    python benchmarks/bench.py --report

Peers are interleaved: every round times each of them once, on random data, and the table shows medians over the rounds, with the
quartiles in the JSON. "masks" has 1 % zeros and 1 % at 0.5 in every mask; "none" has masks of ones. On CUDA the clock is the device's.
On the CPU freed memory stays with the process: glibc otherwise gives it back at a moment that depends on the calls before, and the peer
that comes next pays for fresh pages. Each row says its page faults a call.
The JSON is written after every case; a case that fails is named in it and costs no other. --report measures nothing: it writes the tables
of docs/performance*.md, docs/friends.md, docs/shrink.md and the README from the kept files.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import kept
import report
import torch
from host import host_time, profile_rows
from peers import by_hand, compiled, lorafusion, naive, peft_linear
from timing import captured, keep_freed_memory, labels_of, measure, rows_of
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import apt_ext
from apt_ext import APTAdapter

SHAPES = {
    "cuda": [(8192, 4096, 4096), (8192, 11008, 4096), (8192, 4096, 11008), (4096, 768, 768)],
    "cpu": [(1024, 768, 768), (1024, 3072, 768), (1024, 768, 3072)],
}
# (out, in) of the linears of one layer of a LLaMA-style model with 1.1 billion parameters, which has 22 of them.
BILLION = [(2048, 2048), (256, 2048), (256, 2048), (2048, 2048), (5632, 2048), (5632, 2048), (2048, 5632)]


def spread(size, device):
    """1 % zeros, 1 % at 0.5, the rest ones."""
    mask = torch.ones(size)
    order = torch.randperm(size)
    few = max(1, size // 100)
    mask[order[:few]], mask[order[few : 2 * few]] = 0, 0.5
    return mask.to(device)


class Layer:
    """One linear with a plain and a masked adapter, its peers, and an input and an output gradient."""

    def __init__(self, M, N, K, rank, dtype, device):
        self.x, self.grad = (torch.randn(M, side, device=device).to(dtype) for side in (K, N))
        self.leaf = self.x.clone().requires_grad_()
        linear = nn.Linear(K, N, bias=False, device=device, dtype=dtype)
        self.W = linear.weight
        self.plain, self.masked = (APTAdapter.from_linear(linear, rank) for _ in range(2))
        self.masked.set_masks(spread(K, device), spread(N, device))
        with torch.no_grad():
            self.plain.lora_B.normal_(), self.masked.lora_B.normal_()
        A, B, scaling = self.plain.lora_A, self.plain.lora_B, self.plain.scaling
        in_dtype = (self.masked.mask_in.to(dtype), self.masked.mask_out.to(dtype))
        self.formula = (self.W, A, B, scaling, *in_dtype)
        self.peers = {
            "apt none": (self.plain, A, B),
            "apt masks": (self.masked, self.masked.lora_A, self.masked.lora_B),
            "naive eager, masks": (naive(*self.formula), A, B),
            "mm + addmm_, none": (by_hand(self.W, A, B, scaling), A, B),
        }
        twin = nn.Linear(K, N, bias=False, device=device, dtype=dtype).requires_grad_(False)
        if (peft := peft_linear(twin, rank, scaling)) is not None:
            self.peers["PEFT, none"] = (peft, peft.lora_A["default"].weight, peft.lora_B["default"].weight)
        if (fused := lorafusion(self.W, A, B, scaling, self.x)) is not None:
            self.peers["LoRAFusion, none"] = (fused, A, B)

    def forwards(self, only=None):
        return {name: (lambda f=f: f(self.x)) for name, (f, _, _) in self.peers.items() if only is None or name in only}

    def steps(self, only=None):
        def step(f, A, B):
            torch.autograd.grad(f(self.leaf), (self.leaf, A, B), self.grad)

        return {name: (lambda p=p: step(*p)) for name, p in self.peers.items() if only is None or name in only}

    def frozen(self):
        return F.linear(self.x, self.W)

    def frozen_step(self):
        return F.linear(self.x, self.W.detach()), self.grad @ self.W.detach()


def timed(layer, labels, rounds, device, only=None, inner=2, prefix="", wrap=lambda call: call):
    """Rows of a forward without gradients and of a forward with backward, each call as `wrap` makes it."""
    with torch.no_grad():
        peers = {name: wrap(call) for name, call in {"frozen": layer.frozen, **layer.forwards(only)}.items()}
        times = measure(peers, rounds, device, inner)
    yield from rows_of(times, "frozen", work=f"{prefix}forward", **labels)
    peers = {name: wrap(call) for name, call in {"frozen": layer.frozen_step, **layer.steps(only)}.items()}
    yield from rows_of(measure(peers, rounds, device, inner), "frozen", work=f"{prefix}forward+backward", **labels)


def layer_rows(M, N, K, rank, dtype, device, rounds):
    layer, labels = Layer(M, N, K, rank, dtype, device), labels_of(M, N, K, rank, dtype)
    yield from timed(layer, labels, rounds, device, inner=4 if device == "cuda" else 2)


def graph_rows(M, N, K, rank, dtype, device, rounds):
    """Captured calls. A captured adapter computes its masks, ones or not."""
    layer, ours = Layer(M, N, K, rank, dtype, device), ("apt none", "apt masks")
    bare = (layer.W, None, layer.plain.lora_A, layer.plain.lora_B, None, None, layer.plain.scaling)
    layer.peers["apt_linear, no masks"] = (lambda x: apt_ext.ops.apt_linear(x, *bare), layer.plain.lora_A, layer.plain.lora_B)
    only = (*ours, "apt_linear, no masks", "mm + addmm_, none")
    yield from timed(layer, labels_of(M, N, K, rank, dtype), rounds, device, only, prefix="graph: ", wrap=captured)


def compiled_rows(M, N, K, rank, dtype, device, rounds):
    """The naive formula through torch.compile beside ours; small layers on a GPU in a graph, where host time does not hide the rest."""
    torch.compiler.reset()
    layer = Layer(M, N, K, rank, dtype, device)
    layer.peers["torch.compile, masks"] = (compiled(*layer.formula), *layer.peers["naive eager, masks"][1:])
    only, labels = ("apt masks", "naive eager, masks", "torch.compile, masks"), labels_of(M, N, K, rank, dtype)
    small = device == "cuda" and max(N, K) <= 1024
    prefix, wrap = ("compiled, graph: ", captured) if small else ("compiled: ", lambda call: call)
    yield from timed(layer, labels, rounds, device, only, prefix=prefix, wrap=wrap)


def host_rows(N, K, rank, dtype, device, rounds):
    layer = Layer(1, N, K, rank, dtype, device)
    with torch.no_grad():
        times = host_time({"F.linear": layer.frozen, **layer.forwards()}, rounds, device)
    yield from rows_of(times, "F.linear", work="host time a call", **labels_of(1, N, K, rank, dtype))


def host_profile_rows(N, K, rank, dtype, device, rounds):
    layer = Layer(1, N, K, rank, dtype, device)
    yield from profile_rows(layer.plain, layer.x, rounds, device, labels_of(1, N, K, rank, dtype))


def width_rows(width, rank, dtype, device, rounds):
    """An odd width on either side against the next multiple of 8."""
    aligned, other = (width + 7) // 8 * 8, 4096
    for side, shapes in (("in", ((other, width), (other, aligned))), ("out", ((width, other), (aligned, other)))):
        odd, even = (Layer(8192, N, K, rank, dtype, device) for N, K in shapes)
        with torch.no_grad():
            times = measure({"aligned": lambda e=even: e.plain(e.x), "odd": lambda o=odd: o.plain(o.x)}, rounds, device, 3)
        N, K = shapes[0]
        yield from rows_of(times, "aligned", work=f"odd {side}", **labels_of(8192, N, K, rank, dtype))


def rank_rows(M, N, K, rank, dtype, device, rounds):
    """A rank that is no multiple of 8 against the next one that is, and the same of the products by hand."""
    odd, even = (Layer(M, N, K, one, dtype, device).steps(("apt none", "mm + addmm_, none")) for one in (rank, (rank + 7) // 8 * 8))
    peers = {"aligned": even["apt none"], "odd": odd["apt none"]}
    peers |= {"mm + addmm_, aligned": even["mm + addmm_, none"], "mm + addmm_, odd": odd["mm + addmm_, none"]}
    times = measure(peers, rounds, device, 3)
    yield from rows_of(times, "aligned", work="odd rank: forward+backward", **labels_of(M, N, K, rank, dtype))


def pass_rows(M, N, K, rank, dtype, device, rounds):
    """What one pass over x costs by itself, and the low-rank parts of the layer without its dense product."""
    layer, ops = Layer(M, N, K, rank, dtype, device), torch.ops.apt_ext
    A, B, t = layer.plain.lora_A.detach(), layer.plain.lora_B.detach(), torch.randn(M, rank, device=device).to(dtype)
    to = torch.empty_like(layer.x)
    backward = (layer.grad, layer.x, layer.W.detach(), A, B, t, None, None, 2.0, 0.0, None)
    peers = {
        "frozen": layer.frozen,
        "read x (sum)": lambda: layer.x.sum(),
        "write x (fill_)": lambda: to.fill_(1.0),
        "read and write x (copy_)": lambda: to.copy_(layer.x),
        "low and out, without W": lambda: apt_ext.ops.apt_linear(layer.x, None, None, A, B, None, None, 2.0),
        "dB": lambda: ops.apt_linear_backward(*backward, [False, False, True, False]),
        "u and dA": lambda: ops.apt_linear_backward(*backward, [False, True, False, False]),
    }
    with torch.no_grad():
        yield from rows_of(measure(peers, rounds, device, 3), "frozen", work="one pass", **labels_of(M, N, K, rank, dtype))


def merge_peers(N, K, rank, dtype, device):
    """({name: call}, the weight they change)"""
    W = torch.randn(N, K, device=device).to(dtype)
    A, B = torch.randn(rank, K, device=device).to(dtype) * 1e-4, torch.randn(N, rank, device=device).to(dtype) * 1e-4
    peers = {
        "one pass over W": lambda: W.mul_(1.0),
        "merge_ check=False": lambda: apt_ext.ops.merge_(W, A, B, 1e-3, None, None, False),
        "merge_ check=True": lambda: apt_ext.ops.merge_(W, A, B, 1e-3),
        "W.addmm_(B, A)": lambda: W.addmm_(B, A, alpha=1e-3),
        "W += s (B @ A)": lambda: W.add_(1e-3 * (B @ A)),
    }
    return peers, W


def merge_rows(N, K, rank, dtype, device, rounds):
    peers, _ = merge_peers(N, K, rank, dtype, device)
    yield from rows_of(measure(peers, rounds, device, 5), "one pass over W", work="merge_", **labels_of(0, N, K, rank, dtype))


def bytes_taken(call, device):
    """The most memory that `call` holds beyond what was there before, in bytes.

    On CUDA the caching allocator's own count. On the CPU what torch's profiler sees of the allocator: tensors, and not the buffers that
    MKL, oneDNN and the C++ library take for themselves.
    """
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    held = most = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def memory_rows(N, K, rank, dtype, device, rounds):
    peers, W = merge_peers(N, K, rank, dtype, device)
    size = W.numel() * W.element_size()
    for name, call in peers.items():
        taken = bytes_taken(call, device)
        yield {"work": "merge_: extra memory", "peer": name, "bytes": taken, "of_W": taken / size, **labels_of(0, N, K, rank, dtype)}


def model_merge_rows(rank, dtype, device, rounds):
    """Every linear of a model with 1.1 billion parameters, merged and forgotten, against PEFT's own merge."""
    linears = [nn.Linear(K, N, bias=False, device=device, dtype=dtype).requires_grad_(False) for N, K in BILLION * 22]
    pairs = [(torch.randn(rank, m.in_features, device=device).to(dtype) * 1e-4, torch.zeros_like(m.weight[:, :rank])) for m in linears]
    peft = [peft_linear(m, rank, 2.0) for m in linears]
    if peft[0] is None:
        return

    def ours():
        for linear, (A, B) in zip(linears, pairs, strict=True):
            apt_ext.ops.merge_(linear.weight, A, B, 2.0, None, None, False)

    def theirs():
        for layer in peft:
            layer.merge()
            layer.merged_adapters.clear()

    peers = {"PEFT merge": theirs, "merge_ check=False": ours}
    yield from rows_of(measure(peers, rounds, device, 1), "PEFT merge", work="merge, 1.1 B model", **labels_of(0, 0, 0, rank, dtype))


def mask_rows(tensors, dtype, device, rounds):
    grads = [torch.randn(16, 4096, device=device).to(dtype) for _ in range(tensors)]
    masks, dims = [torch.rand(4096, device=device) for _ in grads], [1] * tensors
    flat = torch.randn(tensors * 16 * 4096, device=device).to(dtype)
    copy = torch.empty_like(flat)
    peers = {
        "one copy of the same bytes": lambda: copy.copy_(flat),
        "mask_grads_": lambda: apt_ext.ops.mask_grads_(grads, masks, dims),
        "foreach mul (no selection)": lambda: torch._foreach_mul_(grads, masks),
    }
    base, work = "one copy of the same bytes", f"mask_grads_ of {tensors}"
    yield from rows_of(measure(peers, rounds, device, 2), base, work=work, **labels_of(0, tensors, 4096, 16, dtype))


def jobs_of(options, dtype):
    """[(part, function, its arguments before device and rounds)] of what was asked for."""
    cuda = options.device == "cuda"
    ranks = (16,) if options.quick else (16, 64)
    shapes = SHAPES[options.device][: 1 if options.quick else None]
    side = 4096 if cuda else 1024
    host_side = 4096 if cuda else 8  # the product itself must take no time: on a GPU it runs beside the host
    compiled_shapes = [*SHAPES["cuda"][:2], SHAPES["cuda"][3]] if cuda else SHAPES["cpu"]
    parts = {
        "layers": [(layer_rows, (*shape, rank, dtype)) for shape in shapes for rank in ranks],
        "graph": [(graph_rows, (4096, 768, 768, rank, dtype)) for rank in ranks] if cuda else [],
        "compiled": [(compiled_rows, (*shape, 16, dtype)) for shape in compiled_shapes[: 1 if options.quick else None]],
        "passes": [(pass_rows, (*shapes[0], rank, dtype)) for rank in ranks],
        "host": [(host_rows, (host_side, host_side, min(16, host_side), dtype))],
        "host-profile": [(host_profile_rows, (host_side, host_side, min(16, host_side), dtype))],
        "widths": [(width_rows, (width, 16, dtype)) for width in (4097, 2055, 383)] if cuda and not options.quick else [],
        "ranks": [(rank_rows, (*shape, 37, dtype)) for shape in ((8192, 4096, 4096), (2048, 384, 384))]
        if cuda and not options.quick
        else [],
        "merge": [(merge_rows, (side, side, 16, dtype))] + ([(model_merge_rows, (16, dtype))] if cuda else []),
        "memory": [(memory_rows, (side, side, 16, dtype))],
        "mask_grads": [(mask_rows, (448 if cuda else 64, dtype))],
        "compact": kept.jobs(options, dtype),
    }
    asked = options.only.split(",") if options.only else list(parts)
    unknown = [name for name in asked if name not in parts]
    if unknown:
        raise SystemExit(f"--only: expected some of {', '.join(parts)}, got {', '.join(unknown)}")
    return [(name, *job) for name in asked for job in parts[name]]


def device_name(device):
    """The GPU's name, or the CPU's with what it has for 16-bit products."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    model = re.search(r"model name\s*: (.*)", text)
    family = [found[1] for key in ("cpu family", "model") if (found := re.search(rf"{key}\s*: (\d+)", text))]
    fast = [flag for flag in ("avx512_bf16", "amx_bf16", "avx512_fp16", "amx_fp16") if f" {flag}" in text]
    name = model[1] if model else platform.processor() or platform.machine()
    return name + (f", family {'/'.join(family)}" if family else "") + (f", {' '.join(fast)}" if fast else "")


def header_of(options):
    run = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "command": " ".join(["python benchmarks/bench.py", *sys.argv[1:]]),
        "commit": run.stdout.strip(),
        "device": device_name(options.device),
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "build": {**apt_ext.ops.build_info(), "torch": torch.__version__},
    }


def measured(jobs, options):
    """(rows, seconds a part, what failed), the JSON written after every case."""
    rows, seconds, failed, header = [], {}, [], header_of(options)
    for part, job, arguments in tqdm(jobs, unit="case"):
        start = time.perf_counter()
        try:
            rows += list(job(*arguments, options.device, options.rounds))
        except Exception as error:  # a peer that cannot run here (no compiler for torch.compile) must not cost the other cases
            failed.append({"part": part, "arguments": [str(a) for a in arguments], "error": f"{type(error).__name__}: {error}"[:500]})
        seconds[part] = round(seconds.get(part, 0.0) + time.perf_counter() - start, 1)
        if options.json:
            text = json.dumps({**header, "seconds": seconds, "failed": failed, "rows": rows}, indent=1)
            options.json.write_text(text + "\n")
    return rows, seconds, failed


def plot(rows, path):
    """Bars of every layer row: one panel a work, one group a shape and rank, one bar a peer. Eager calls of small layers on a GPU, which
    are host time alone, are left out."""
    from matplotlib.figure import Figure

    layers = [row for row in rows if "forward" in row["work"] and "compiled" not in row["work"]]
    shown = [row for row in layers if row["K"] > 768 or row["M"] < 4096 or "graph" in row["work"]]
    works = list(dict.fromkeys(row["work"] for row in shown))
    figure = Figure(figsize=(11, 2.8 * len(works)), layout="constrained")
    for work, axes in zip(works, figure.subplots(len(works), 1, squeeze=False)[:, 0], strict=True):
        of_work = [row for row in shown if row["work"] == work and row["peer"] != "frozen"]
        peers = list(dict.fromkeys(row["peer"] for row in of_work))
        cases = list(dict.fromkeys((row["M"], row["N"], row["K"], row["rank"]) for row in of_work))
        for i, peer in enumerate(peers):
            values = {(r["M"], r["N"], r["K"], r["rank"]): r["ratio"] for r in of_work if r["peer"] == peer}
            places = [j + (i - (len(peers) - 1) / 2) * 0.8 / len(peers) for j in range(len(cases))]
            axes.bar(places, [values.get(case, 0) for case in cases], 0.8 / len(peers), label=peer)
        axes.axhline(1, color="0.4", linewidth=0.8)
        axes.set_xticks(range(len(cases)), [f"M {m}, N {n}\nK {k}, r {r}" for m, n, k, r in cases], fontsize="small")
        axes.set(title=work, ylabel="time / frozen GEMM")
        axes.legend(fontsize="x-small", loc="upper left", ncols=len(peers))
        axes.margins(y=0.2)
    figure.savefig(path, dpi=110)


def figure_of(row):
    if "bytes" in row:
        return f"{row['bytes']} bytes"
    if "us" in row:
        return f"{row['us']:6.2f} us" + (f" ({row['low']:.2f}-{row['high']:.2f})" if "low" in row else "")
    return f"{row['ratio']:6.3f} ({row['low']:.3f}-{row['high']:.3f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default=None, help="float32, float16 or bfloat16; default: bfloat16 on cuda, float32 on the CPU")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's own choice")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="the first shape and rank 16 only")
    parts = "layers,graph,compiled,passes,host,host-profile,widths,ranks,merge,memory,mask_grads,compact"
    parser.add_argument("--only", help=f"some of {parts}")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="a PNG of the layers")
    parser.add_argument("--replot", type=Path, help="draw --plot from a kept JSON file and measure nothing")
    parser.add_argument("--report", action="store_true", help="write the figures of the documents, and measure nothing")
    options = parser.parse_args()
    if options.report:
        for document in report.DOCUMENTS:
            document.write_text(report.updated(document.read_text()))
        return
    if options.replot:
        if options.plot is None:
            parser.error("--replot draws --plot FILE, which is missing")
        return plot(json.loads(options.replot.read_text())["rows"], options.plot)
    dtype = getattr(torch, options.dtype or ("bfloat16" if options.device == "cuda" else "float32"))
    torch.manual_seed(0)
    if options.device == "cpu":
        keep_freed_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    jobs = jobs_of(options, dtype)
    rows, seconds, failed = measured(jobs, options)

    print(f"{'work':<24} {'M':>6} {'N':>6} {'K':>6} {'rank':>5}  {'peer':<28} ratio (quartiles)")
    for r in rows:
        size = f"{r['M']:>6} {r['N']:>6} {r['K']:>6} {r['rank']:>5}"
        print(f"{r['work']:<24} {size}  {r['peer']:<28} {figure_of(r)}")
    print("seconds:", ", ".join(f"{part} {value}" for part, value in seconds.items()))
    if options.plot:
        plot(rows, options.plot)
    if failed:
        raise SystemExit("\n".join(f"{f['part']} of {', '.join(f['arguments'])} failed: {f['error']}" for f in failed))


if __name__ == "__main__":
    main()
