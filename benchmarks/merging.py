"""merge_and_unload beside PEFT's, and export by its phases, of LLaMA with random weights in bfloat16.

    python benchmarks/merging.py merge|export SIZE [--half] [--layers N] [--rounds N] [--out DIR]

SIZE is 1.1b, 7b, or tiny, for which a CPU will do; adapters of rank 8 are on every linear of a layer. `merge`:
PEFT's model and ours are made anew and merged in turn, ours also with half of all heads and neurons masked;
every merge is timed alone, the device idle before and after it, with the most memory that it has beside the
model. `export`: one export into --out (masks as --half says), with the seconds of each part, and of writing and
syncing as many bytes of one plain file. Parts overlap: the process that loads starts first and imports
meanwhile, and hashing goes on while it loads. The JSON merging-SIZE.json or export-SIZE.json holds all.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import shutil
import sys
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
import transformers
from peers import peft_model

import apt_ext
from apt_ext.common.clock import seconds, spread, waiting_for
from apt_ext.exporting import directories, reload
from apt_ext.storage import atomic_dir
from apt_ext.tools.measuring import commit_here

RANK = 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = {  # layers, hidden, neurons, heads, groups of heads, vocabulary
    "tiny": (2, 64, 96, 4, 2, 128),
    "1.1b": (22, 2048, 5632, 32, 4, 32000),
    "7b": (32, 4096, 11008, 32, 32, 32000),
}
RUNS = ("PEFT", "apt_ext", "apt_ext, half masked")
PARTS = ((directories, ("shrink", "save_stock", "probe")), (atomic_dir, ("seal",)), (reload, ("digests",)))


def stock_model(size, layers, device):
    """Make the stock model, the same one each time."""
    depth, hidden, neurons, heads, groups, words = SIZES[size]
    config = transformers.LlamaConfig(
        num_hidden_layers=layers or depth,
        hidden_size=hidden,
        intermediate_size=neurons,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=words,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def model_of(run, size, layers, device):
    """Put the adapters of a run into the stock model, with values that change it."""
    stock = stock_model(size, layers, device)
    if run == "PEFT":
        model = peft_model(stock, RANK, TARGETS)
    else:
        model = apt_ext.get_apt_model(stock, apt_ext.APTConfig(r=RANK, target_modules=TARGETS))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and parameter.numel():
                parameter.normal_(std=0.01)
    if run.endswith("masked"):
        for name, block in model.blocks.items():
            if block.kind != "hidden":
                model.set_block_mask(name, (torch.arange(block.count) < block.count // 2).float())
    return model


# -- merge ---------------------------------------------------------------------------------------------------


def merged(model, device):
    """Merge a model; return the seconds, and the most bytes allocated meanwhile beside what there was."""
    gc.collect()  # of models before
    if device.type != "cuda":
        return seconds(model.merge_and_unload, lambda: None), None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    spent = seconds(model.merge_and_unload, waiting_for(device))
    return spent, torch.cuda.max_memory_allocated(device) - before


def merges(options, device):
    """Merge the models of all runs in turn, one at a time, once more than is counted."""
    found = {run: [] for run in RUNS}
    for turn in range(options.rounds + 1):
        for run in RUNS:
            one = merged(model_of(run, options.size, options.layers, device), device)
            if turn:  # the first one loads kernels
                found[run].append(one)
    runs = {run: {"seconds": spread([spent for spent, _ in several]), "beside": several[-1][1]} for run, several in found.items()}
    peft = runs["PEFT"]["seconds"]["median"]
    for run, one in runs.items():
        one["over PEFT"] = one["seconds"]["median"] / peft
        beside = "" if one["beside"] is None else f", {one['beside'] / 2**20:.1f} MiB beside the model"
        median = 1e3 * one["seconds"]["median"]
        print(f"{run:<22} {median:9.1f} ms, {one['over PEFT']:.2f} of PEFT's{beside}")
    return {"runs": runs}


# -- export --------------------------------------------------------------------------------------------------


def say(line):
    """Write a line at once: what is stopped has said how far it came."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@contextmanager
def timed_parts(parts):
    """Within this context the seconds of each part of an export are added up in `parts`."""

    def timed(name, function):
        def call(*arguments, **options):
            begun = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                spent = time.perf_counter() - begun
                parts[name] += spent
                say(f"  {name:<38} {spent:8.2f} s")

        return call

    start = directories.started

    @contextmanager
    def started(kind):
        with start(kind) as reloaded:

            def answered(*arguments):
                answer = timed("fresh process, from when it is told", reloaded)(*arguments)
                for part, spent in answer.get("seconds", {}).items():
                    parts[f"fresh process: {part}"] += spent
                    say(f"    of it {part:<32} {spent:8.2f} s")
                return answer

            yield answered

    replaced = [(module, name) for module, names in PARTS for name in names]
    with mock.patch.object(directories, "started", started), ExitStack() as stack:
        for module, name in replaced:
            stack.enter_context(mock.patch.object(module, name, timed(name, getattr(module, name))))
        yield


def written(path, count):
    """Write and sync a plain file of so many bytes; return the seconds."""
    block = os.urandom(1 << 20) * 64
    begun = time.perf_counter()
    with path.open("wb") as file:
        for start in range(0, count, len(block)):
            file.write(block[: count - start])
        file.flush()
        os.fsync(file.fileno())
    spent = time.perf_counter() - begun
    path.unlink()
    return spent


def export(options, device):
    """Export a model once."""
    model = model_of(RUNS[2] if options.half else RUNS[1], options.size, options.layers, device)
    directory = options.out / f"exported-{options.size}"
    shutil.rmtree(directory, ignore_errors=True)
    parts = defaultdict(float)
    with timed_parts(parts):
        spent = seconds(lambda: apt_ext.export(model, directory), waiting_for(device))
    count = sum(file.stat().st_size for file in directory.iterdir())
    shutil.rmtree(directory)
    plain = written(options.out / "plain", count)
    print(f"export of {count / 1e9:.2f} GB: {spent:.2f} s; the same bytes as one plain file: {plain:.2f} s")
    return {"bytes": count, "seconds": spent, "plain file": plain, "parts": dict(parts), "half": options.half}


# -- both ----------------------------------------------------------------------------------------------------


def arguments():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["merge", "export"])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--half", action="store_true", help="export: with half of heads and neurons masked")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--rounds", type=int, default=5, help="merges of each that count; default: 5")
    parser.add_argument("--out", type=Path, default=Path(), help="where files go; default: here")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"rounds: expected at least 1, got {options.rounds}")
    return options


def main():
    """Measure, print, and keep the JSON."""
    options = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    head = {
        "command": " ".join(["python benchmarks/merging.py", *sys.argv[1:]]),
        "commit": commit_here(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
        "size": options.size,
        "layers": options.layers or SIZES[options.size][0],
        "dtype": "bfloat16",
        "rank": RANK,
    }
    print(f"LLaMA, {options.size}, {head['layers']} layers, {head['device']}, commit {head['commit']}", flush=True)
    found = merges(options, device) if options.what == "merge" else export(options, device)
    path = options.out / f"{'merging' if options.what == 'merge' else 'export'}-{options.size}.json"
    path.write_text(json.dumps({**head, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
