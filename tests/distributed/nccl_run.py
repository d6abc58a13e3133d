"""Train a LLaMA under a Controller in two processes, by DDP and by FSDP2: both end with the same model.

    torchrun --nproc-per-node 2 tests/distributed/nccl_run.py [--layers N] [--steps N]

Over NCCL where there is a GPU for each process, else over gloo on the CPU at a tiny size. pytest does not
collect it. It prints a line for each thing that holds; the first one that does not ends it with a traceback.

Steps go through GraphedStep, which runs them eagerly here and says why. Before anything is pruned a step is timed with the batch of one
process, alone and then on all: tokens a second of all over those of one.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
from contextlib import contextmanager

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import apt_ext
from apt_ext.common import clock

LARGE = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "vocab_size": 32000}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "vocab_size": 96}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, MOST_RANK, DENSITY = 4, 8, 0.6
SIDES = ("mask_in", "mask_out")


class Words(logging.Handler):
    """Keep what a logger is told."""

    def __init__(self):
        super().__init__()
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


@contextmanager
def heard():
    """Yield what the logger of the package says within this context."""
    logger, words = logging.getLogger("apt_ext"), Words()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(words)
    try:
        yield words.said
    finally:
        logger.removeHandler(words)
        logger.setLevel(level)


def tell(text):
    """Print on the first rank."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def holds(what, fact, found=""):
    """Say that something holds, or raise."""
    if not fact:
        raise AssertionError(f"rank {dist.get_rank()}: expected: {what}; {found}")
    tell(f"ok  {what}")


# -- the model -----------------------------------------------------------------------------------------------


def stock_config(device, layers):
    """Return the config of a LLaMA with 8 KV groups, or 4 in a tiny one."""
    sizes, groups = (LARGE, 8) if device.type == "cuda" else (TINY, 4)
    return LlamaConfig(**sizes, num_key_value_heads=groups, num_hidden_layers=layers, use_cache=False)


