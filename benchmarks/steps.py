"""Whole training steps beside PEFT: time and peak memory of a model that shrinks while it trains.

    python benchmarks/steps.py llama|roberta [--layers N] [--quick] [--only RUNS] [--out DIR]

LLaMA of 1.1 billion parameters, 8 sequences of 2048 tokens, or RoBERTa-base, 32 of 128. Random weights in
bfloat16, adapters of rank 8 on every linear of a layer, nothing else trains; fused AdamW; one batch again
and again. One model at a time: PEFT, apt_ext with nothing pruned, apt_ext under a Controller that prunes
half of all heads and neurons in four events, once with its default `shrink` and once with "compact", and
PEFT again.

Ratios are to both runs of PEFT. Every step is timed alone, with the device idle before and after it; the
peak is the allocator's within these steps. LLaMA has Liger's kernels in all runs where they are installed.
cuDNN's attention is off: it prepares itself anew for every number of heads, which takes longer than a step.
--quick is for seeing that it runs: tiny sizes, a CPU will do.
"""

import argparse
import gc
import importlib.metadata
import json
import statistics
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import transformers
from apt_ext.tools.checkout.evidence.training import attention_without_plans
from peers import peft_model

import apt_ext
from apt_ext.common import clock
from apt_ext.common.clock import spread
from apt_ext.tools.measuring import commit_here

RANK, RATE, EVENTS, BETWEEN, WINDOW = 8, 1e-4, 4, 4, 2
RUNS = {
    "peft": "PEFT",
    "dense": "apt_ext",
    "cut": "apt_ext, default shrink",
    "compact": "apt_ext, shrink=compact",
}
AGAIN = "PEFT again"
PARTS = {
    "steps": "",
    "before": ": before the first event",
    "events": ": events",
    "after": ": after the last event",
}


@dataclass(frozen=True)
class Work:
    """Describe what trains, and for how long.

    sizes    of the model's config
    targets  ends of the names of the linears that get an adapter
    batch    sequences and their length
    warm     steps before those that count
    steps    that count, in each part of a run
    density  a little more than half, because norms and biases count and stay
    """

    config: type
    auto: type
    sizes: dict
    targets: list[str]
    batch: tuple[int, int]
    warm: int = 5
    steps: int = 24
    density: float = 0.501

    @property
    def round_to(self):
        """Return how many neurons go at a time: as many chunks as there are heads (KV groups).

        With joint=False kinds keep the same share of their chunks; of like numbers that is half of both.
        """
        heads = self.sizes.get("num_key_value_heads", self.sizes["num_attention_heads"])
        return self.sizes["intermediate_size"] // heads

    def quick(self):
        """Return the same at a size for a CPU."""
        small = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 96}
        small |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        sizes = {name: small.get(name, value) for name, value in self.sizes.items()}
        return replace(self, sizes=sizes, batch=(2, 8), warm=1, steps=3, density=0.52)


WORKS = {
    "llama": Work(
        transformers.LlamaConfig,
        transformers.AutoModelForCausalLM,
        {
            "num_hidden_layers": 22,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "vocab_size": 32000,
            "use_cache": False,
        },
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        (8, 2048),
    ),
    "roberta": Work(
        transformers.RobertaConfig,
        transformers.AutoModelForSequenceClassification,
        {
            "num_hidden_layers": 12,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "vocab_size": 50265,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
            "num_labels": 3,
        },
        ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
        (32, 128),
    ),
}


# -- what runs -----------------------------------------------------------------------------------------------


def stock_model(work, device):
    """Make the stock model, the same one each time."""
    torch.manual_seed(0)
    with torch.device(device):
        return work.auto.from_config(work.config(**work.sizes), dtype=torch.bfloat16).train()


