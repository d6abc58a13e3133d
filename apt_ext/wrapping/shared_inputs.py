"""Which adapters of a model read the same input: what the blocks say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from ..adapter.layer import APTAdapter
from ..adapter.shared_inputs import SharedInput
from ..pruning.architectures.lookup import Block
from ..pruning.wrappers import MaskedLinear


def link_shared_inputs(model: nn.Module, blocks: Iterable[Block]) -> None:
    """Let the adapters of these blocks that read the same input share it, and no others of the model.

    Q, K and V of an attention, K and V of one to the encoder, and the projections of a feed-forward layer whose product goes down.
    """
    for module in model.modules():
        if isinstance(module, APTAdapter):
            module.shared = None
    for block in blocks:
        found = [model.get_submodule(name) for name in _readers(block)]
        members = [one for one in found if isinstance(one, APTAdapter) and not isinstance(one, MaskedLinear) and one.shared is None]
        if len(members) > 1:
            SharedInput(members)


def _readers(block: Block) -> Iterator[str]:
    """The names of the linears that read what comes into the block, in the order q, k, v."""
    if block.kind not in ("heads", "neurons"):
        return
    roles = ("k", "v") if block.is_cross else ("q", "k", "v", "up")
    for role in roles:
        for side in block.sides:
            if side.role == role and side.side == "out" and side.of == "linear" and side.acts and side.parts == 1:
                yield side.module
