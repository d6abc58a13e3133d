"""The clock of the benchmarks: calls in turn, and rows of ratios."""

from __future__ import annotations

import ctypes
import functools
import statistics
import time

import torch

try:
    import resource
except ImportError:  # not on Windows
    resource = None


def keep_freed_memory():
    """No trimming and no mapping of single blocks up to 32 MiB, glibc's most. Elsewhere nothing; the page faults of the rows then tell."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD


def page_faults():
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def captured(call, times=10):
    """So many calls in one CUDA graph, so that no host time is left."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return functools.partial(_replay, graph, call)


def _replay(graph, call):
    """`call` is held for what it holds: the graph reads that memory."""
    graph.replay()


class Times(dict):
    """{name: seconds a call, one value a round}, and the page faults a call beside them."""

    def __init__(self, names):
        super().__init__((name, []) for name in names)
        self.faults = {name: [] for name in self}


def measure(peers, rounds, device, inner):
    """The Times of these calls; device events on CUDA, the wall clock on the CPU."""
    times = Times(peers)
    for call in peers.values():
        for _ in range(3):
            call()
    for _ in range(rounds):
        for name, call in peers.items():
            if device == "cuda":
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda._sleep(2_000_000)  # the queue fills while the device sleeps, so host time stays out
                start.record()
                for _ in range(inner):
                    call()
                end.record()
                end.synchronize()
                times[name].append(start.elapsed_time(end) / 1e3 / inner)
            else:
                faults, start = page_faults(), time.perf_counter()
                for _ in range(inner):
                    call()
                times[name].append((time.perf_counter() - start) / inner)
                times.faults[name].append((page_faults() - faults) / inner)
    return times


def rows_of(times, base, **labels):
    """One row a peer: the ratio of medians, and of the quartiles."""
    divisor = statistics.median(times[base])
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        row = {**labels, "peer": name, "ratio": median / divisor, "low": low / divisor, "high": high / divisor, "seconds": median}
        faults = getattr(times, "faults", {}).get(name)
        yield {**row, "faults": statistics.median(faults)} if faults else row


def labels_of(M, N, K, rank, dtype):
    return {"M": M, "N": N, "K": K, "rank": rank, "dtype": str(dtype).removeprefix("torch.")}
