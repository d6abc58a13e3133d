"""Speed, memory and size of models, side by side: every figure comes with its spread."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..common.clock import Spread, in_turn, spread
from ..common.memory import peak_memory, resident_memory, restart_peak
from .data import Batch
from .models import class_of, load_stock
from .processes import run_apart

_PROCESSES = 3  # that measure each model's memory on the CPU
_NEW = 32  # tokens of a generation


def around_events(seconds: Sequence[float], events: Sequence[int]) -> dict[str, dict[str, Any] | None]:
    """Sum up the steps "before" the first and "after" the last of these events: median, quartiles and number.

    Steps count from 1, and a step that ends with an event is of neither range. An empty range is None; without events
    all steps are before.
    """
    first, last = (min(events), max(events)) if events else (len(seconds) + 1, len(seconds))
    ranges = {"before": seconds[: max(first - 1, 0)], "after": seconds[last:]}
    return {name: _summed_up(values) if values else None for name, values in ranges.items()}


def _summed_up(seconds: Sequence[float]) -> dict[str, Any]:
    found = spread(seconds)
    return {"steps": len(found.pop("rounds")), **found}


def compared(directories: Mapping[str, Path], batches: list[Batch], device: str, rounds: int) -> dict[str, Any]:
    """Tokens a second (padding does not count) and peak memory of the models in these directories, loaded as stock ones.

    On a CPU in float32, on CUDA in bfloat16. "ratio": the last over the first, round by round. "generated": greedy, with a cache, batch 1,
    for models that generate. Memory: weights and what the batches take, without libraries; on a CPU of a process of its own.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    models = {name: load_stock(directory, dtype) for name, directory in directories.items()}
    inputs = [{name: value.to(device) for name, value in batch.items() if name != "labels"} for batch in batches]
    memory: dict[str, list[float]] = {name: [] for name in models}
    if device == "cuda":
        _cuda_memory(next(iter(models.values())), inputs)  # the first products on a device reserve a workspace for all
    for _ in range(_PROCESSES):
        for name, directory in directories.items():
            if device == "cuda":
                memory[name].append(_cuda_memory(models[name], inputs))
            else:
                plain = [{key: value.tolist() for key, value in batch.items()} for batch in inputs]
                memory[name].append(run_apart(resident_of, directory, plain))
    found = throughput(models, inputs, device, rounds)
    found["peak memory"] = {name: spread(values) for name, values in memory.items()}
    synchronize = _waits_for(device)
    if all(model.can_generate() for model in models.values()):
        start = inputs[0]["input_ids"][:1, :16]
        calls = {name: _generation(model, start) for name, model in models.items()}
        found["generated tokens per second"] = _speeds(calls, _NEW, rounds, synchronize)
    return found


def _waits_for(device: str) -> Callable[[], None]:
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def throughput(models: Mapping[str, Any], inputs: list[Batch], device: str, rounds: int) -> dict[str, Any]:
    """Tokens a second of these models, which are moved to the device, over these inputs, which lie there; and what was measured on."""
    for model in models.values():
        model.to(device)
    tokens = sum(int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel() for batch in inputs)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "dtype": str(next(iter(models.values())).dtype).removeprefix("torch."),
        "batches": [list(batch["input_ids"].shape) for batch in inputs],
        "tokens per second": _speeds({name: _pass(model, inputs) for name, model in models.items()}, tokens, rounds, _waits_for(device)),
    }


def _speeds(calls: Mapping[str, Callable[[], object]], tokens: int, rounds: int, synchronize: Callable[[], None]) -> dict[str, Spread]:
    with torch.no_grad():
        seconds = in_turn(calls, rounds, synchronize)
    first, *_, last = seconds.values()
    found = {name: spread([tokens / one for one in values]) for name, values in seconds.items()}
    return {**found, "ratio": spread([before / after for before, after in zip(first, last, strict=True)])}


def _pass(model: Any, inputs: list[Batch]) -> Callable[[], None]:
    def call() -> None:
        for batch in inputs:
            model(**batch)

    return call


def _generation(model: Any, start: torch.Tensor) -> Callable[[], object]:
    counts = {"max_new_tokens": _NEW, "min_new_tokens": _NEW, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(start, attention_mask=torch.ones_like(start), **counts)


def _cuda_memory(model: Any, inputs: list[Batch]) -> float:
    """The most that is allocated for a model and its pass; the model is back on the CPU afterwards."""
    before = torch.cuda.memory_allocated()
    model.to("cuda")
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        _pass(model, inputs)()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    model.to("cpu")
    return peak


def resident_of(directory: Path, batches: list[dict[str, Any]]) -> float:
    """Bytes of memory that a model and its pass over the batches add to a process that has loaded the libraries. Run it apart."""
    inputs = [{name: torch.tensor(value) for name, value in batch.items()} for batch in batches]
    class_of(directory)  # imports the class
    restart_peak()  # freed memory is given back
    before = resident_memory()
    model = load_stock(directory, torch.float32)
    restart_peak()  # loading is not what is asked for
    with torch.no_grad():
        _pass(model, inputs)()
    return max(peak_memory() - before, 0)  # of a tiny model: the second restart may give back more than it takes


def disk_bytes(directory: Path) -> int:
    """Of all files in a directory."""
    return sum(file.stat().st_size for file in directory.iterdir())


def commit_here() -> str:
    """The git commit of this checkout, with + where files differ from it; without git or a checkout the package's version."""
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(root), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)  # noqa: S603  # git, with words of our own
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD") if (root / ".git").exists() else None
    if not commit:
        return f"apt_ext {__version__}"
    return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