def batch_of(work, device):
    """Draw the batch: tokens without padding, and their labels."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, work.sizes["vocab_size"], work.batch, generator=generator)
    labels = tokens if "num_labels" not in work.sizes else tokens[:, 0] % work.sizes["num_labels"]
    return {"input_ids": tokens.to(device), "labels": labels.to(device)}


def apt_model(work, device):
    """Put our adapters into the stock model."""
    config = apt_ext.APTConfig(r=RANK, target_modules=work.targets, modules_to_save=[])
    return apt_ext.get_apt_model(stock_model(work, device), config)


def adamw(parameters):
    """Make the optimizer of every run."""
    return torch.optim.AdamW(parameters, lr=RATE, fused=True)


def stepper(model, optimizer, batch, controller=None):
    """Return a function that makes one training step."""

    def step():
        model(**batch).loss.backward()
        if controller is not None:
            controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        if controller is not None:
            controller.step()

    return step


def measured(step, warm, steps, device):
    """Make `warm` steps and then `steps` that count; return their seconds and their most bytes allocated."""
    wait = clock.waiting_for(device)
    for _ in range(warm):
        step()
    wait()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = spread([clock.seconds(step, wait) for _ in range(steps)])
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"seconds": seconds, "peak": peak}


def peft_run(work, device):
    """Time the steps of PEFT's model."""
    model = peft_model(stock_model(work, device), RANK, work.targets)
    optimizer = adamw([parameter for parameter in model.parameters() if parameter.requires_grad])
    step = stepper(model, optimizer, batch_of(work, device))
    return {"steps": measured(step, work.warm, work.steps, device)}


def dense_run(work, device):
    """Time the steps of our model with nothing pruned and no Controller."""
    model = apt_model(work, device)
    step = stepper(model, adamw(apt_ext.adapter_parameters(model)), batch_of(work, device))
    return {"steps": measured(step, work.warm, work.steps, device)}


def controlled_run(work, device, **shrink):
    """Time the steps before the first event, up to the last one, and after it."""
    model = apt_model(work, device)
    optimizer = adamw(apt_ext.adapter_parameters(model))
    start, pruning = work.warm + work.steps, EVENTS * BETWEEN
    controller = apt_ext.Controller(
        model,
        optimizer,
        start + pruning + work.warm + work.steps,
        prune=["heads", "neurons"],
        density=work.density,
        round_to=work.round_to,
        joint=False,
        growth=1.0,
        schedule=apt_ext.Schedule(start=start, end=start + pruning, events=EVENTS, window=WINDOW),
        export="per_layer",  # no file is written, so none has to be stock
        **shrink,
    )
    step = stepper(model, optimizer, batch_of(work, device), controller)
    parts = {
        "before": measured(step, work.warm, work.steps, device),
        "events": measured(step, 0, pruning, device),
        "after": measured(step, work.warm, work.steps, device),
    }
    controller.remove()
    history = [{key: event[key] for key in ("step", "density", "kept")} for event in controller.history]
    return {**parts, "history": history}


def run_of(name, work, device):
    """Make one run, and leave no memory behind."""
    compact = partial(controlled_run, shrink="compact")
    calls = {"peft": peft_run, "dense": dense_run, "cut": controlled_run, "compact": compact}
    try:
        return calls[name](work, device)
    finally:
        gc.collect()  # hooks make cycles
        if device.type == "cuda":
            torch.cuda.empty_cache()


# -- what is said --------------------------------------------------------------------------------------------


def parts_of(runs):
    """Yield (run, part, what was measured) of every part that was timed."""
    for run, parts in runs.items():
        yield from ((run, part, parts[part]) for part in PARTS if part in parts)


def of_peft(runs):
    """Return PEFT's median seconds and peak, of both of its runs; (None, None) where it did not run."""
    found = [runs[name]["steps"] for name in (RUNS["peft"], AGAIN) if name in runs]
    if not found:
        return None, None
    peaks = [one["peak"] for one in found if one["peak"] is not None]
    rounds = [seconds for one in found for seconds in one["seconds"]["rounds"]]
    return statistics.median(rounds), statistics.median(peaks) if peaks else None


def over(value, base):
    """Divide, where there is something to divide."""
    return None if value is None or base is None else value / base


def figures(runs):
    """Return {run: its step and its peak over PEFT's}, of its last part."""
    seconds, peak = of_peft(runs)
    last = {run: measure for run, _, measure in parts_of(runs)}
    return {
        run: {"step": over(one["seconds"]["median"], seconds), "peak": over(one["peak"], peak)}
        for run, one in last.items()
        if run not in (RUNS["peft"], AGAIN)
    }


