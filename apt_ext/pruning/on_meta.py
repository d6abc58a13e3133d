"""A model without values, in which shapes are tried at no cost."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .architectures.lookup import is_encoder_decoder

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def on_meta(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode with no values, and with no hooks but transformers' own."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        twin: Tensor = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(twin, requires_grad=False) if isinstance(tensor, nn.Parameter) else twin
    return copy.deepcopy(model, memo | stock_hooks(model)).eval()


def stock_hooks(model: nn.Module) -> dict[int, Any]:
    """What `copy.deepcopy` has to be told, as its memo, to take of all hooks transformers' own alone."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for hooks in (getattr(module, name) for name in _HOOKS):
            own = {key: hook for key, hook in hooks.items() if getattr(hook, "__module__", "").startswith("transformers.")}
            memo[id(hooks)] = type(hooks)(own)
    return memo


def inputs_for(model: nn.Module, batch: int = 1, length: int = 8) -> dict[str, Tensor]:
    """What the model can be called with by its config: token ids [batch, length], for two stacks if it has them, or images."""
    config = getattr(model, "config", None)
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        sizes = getattr(config, "image_size", 32)
        height, width = sizes if isinstance(sizes, list | tuple) else (sizes, sizes)
        return {"pixel_values": torch.zeros(batch, getattr(config, "num_channels", 3), height, width, device="meta")}
    tokens = torch.zeros(batch, length, dtype=torch.long, device="meta")
    return {"input_ids": tokens} | ({"decoder_input_ids": tokens} if is_encoder_decoder(model) else {})


def positions(model: nn.Module) -> int | None:
    """The longest sequence that the model has positions for; None where its config names no most."""
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(most, int):
        return None
    tables = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "position_embeddings"]
    taken = [table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None]  # RoBERTa's begin behind it
    return most - max(taken, default=0)
