"""Whole training steps of a user: full fine-tuning, PEFT and apt_ext, eager, compiled, in one CUDA graph.

    python benchmarks/steps.py [--only CASES] [--json FILE] [--smoke]
    python benchmarks/steps.py --report [--json FILE]

Cases:
    roberta  RoBERTa-base's sizes, 32 sequences of 128 tokens
    llama    LLaMA of 1.1 billion parameters, 8 of 2048
    7b       LLaMA-2-7B's sizes, 4 of 2048
    dropout  the first two with a LoRA dropout of 0.05
    friends  torch.compile over models that are masked and cut, gradient checkpointing, LLaMA without Liger
    events   the first two under a Controller: steps before, between and after its events

Random weights in bfloat16, adapters of rank 8 on every linear of a layer, nothing else trains; one batch
again and again, without padding. A step is forward, backward, fused AdamW, zero_grad. "half": half of the
heads and neurons of each layer are pruned, and then masked, compacted, compacted in chains or cut. Peers live
in one process and take turns wherever they fit into memory together; the JSON has every round and the
medians. LLaMA has Liger's kernels in all runs where they are installed. cuDNN's attention is off: it prepares
itself anew for every number of heads, which takes longer than a step.

Each part of a case runs in a process of its own, so that patches and memory do not leak. FILE (steps.json) is
read before and written after each: what is not measured now stays in it. What fails is named there and costs
nothing else. Until a part ends, what it has measured lies beside FILE. --smoke: toy sizes, for a CPU, to see
that everything runs. --report measures nothing: it prints what was to be reached beside what FILE says, by
default the kept benchmarks/results/steps-h200.json.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path

import torch
from apt_ext.tools.checkout.evidence.training import attention_without_plans
from whole import origin, reach, tables
from whole.parts import ALL, PARTS, measure_part

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "benchmarks" / "results" / "steps-h200.json"
LIMIT = 600  # seconds that a part may take


def arguments():
    """Read the command line."""
    some = f"some of {', '.join(PARTS)}, or of their parts"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(PARTS), metavar="CASE", help=some)
    parser.add_argument("--json", type=Path, help="where the figures are kept; default: steps.json")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, a CPU will do")
    parser.add_argument("--report", action="store_true", help="print what was reached, and measure nothing")
    parser.add_argument("--part", choices=ALL, help=argparse.SUPPRESS)  # what the processes are told
    options = parser.parse_args()
    if unknown := [name for name in options.only if name not in PARTS and name not in ALL]:
        known = ", ".join(dict.fromkeys([*PARTS, *ALL]))
        parser.error(f"--only: expected some of {known}, got {', '.join(unknown)}")
    if not (options.report or options.smoke or torch.cuda.is_available()):
        parser.error("expected a CUDA device, or --smoke")
    return options


def read(path):
    """Return what a file of this command holds; an empty one where there is none."""
    return json.loads(path.read_text()) if path.exists() else {"parts": {}}


def write(path, content):
    """Write the file whole: who reads meanwhile finds the one before."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(path)


def run_part(name, smoke, path):
    """Measure one part in this process, and write what is known after each measurement."""
    device = torch.device("cpu" if smoke or not torch.cuda.is_available() else "cuda")
    with attention_without_plans():
        measure_part(name, device, smoke, lambda found: write(path, found))


def in_a_process(name, smoke, path):
    """Measure one part in another process, which keeps it in `path`; return how it ended, None if well."""
    call = [sys.executable, str(Path(__file__)), "--part", name, "--json", str(path), *["--smoke"] * smoke]
    try:
        done = subprocess.run(call, stderr=subprocess.PIPE, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return f"the process was ended after {LIMIT} s"
    words = f"the process ended with {done.returncode}: {done.stderr.strip()[-400:]}"
    return words if done.returncode else None


def part_of(name, smoke, path, start):
    """Measure one part; return what it kept (beside `path`, until then) and whether a signal ended it."""
    beside = path.with_name(f"{path.name}.{name}")
    beside.unlink(missing_ok=True)
    stopped = False
    try:
        words = start(name, smoke, beside)
    except (SystemExit, KeyboardInterrupt):
        stopped, words = True, "ended by a signal"
    found = json.loads(beside.read_text()) if beside.exists() else {"rows": [], "failed": []}
    beside.unlink(missing_ok=True)
    if words:
        found["failed"].append({"group": "", "what": "the whole part", "error": words})
    return found, stopped


def measure(options, start):
    """Measure what was asked for, part by part; return [what failed, in words]."""
    path = options.json or Path("steps.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    failed = []
    for case, name in ((case, name) for case, parts in PARTS.items() for name in parts):
        if not {case, name} & set(options.only):
            continue
        print(name, flush=True)
        part, stopped = part_of(name, options.smoke, path, start)
        part["command"] = f"python benchmarks/steps.py --only {case}" + " --smoke" * options.smoke
        kept = read(path)
        kept["parts"][name] = part
        kept["reach"] = reach.reached(kept["parts"])
        write(path, kept)
        if "model" in part:
            print(origin.words(part))
        print(tables.printed(part), flush=True)
        failed += [f"{name}, {each['what']} failed: {each['error']}" for each in part["failed"]]
        if stopped:
            break
    print(reach.printed(read(path)["parts"]))
    return failed


def main(start=in_a_process):
    """Do what the command line says."""
    options = arguments()
    if options.part:
        run_part(options.part, options.smoke, options.json)
        return
    if options.report:
        print(reach.printed(read(options.json or KEPT)["parts"]))
        return
    if failed := measure(options, start):
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))  # with the process of a part
    main()
