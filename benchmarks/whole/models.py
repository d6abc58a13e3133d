"""One model that trains: whole, with PEFT's adapters or with ours."""

from __future__ import annotations

import importlib.metadata

import torch
from peers import peft_model

import apt_ext

RANK, RATE = 8, 1e-4
FORMS = ("dense", "masked", "compact", "chain", "cut")


def stock_model(work, device):
    """Make the stock model in bfloat16, the same one each time."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, work.config)(**work.sizes)
    with torch.device(device):
        return getattr(transformers, work.auto).from_config(config, dtype=torch.bfloat16).train()


def batch_of(work, device):
    """Draw the batch: tokens without padding, and their labels."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, work.sizes["vocab_size"], work.batch, generator=generator)
    labels = tokens if "num_labels" not in work.sizes else tokens[:, 0] % work.sizes["num_labels"]
    return {"input_ids": tokens.to(device), "labels": labels.to(device)}


def apt_model(work, device, dropout=0.0, max_rank=None):
    """Put our adapters into the stock model."""
    config = apt_ext.APTConfig(
        r=RANK,
        lora_dropout=dropout,
        max_rank=max_rank,
        target_modules=work.targets,
        modules_to_save=[],
    )
    return apt_ext.get_apt_model(stock_model(work, device), config)


def mask_half(model, multiple):
    """Prune half of the heads (groups of heads, where they share a key) and of the neurons, at random."""
    generator = torch.Generator().manual_seed(1)
    for name, block in model.blocks.items():
        if block.kind == "hidden":
            continue
        kept = block.count // 2
        if block.kind == "neurons":
            kept = kept // multiple * multiple
        mask = torch.zeros(block.count)
        mask[torch.randperm(block.count, generator=generator)[:kept]] = 1
        model.set_block_mask(name, mask)


def take_form(model, form, multiple):
    """Bring our model into one of FORMS; all but "dense" have half of the heads and neurons."""
    if form != "dense":
        mask_half(model, multiple)
    if form in ("compact", "chain"):
        model.compact(chain=form == "chain")
    if form == "cut":
        model.cut()


def build(kind, work, device, form="dense", dropout=0.0, max_rank=None):
    """Make the model of this kind ("full", "PEFT", "apt_ext"); return it and what trains of it."""
    if kind == "full":
        model = stock_model(work, device)
        return model, list(model.parameters())
    if kind == "PEFT":
        model = peft_model(stock_model(work, device), RANK, work.targets, dropout)
        return model, [parameter for parameter in model.parameters() if parameter.requires_grad]
    model = apt_model(work, device, dropout, max_rank)
    take_form(model, form, work.multiple)
    return model, list(apt_ext.adapter_parameters(model))


def adamw(parameters):
    """Make the optimizer of every run."""
    return torch.optim.AdamW(parameters, lr=RATE, fused=True)


def checkpoint_activations(model):
    """Compute every layer again in the backward instead of keeping what it computed."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name since transformers 5.23
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def apply_liger(device):
    """Put Liger's kernels into transformers' LLaMA, for this process; return their version, or why not."""
    if device.type != "cuda":
        return None, "no CUDA device"
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
    except ImportError as error:
        return None, f"not importable: {error}"
    apply_liger_kernel_to_llama()
    return importlib.metadata.version("liger_kernel"), None
