"""Time linears that share an input beside the same one by one, on a GPU: layers, whole steps, and launches by name.

`python benchmarks/shared_inputs.py [layers] [llama] [roberta]`; prints JSON lines.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

from apt_ext import _C, APTConfig, adapter_parameters, get_apt_model, ops
from apt_ext.adapter.shared_inputs import sharing

# name: (tokens, K, N of each, rank)
LAYERS = {
    "llama-1.1b q k v": (16384, 2048, (2048, 256, 256), 8),
    "llama-1.1b gate up": (16384, 2048, (5632, 5632), 8),
    "llama-1.1b gate up, r 16": (16384, 2048, (5632, 5632), 16),
    "llama-7b q k v": (8192, 4096, (4096, 4096, 4096), 8),
    "llama-7b gate up": (8192, 4096, (11008, 11008), 8),
    "roberta q k v": (4096, 768, (768, 768, 768), 8),
    "roberta q k v, r 16": (4096, 768, (768, 768, 768), 16),
}


def say(name: str, **values: Any) -> None:
    print(json.dumps({"name": name, **values}), flush=True)


def interleaved(runs: dict[str, Callable[[], None]], repeats: int, each: int) -> dict[str, float]:
    """Medians in milliseconds of `each` calls in a row, the runs taking turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(3):
            run()
    for _ in range(repeats):
        for name, run in runs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(each):
                run()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / each)
    return {name: round(statistics.median(found), 4) for name, found in times.items()}


def graphed(run: Callable[[], None]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def layer_runs(tokens: int, K: int, widths: tuple[int, ...], rank: int, masked: bool, dropout: float) -> dict[str, Callable[[], None]]:
    """Forward and backward of the layers, captured: the time of the device alone."""

    def draw(*size: int, grad: bool = False) -> torch.Tensor:
        return (torch.randn(*size, device="cuda", dtype=torch.bfloat16) / size[-1] ** 0.5).requires_grad_(grad)

    root = draw(tokens, K, grad=True)
    layers: list[Any] = []
    for N in widths:
        mask = torch.ones(N, device="cuda") if masked else None
        layers.append((draw(N, K), None, draw(rank, K, grad=True), draw(N, rank, grad=True), mask, 2.0, dropout))
    grads = [draw(tokens, N) for N in widths]
    leaves = [root, *(layer[i] for layer in layers for i in (2, 3))]

    def shared() -> None:
        x = root.view_as(root)
        outputs = _C.shared_linear(x, layers, False, ops.drawn_rng)
        assert outputs is not None
        torch.autograd.grad([outputs.take(i, x, layer) for i, layer in enumerate(layers)], leaves, grads)

    def alone() -> None:
        x = root.view_as(root)
        y = [ops.apt_linear(x, W, b, A, B, None, mask, s, p) for W, b, A, B, mask, s, p in layers]
        torch.autograd.grad(y, leaves, grads)

    return {"alone": graphed(alone), "shared": graphed(shared)}


def time_layers() -> None:
    for name, shape in LAYERS.items():
        for more, masked, dropout in (("", False, 0.0), (", mask_out", True, 0.0), (", dropout 0.05", False, 0.05)):
            times = interleaved(layer_runs(*shape, masked, dropout), 15, 10)
            ratio = round(times["shared"] / times["alone"], 3)
            say(name + more, **times, ratio=ratio)
            torch.cuda.empty_cache()


def time_step(name: str, model: torch.nn.Module, targets: list[str], batch: dict[str, torch.Tensor], repeats: int, each: int) -> None:
    """Whole eager steps, and the device's time of one by its profiler."""
    apt = get_apt_model(model, APTConfig(r=8, lora_alpha=16, target_modules=targets)).train()
    optimizer = torch.optim.AdamW(adapter_parameters(apt), lr=1e-4, fused=True)

    def step(mode: Any) -> Callable[[], None]:
        def run() -> None:
            with sharing(mode):
                apt(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    runs = {"alone": step("never"), "shared": step("auto")}
    say(name, **interleaved(runs, repeats, each))
    for mode, run in runs.items():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
        rows = profile.key_averages()
        ours = {}
        for row in rows:
            for part in ("apt_low_rank", "apt_shared_down", "apt_shared_up", "apt_token_sums", "apt_shared_token_sums", "apt_add_spans"):
                if part in row.key:
                    ours[part] = [
                        round(ours.get(part, [0, 0])[0] + row.self_device_time_total / 1e3, 2),
                        ours.get(part, [0, 0])[1] + row.count,
                    ]
        total = round(sum(row.self_device_time_total for row in rows) / 1e3, 2)
        peak = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        say(f"{name}, {mode}", device_ms=total, launches=sum(row.count for row in rows), peak_GiB=peak, **ours)


def main() -> None:
    asked = sys.argv[1:] or ["layers", "llama", "roberta"]
    torch.backends.cuda.enable_cudnn_sdp(False)
    if "layers" in asked:
        time_layers()
    from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForSequenceClassification

    if "roberta" in asked:
        config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=3)
        with torch.device("cuda"):
            model = RobertaForSequenceClassification(config).to(torch.bfloat16)
        batch = {
            "input_ids": torch.randint(5, 50000, (32, 128), device="cuda"),
            "labels": torch.randint(0, 3, (32,), device="cuda"),
        }
        targets = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
        time_step("roberta-base step", model, targets, batch, 10, 5)
    if "llama" in asked:
        sizes = {"hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4}
        with torch.device("cuda"):
            config = LlamaConfig(**sizes, intermediate_size=5632, vocab_size=32000, use_cache=False)
            model = LlamaForCausalLM(config).to(torch.bfloat16)
        ids = torch.randint(0, 32000, (8, 2048), device="cuda")
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        time_step("llama-1.1b step", model, targets, {"input_ids": ids, "labels": ids}, 6, 1)


if __name__ == "__main__":
    main()
