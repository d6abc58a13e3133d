"""Steps that are predicted, not run: beside those that were measured, and of a 70B on many GPUs.

python benchmarks/bench.py --report
"""

from __future__ import annotations

import json
from functools import cache

import torch

from apt_ext import APTConfig
from apt_ext.method.prediction.prediction import asked, predicted, subject_of
from apt_ext.method.prediction.rates import known
from apt_ext.pruning.cut import lanes_for, parameter_changes
from apt_ext.wrapping.build import match

RANK = 8
SEVENTY = {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
SETTINGS = (  # GPUs, sharding, sequences of one GPU, gradient checkpointing
    (8, "ddp", 1, False),
    (8, "ddp", 1, True),
    (8, "fsdp", 1, False),
    (8, "fsdp", 4, True),
    (64, "fsdp", 1, False),
    (64, "fsdp", 4, True),
)
UNITS = {
    "memory": (2**30, "GiB"),
    "workspace": (2**20, "MiB"),
    "matmul": (1e12, "TFLOP/s"),
    "attention_forward": (1e12, "TFLOP/s"),
    "attention_backward": (1e12, "TFLOP/s"),
    "dropped_forward": (1e12, "TFLOP/s"),
    "dropped_backward": (1e12, "TFLOP/s"),
    "bandwidth": (1e12, "TB/s"),
    "unvectorised": (1e9, "billion entries/s"),
    "low_rank": (1e12, "TB/s"),
    "token_sums": (1e12, "TB/s"),
    "kernel": (1e-6, "us"),
    "launch": (1e-6, "us"),
    "recompute": (1e-3, "ms"),
    "gpus_per_node": (1, "GPUs"),
    "link": (1e9, "GB/s"),
    "network": (1e9, "GB/s"),
}


def is_decoder(kind):
    """Say whether models of this kind make tokens."""
    return kind != "Roberta"


def stock(kind, sizes, device):
    """Make a stock model of random weights in bfloat16."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**({"use_cache": False} if is_decoder(kind) else {}) | sizes)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return getattr(transformers, f"{kind}{'ForCausalLM' if is_decoder(kind) else 'ForSequenceClassification'}")(config)
    finally:
        torch.set_default_dtype(torch.float32)


def half(block):
    """Half of a block's heads or neurons, these in groups of 64; all of the residual stream."""
    if block.kind == "hidden":
        return block.count
    return max(1, block.count // 2) if block.kind == "heads" else max(block.count // 2 // 64 * 64, 1)


def steps(sizes, batch, length, kind="Llama", **step):
    """Predict a step of a model of these sizes, and of it with half of its heads and neurons cut, as plan does."""
    how = asked(**{"gpus": 1, "sharding": None, "liger": False, "checkpointing": False, "rates": None} | step, batch=batch)
    return predicted(_halved(kind, json.dumps(sizes)), how, batch, length)


@cache
def _halved(kind, sizes):
    """Read off a model without values what a prediction needs of it, whole and with half of it cut."""
    model, config = stock(kind, json.loads(sizes), "meta"), APTConfig(r=RANK)
    found = match(model, config)
    kept = {name: torch.arange(block.count) < half(block) for name, block in found.blocks.items()}
    changes = parameter_changes(model, lanes_for(model, found.blocks, kept))
    return subject_of(model, config, found.blocks, found.ranks, found.saved, changes)


def compared(row):
    """Predict what a kept row measured: its seconds and GiB at the peak."""
    batch, length = row["batch"]
    step = steps(row["sizes"], batch, length, row["kind"], liger=row["liger"], checkpointing=row["checkpointing"])
    step = step.target if row["half"] else step.dense
    return step.seconds[row["mode"]], step.peak / 2**30


def checked(rows):
    """Lines of what was measured, and of what is predicted without having been run."""
    lines = []
    for row in rows:
        seconds, peak = compared(row)
        batch, length = row["batch"]
        where = ", ".join(
            [
                f"{batch} x {length}",
                *["Liger"] * row["liger"],
                *["checkpointing"] * row["checkpointing"],
                {"eager": "eager", "graph": "one graph"}[row["mode"]],
            ]
        )
        found, ms = row["peak_gib"], 1e3 * row["seconds"]
        memory = ["", "", ""] if found is None else [f"{found:.1f}", f"{peak:.1f}", f"{peak / found:.2f}"]
        name = row["model"] + (", half cut" if row["half"] else "")
        lines.append([name, where, f"{ms:.3g}", f"{1e3 * seconds:.3g}", f"{seconds / row['seconds']:.2f}", *memory])
    return ["", "", "ms", "predicted", "ratio", "GiB", "predicted", "ratio"], lines


def seventy():
    """Lines of a step of LLaMA-2-70B's and LLaMA-3-70B's shapes, with Liger's kernels and sequences of 4,096 tokens."""
    lines = []
    for vocabulary in (32000, 128256):
        for gpus, sharding, batch, checkpointing in SETTINGS:
            found = steps(
                SEVENTY | {"vocab_size": vocabulary}, batch, 4096, gpus=gpus, sharding=sharding, liger=True, checkpointing=checkpointing
            )
            how = f"{gpus}, {sharding}, {batch}" + (", checkpointing" if checkpointing else "")
            lines.append([f"{vocabulary:,}", how, *_cells(found.dense), *_cells(found.target)])
    head = ["vocabulary", "GPUs, sharding, sequences of each", "GiB a GPU", "s a step", "tokens a second"]
    return [*head, *(f"half cut: {name}" for name in head[2:])], lines


def _cells(step):
    peak = f"{step.peak / 2**30:.0f}"
    if step.refused:
        return [peak, "refused", "-"]
    return [peak, f"{step.seconds['eager']:.2f}", f"{step.tokens_per_second:,.0f}"]


def refusal():
    """Say in words why eight GPUs cannot train the smaller of the two by DDP."""
    return steps(SEVENTY | {"vocab_size": 32000}, 1, 4096, gpus=8, sharding="ddp", liger=True).dense.refused


def rates():
    """Lines of the H200's rates, and where each comes from."""
    lines = []
    for name, entry in known()["H200"].items():
        scale, unit = UNITS[name]
        lines.append([f"`{name}`", f"{entry['value'] / scale:.4g} {unit}", entry["from"]])
    return ["rate", "", "from"], lines
