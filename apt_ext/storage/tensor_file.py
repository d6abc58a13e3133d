"""Read a safetensors file into memory: verify its size and hash, then let safetensors parse it.

No mapping: a file that shrinks meanwhile is an error and not the end of the process.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import atomic_dir

_MOST_TEXT = 1 << 20  # bytes of a header beside its entries
_ENTRY = 300  # bytes of an entry beside its name
_WIDEST = 8  # bytes of a value, at most


def read(file: atomic_dir.Sealed, expected: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the tensors of `file` by name.

    expected  {name: values}: the tensors that may be in it, and how many values each has at most; a larger file is not read

    ValueError unless the content is what the manifest says and is a safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    most = _MOST_TEXT + sum(len(name.encode()) + _ENTRY + _WIDEST * count for name, count in expected.items())
    if file.size > most:
        raise ValueError(f"expected at most the {most} bytes that this model explains, got {file.size}")
    data = file.read(file.size)
    file.done()
    if data[8:9] != b"{":
        raise ValueError("expected a safetensors header, which begins with '{'")
    try:
        with torch.device("cpu"):  # whatever the default device is
            tensors = load(data)
    except (SafetensorError, KeyError, RuntimeError) as error:  # a dtype or a size that torch does not have
        raise ValueError(f"expected a safetensors file, got another: {error}") from None
    for name, tensor in tensors.items():
        if tensor.dtype is torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
            raise ValueError(f"{name}: expected bytes of 0 and 1 for its dtype bool, got others")
    return tensors
