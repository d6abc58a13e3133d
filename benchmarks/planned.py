"""Whole steps that `plan` predicts, measured: other families and shapes, with and without gradient checkpointing.

    python benchmarks/planned.py [--quick] [--out DIR]

Random weights in bfloat16, adapters of rank 8, fused AdamW, one batch again and again, each step timed alone; dense, and
with half of the heads and neurons of every layer cut. cuDNN's attention is off. Writes planned-h200.json, whose rows
`python benchmarks/bench.py --report` puts beside predictions. --quick is for seeing that it runs: tiny, a CPU will do.
"""

import argparse
import gc
import importlib.metadata
import json
import statistics
import sys
import warnings
from pathlib import Path

import beyond
import torch
from apt_ext.tools.checkout.evidence.training import attention_without_plans

import apt_ext
from apt_ext.common import clock
from apt_ext.tools.measuring import commit_here

WARM, STEPS = 2, 6
LLAMA = {"num_hidden_layers": 22, "hidden_size": 2048, "intermediate_size": 5632, "vocab_size": 32000}
LLAMA |= {"num_attention_heads": 32, "num_key_value_heads": 4}
QWEN = {"num_hidden_layers": 28, "hidden_size": 1536, "intermediate_size": 8960, "vocab_size": 151936}
QWEN |= {"num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True}
MISTRAL = {"num_hidden_layers": 16, "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 32000}
MISTRAL |= {"num_attention_heads": 32, "num_key_value_heads": 8}
BASE = {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "vocab_size": 50265}
BASE |= {"max_position_embeddings": 514, "type_vocab_size": 1, "num_labels": 3}
LARGE = {**BASE, "num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
WORKS = (  # name, kind, sizes, batch, gradient checkpointing, half cut or not
    ("LLaMA-1.1B", "Llama", LLAMA, (8, 2048), False, (False, True)),
    ("LLaMA-1.1B", "Llama", LLAMA, (8, 2048), True, (False, True)),
    ("LLaMA-1.1B", "Llama", LLAMA, (2, 4096), False, (False,)),
    ("Qwen2-1.5B", "Qwen2", QWEN, (4, 1024), False, (False, True)),
    ("Qwen2-1.5B", "Qwen2", QWEN, (4, 1024), True, (False,)),
    ("Mistral, 16 layers", "Mistral", MISTRAL, (4, 2048), False, (False, True)),
    ("RoBERTa-large", "Roberta", LARGE, (64, 256), False, (False, True)),
    ("RoBERTa-large", "Roberta", LARGE, (64, 256), True, (False,)),
    ("RoBERTa-base", "Roberta", BASE, (32, 128), False, (False, True)),
)
SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 96}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def measured(kind, sizes, batch, checkpointing, half, device):
    """Train a few steps; return the median of their seconds, and GiB at the peak where there is a GPU."""
    cuda = device.type == "cuda"
    model = apt_ext.get_apt_model(beyond.stock(kind, sizes, device), apt_ext.APTConfig(r=beyond.RANK)).train()
    if half:
        for name, block in model.blocks.items():
            model.set_block_mask(name, (torch.arange(block.count) < beyond.half(block)).float().to(device))
        model.cut()
    if checkpointing:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # its name changes in transformers 6
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(apt_ext.adapter_parameters(model), lr=1e-4, fused=True)
    tokens = torch.randint(5, min(sizes["vocab_size"], 30000), batch, device=device)
    labels = tokens if beyond.is_decoder(kind) else torch.zeros(batch[0], dtype=torch.long, device=device)

    def step():
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    wait = clock.waiting_for(device)
    for _ in range(WARM):
        step()
    wait()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = statistics.median(clock.seconds(step, wait) for _ in range(STEPS))
    return seconds, torch.cuda.max_memory_allocated(device) / 2**30 if cuda else None


def main():
    """Make every run; one that fails is named and costs no other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: to see that it runs")
    parser.add_argument("--out", type=Path, default=Path(), help="where planned-h200.json goes; default: here")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not (options.quick or device.type == "cuda"):
        parser.error("expected a CUDA device, or --quick")
    rows, failed = [], []
    with attention_without_plans():
        for name, kind, sizes, batch, checkpointing, halves in WORKS:
            if options.quick:
                sizes, batch = sizes | {one: value for one, value in SMALL.items() if one in sizes}, (2, 16)
            for half in halves:
                row = {"model": name, "kind": kind, "sizes": sizes, "batch": list(batch), "liger": False, "mode": "eager"}
                try:
                    seconds, peak = measured(kind, sizes, batch, checkpointing, half, device)
                    rows.append(row | {"checkpointing": checkpointing, "half": half, "seconds": seconds, "peak_gib": peak})
                except Exception as error:
                    failed.append(f"{name}: {type(error).__name__}: {error}"[:500])
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    head = {
        "command": " ".join(["python benchmarks/planned.py", *(word for word in sys.argv[1:] if word == "--quick")]),
        "commit": commit_here(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "versions": {library: importlib.metadata.version(library) for library in ("torch", "transformers")},
        "cudnn_attention": False,
        "dtype": "bfloat16",
        "rank": beyond.RANK,
        "half": "half of the heads and neurons of every layer, cut",
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "planned-h200.json").write_text(json.dumps({**head, "rows": rows, "failed": failed}, indent=1) + "\n")
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