def table(runs):
    """Write what was measured, a line a part."""
    seconds, peak = of_peft(runs)
    lines = [f"{'':<48} {'ms a step (quartiles)':>28} {'/ PEFT':>8} {'peak, GiB':>10} {'/ PEFT':>8}"]
    for run, part, one in parts_of(runs):
        median, low, high = (1e3 * one["seconds"][name] for name in ("median", "low", "high"))
        memory = "" if one["peak"] is None else f"{one['peak'] / 2**30:.2f}"
        ratios = [over(median / 1e3, seconds), over(one["peak"], peak)]
        first, second = ("" if ratio is None else f"{ratio:.3f}" for ratio in ratios)
        spent = f"{median:.2f} ({low:.2f}-{high:.2f})"
        lines.append(f"{run + PARTS[part]:<48} {spent:>28} {first:>8} {memory:>10} {second:>8}")
    for run, parts in runs.items():
        if parts.get("history"):
            last = parts["history"][-1]
            events = ", ".join(str(event["step"]) for event in parts["history"])
            kept = f"density {last['density']:.4f}, kept {left(last['kept'])}"
            lines.append(f"{run}: events at steps {events}; {kept}")
    return "\n".join(lines)


def left(kept):
    """Say how many of each kind stay in the layers."""
    kinds = {}
    for name, number in kept.items():
        layer, _, kind = name.rpartition(".")
        if layer:
            kinds.setdefault(kind, []).append(number)
    ends = {kind: sorted({min(numbers), max(numbers)}) for kind, numbers in kinds.items()}
    return ", ".join(f"{kind} {'-'.join(map(str, numbers))}" for kind, numbers in ends.items())


def liger_kernels(name, device):
    """Put Liger's kernels into transformers' LLaMA; return their version, or None without them."""
    if name != "llama" or device.type != "cuda":
        return None
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
    except ImportError:
        return None
    apply_liger_kernel_to_llama()
    return importlib.metadata.version("liger_kernel")


def header(name, work, device):
    """Describe the run and the machine."""
    libraries = ("torch", "transformers", "peft")
    return {
        "command": " ".join(["python benchmarks/steps.py", *sys.argv[1:]]),
        "commit": commit_here(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "versions": {library: importlib.metadata.version(library) for library in libraries},
        "liger_kernel": liger_kernels(name, device),
        "cudnn_attention": False,
        "model": name,
        "sizes": work.sizes,
        "batch": work.batch,
        "dtype": "bfloat16",
        "rank": RANK,
    }


def words(head):
    """Say in a few lines what the figures hold for."""
    sequences, length = head["batch"]
    sizes = f"{head['model']} of {head['sizes']['num_hidden_layers']} layers, {sequences} x {length} tokens"
    liger = head["liger_kernel"]
    said = "no Liger kernels" if liger is None else f"Liger kernels {liger} in every run"
    where = f"{head['device']}, torch {head['versions']['torch']}, commit {head['commit']}"
    return f"{sizes}, {head['dtype']}\n{where}\n{said}; cuDNN's attention is off"


def arguments():
    """Read the command line; return the options and the names of the runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=WORKS)
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few steps: to see that it runs")
    parser.add_argument("--only", default=",".join(RUNS), help=f"some of {','.join(RUNS)}")
    parser.add_argument("--out", type=Path, default=Path(), help="where steps-MODEL.json goes; default: here")
    options = parser.parse_args()
    asked = options.only.split(",")
    if unknown := [name for name in asked if name not in RUNS]:
        parser.error(f"only: expected some of {', '.join(RUNS)}, got {', '.join(unknown)}")
    if not (options.quick or torch.cuda.is_available()):
        parser.error("expected a CUDA device, or --quick")
    return options, [name for name in RUNS if name in asked] + ["peft"] * ("peft" in asked)


def main():
    """Make every run, the JSON written after each; one that fails is named in it and costs no other."""
    options, names = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = WORKS[options.model].quick() if options.quick else WORKS[options.model]
    if options.layers:
        work = replace(work, sizes=work.sizes | {"num_hidden_layers": options.layers})
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"steps-{options.model}.json"
    head, runs, failed = header(options.model, work, device), {}, {}
    print(words(head), flush=True)
    with attention_without_plans():
        for name in names:
            title = RUNS[name] if RUNS[name] not in runs else AGAIN
            try:
                runs[title] = run_of(name, work, device)
            except Exception as error:
                failed[title] = f"{type(error).__name__}: {error}"[:500]
            found = {**head, "runs": runs, "over PEFT": figures(runs), "failed": failed}
            path.write_text(json.dumps(found, indent=1) + "\n")
    print(table(runs))
    if failed:
        raise SystemExit("\n".join(f"{title} failed: {error}" for title, error in failed.items()))


if __name__ == "__main__":
    main()
