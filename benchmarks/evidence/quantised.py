"""Widen weights that are kept as GGUF files quantise them, in blocks of 32 along the input."""

from __future__ import annotations

import torch
from torch import Tensor

# Of one block: a half scale, for Q4_1 a half minimum, then the integers.
BYTES = {"Q4_1": 20, "Q8_0": 34}


def dequantised(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return {name: float32} of {name or name + ".Q4_1" or name + ".Q8_0": tensor}."""
    found = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        if kind in BYTES:
            found[stem] = widened(tensor, kind)
        else:
            found[name] = tensor.float() if tensor.is_floating_point() else tensor
    return found


def widened(raw: Tensor, kind: str) -> Tensor:
    """Widen [rows, blocks * bytes of a block] uint8 to [rows, 32 * blocks] float32."""
    blocks = raw.view(len(raw), -1, BYTES[kind])
    scale = blocks[..., :2].contiguous().view(torch.float16).float()
    if kind == "Q8_0":
        values = blocks[..., 2:].contiguous().view(torch.int8).float() * scale
    else:
        least = blocks[..., 2:4].contiguous().view(torch.float16).float()
        nibbles = blocks[..., 4:]
        values = torch.cat([nibbles & 15, nibbles >> 4], -1).float() * scale + least
    return values.reshape(len(raw), -1)