def apt_model(device, layers):
    """Make the model, the same one on every rank; neurons go in as many chunks as there are KV groups."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    stock = LlamaForCausalLM(stock_config(device, layers)).to(device, dtype)
    config = apt_ext.APTConfig(
        r=RANK,
        max_rank=MOST_RANK,
        target_modules=TARGETS,
        prune=["heads", "neurons"],
        density=DENSITY,
        round_to=stock.config.intermediate_size // stock.config.num_key_value_heads,
    )
    return apt_ext.get_apt_model(stock, config).train()


def wrapped(kind, model, device):
    """Wrap the model by DDP or FSDP2."""
    if kind == "DDP":
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in model.modules():
        if type(module).__name__ == "LlamaDecoderLayer":
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


# -- what has to hold ----------------------------------------------------------------------------------------


def check_refused(kind, whole, optimizer, steps):
    """Ask for a physical cut, which no wrapper can follow."""
    what = f"{kind}: shrink='cut' is refused in words, at creation"
    try:
        apt_ext.Controller(whole, optimizer, steps, shrink="cut")
    except (RuntimeError, ValueError) as error:
        names = ("DDP", "DistributedDataParallel", "FSDP", "shard")
        holds(what, "shrink" in str(error) and any(name in str(error) for name in names), error)
        tell(f"    {error}")
    else:
        holds(what, False, "a Controller was made")


def check_said(kind, said):
    """Look for the mode that the Controller chose, and why; the first rank speaks for all."""
    lines = [line for line in said if "compact" in line]
    holds(f"{kind}: the logger says that it compacts", lines or dist.get_rank(), said)
    tell("\n".join(f"    {line}" for line in lines))


def same(value):
    """Whether a tensor, whole, is the same to the bit on all ranks."""
    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
    whole = whole.detach().contiguous()
    if not whole.numel():
        return True
    others = [torch.empty_like(whole) for _ in range(dist.get_world_size())]
    dist.all_gather(others, whole)
    return all(torch.equal(whole.view(torch.uint8), other.view(torch.uint8)) for other in others)


def check_same(kind, model, device):
    """Compare masks, ranks and what trains between the ranks."""
    found = dict(apt_ext.adapters(model))
    masks = {f"{name}.{side}": getattr(adapter, side) for name, adapter in found.items() for side in SIDES}
    other = [name for name, mask in masks.items() if not same(mask)]
    holds(f"{kind}: {len(masks)} masks are the same on all ranks", masks and not other, other)
    ranks = torch.tensor([adapter.rank for adapter in found.values()], device=device)
    holds(f"{kind}: ranks of adapters are the same on all ranks", same(ranks), ranks.tolist())
    free = {name: value for name, value in model.named_parameters() if value.requires_grad}
    other = [name for name, value in free.items() if not same(value)]
    holds(f"{kind}: {len(free)} trainable Parameters are the same on all ranks", free and not other, other)


def check_pruned(kind, model, controller):
    """Whether there was something to agree on: the density is reached and ranks grew."""
    kept, config = controller.history[-1]["kept"], model.config
    heads, neurons = kept["0.heads"], kept["0.neurons"]
    most = max(adapter.rank for _, adapter in apt_ext.adapters(model))
    pruned = heads < config.num_key_value_heads and neurons < config.intermediate_size
    done = controller.done and controller.density <= DENSITY and pruned and most > RANK
    what = f"pruned to {controller.density:.4f} ({heads} KV groups, {neurons} neurons), ranks up to {most}"
    holds(f"{kind}: {what}", done, controller.history[-1])


def check_export(model):
    """Export from the first rank alone, and load it as stock transformers does."""
    if dist.get_rank() == 0:
        with tempfile.TemporaryDirectory() as place:
            apt_ext.export(model, f"{place}/model")
            loaded = AutoModelForCausalLM.from_pretrained(f"{place}/model")
        smaller = loaded.num_parameters() < model.num_parameters()
        holds(f"DDP: the export of rank 0 loads, as {type(loaded).__name__}", smaller)
    dist.barrier()


# -- the run -------------------------------------------------------------------------------------------------


def batches(device, vocabulary):
    """Yield batches without end, others on each rank."""
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    shape = (4, 1024) if device.type == "cuda" else (2, 16)
    while True:
        tokens = torch.randint(vocabulary, shape, generator=generator).to(device)
        yield {"input_ids": tokens, "labels": tokens}


def trained(kind, device, layers, steps, alone):
    """Train under a Controller with its default mode; return the model and the Controller."""
    model = apt_model(device, layers)
    whole = wrapped(kind, model, device)
    optimizer = torch.optim.AdamW(apt_ext.adapter_parameters(model), lr=1e-3, fused=device.type == "cuda")
    check_refused(kind, whole, optimizer, steps)
    schedule = apt_ext.Schedule(start=0.1, end=0.6, events=3)
    with heard() as said:
        controller = apt_ext.Controller(whole, optimizer, steps, schedule=schedule, joint=False)
    check_said(kind, said)

    data = batches(device, model.config.vocab_size)
    with heard() as said:
        graphed = apt_ext.GraphedStep(whole)
        graphed(**next(data))
    optimizer.zero_grad()
    controller.scores.salience.forget()
    eagerly = any("runs eagerly" in line for line in said)
    holds(f"{kind}: GraphedStep runs eagerly, because {graphed.reason}", graphed.reason and (eagerly or dist.get_rank()), said)

    def step():
        graphed(**next(data))
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()

    seconds = [1e3 * clock.seconds(step, clock.waiting_for(device)) for _ in range(steps)]
    first, last = controller.history[0]["step"], controller.history[-1]["step"]
    before, after = statistics.median(seconds[1 : first - 1]), statistics.median(seconds[last:])
    tell(f"{kind}: {before:.1f} ms a step before the first event, {after:.1f} after the last")
    tell(f"{kind}: {dist.get_world_size() * alone / before:.2f} times the tokens a second of one process, before the first event")
    return model, controller


def alone_seconds(device, layers, steps):
    """Return the milliseconds of a step of one process, without a wrapper; all processes run it, one after the other."""
    for rank in range(dist.get_world_size()):
        dist.barrier()
        if rank == dist.get_rank():
            model = apt_model(device, layers)
            optimizer = torch.optim.AdamW(apt_ext.adapter_parameters(model), lr=1e-3, fused=device.type == "cuda")
            data = batches(device, model.config.vocab_size)

            def step(model=model, optimizer=optimizer, data=data):
                model(**next(data)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            seconds = [1e3 * clock.seconds(step, clock.waiting_for(device)) for _ in range(steps)]
    dist.barrier()
    return statistics.median(seconds[1:])


def main():
    """Make the run by DDP and by FSDP2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    local, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= world
    device = torch.device(f"cuda:{local}" if on_gpus else "cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    tell(f"{world} processes, {dist.get_backend()}, torch {torch.__version__}, {options.layers} layers")
    alone = alone_seconds(device, options.layers, options.steps // 4)
    for kind in ("DDP", "FSDP2"):
        model, controller = trained(kind, device, options.layers, options.steps, alone)
        check_pruned(kind, model, controller)
        check_same(kind, model, device)
        if kind == "DDP":
            check_export(model)
        controller.remove()
    tell("all of it holds")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
