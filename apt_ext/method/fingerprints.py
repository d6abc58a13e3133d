"""Notice that somebody wrote into weights that two models share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..distributed.dtensor import is_sharded

_CHUNK = 1 << 22  # entries that are added up at once: int64 copies of them take 32 MiB
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class SharedWeights:
    """The contents of `tensors` as they are now, remembered as sums of their bits.

    Remembering reads every tensor once. Checking reads a tensor only where its version counter has moved
    since.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        local = {name: _local(tensor) for name, tensor in tensors.items()}
        held = {name: tensor for name, tensor in local.items() if not tensor.is_meta}
        self._seen = {name: (tensor, _version(tensor), _sums(tensor)) for name, tensor in held.items()}

    def written(self) -> str | None:
        """Return the name of the first tensor whose contents are others now, or None.

        What was written and then restored bitwise is not named.
        """
        for name, (tensor, version, sums) in self._seen.items():
            now = _version(tensor)
            if now is not None and now == version:
                continue
            if not torch.equal(_sums(tensor), sums):
                return name
            self._seen[name] = tensor, now, sums
        return None


def _local(tensor: Tensor) -> Tensor:
    """The same memory without a graph; of a DTensor the part on this rank."""
    tensor = tensor.detach()
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _version(tensor: Tensor) -> int | None:
    """None for a tensor that was made in inference mode, which counts no versions."""
    return None if tensor.is_inference() else tensor._version


def _sums(tensor: Tensor) -> Tensor:
    """Sum the bits of the entries that lie in memory, for each chunk: int64 [chunks], on the tensor's device."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:  # one entry that is read everywhere
            tensor = tensor.narrow(dim, 0, 1)
    strides = tensor.stride()
    in_memory = tensor.permute(sorted(range(tensor.dim()), key=lambda dim: strides[dim], reverse=True))
    words = in_memory.reshape(-1).view(_WORDS[tensor.element_size()])
    sums = [chunk.sum(dtype=torch.int64) for chunk in torch.split(words, _CHUNK)]
    return torch.stack(sums) if sums else words.new_zeros(0, dtype=torch.int64)
