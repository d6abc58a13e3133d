"""What a Controller knows of the blocks of its model: the masks that it gave them, and how they are numbered after cuts."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from ..adapter.carrier import MaskCarrier
from ..model import APTModel
from ..pruning.architectures.lookup import Block, Blocks, origin_of
from ..pruning.block_masks import host_mask, submodule


class BlockRecord:
    """The masks of a model's blocks, on the host, in the numbering of now.

    blocks  all blocks of the model when it was last looked at
    masks   {block: [count]} as the Controller left them
    live    {block: [count] bool}: what may still be kept, since the last event
    """

    def __init__(self, model: APTModel) -> None:
        self._model, self._pruned = model, Blocks(model.blocks.row)
        self.blocks, self._origin = model.blocks, origin_of(model.model, model.blocks)
        self.masks = {name: model.get_block_mask(name).cpu() for name in self.blocks}
        self.note_live()

    @property
    def pruned(self) -> Blocks:
        """The blocks that are pruned, as they are now."""
        return self._pruned

    def prune(self, names: Collection[str]) -> None:
        """Take these for the blocks that are pruned."""
        self._pruned = Blocks(self.blocks.row, {name: self.blocks[name] for name in names}, self.blocks.origin)

    def note_live(self) -> None:
        """What has a mask of 0 now stays out."""
        self.live = {name: mask != 0 for name, mask in self.masks.items()}

    def let_take_part(self, active: bool) -> None:
        """While one of the masks that are pruned moves, let all of them take part in the arithmetic on a device, ones as well.

        From step to step other masks begin to move: the arithmetic stays the same meanwhile, and so does a graph that was captured of it.
        """
        moving = active and any(bool((self.masks[name] != 1).any()) for name in self._pruned)
        for name in {side.module for block in self._pruned.values() for side in block.sides if side.acts}:
            carrier = submodule(self._model.model, name)
            if isinstance(carrier, MaskCarrier):
                carrier.placed.moving = moving

    def everything_is_kept(self) -> bool:
        """Whether there is nothing that is out."""
        return all(bool(live.all()) for live in self.live.values())

    def follow_cut(self) -> dict[str, Tensor] | None:
        """Take over the numbering of a model that was cut since the last look.

        Returns, of each block as it was numbered, what is left: [count] bool; None where nothing was cut. ValueError where
        the model has something that was not there.
        """
        now = self._model.blocks
        if now is self.blocks or not now:  # there are none after merge_and_unload
            return None
        origin = origin_of(self._model.model, now)
        if origin.counts != self._origin.counts or any(
            bool((origin.left[name] & ~before).any()) for name, before in self._origin.left.items()
        ):
            raise ValueError("model: expected the model that this Controller was made for, or what a cut left of it, got another")
        kept = self._origin.within(origin.left)
        self.blocks, self._origin = now, origin
        self.masks = {name: mask[kept[name]] for name, mask in self.masks.items()}
        self.live = {name: live[kept[name]] for name, live in self.live.items()}
        self.prune(self._pruned)
        return None if all(bool(one.all()) for one in kept.values()) else kept

    def counts(self) -> dict[str, int]:
        """{block: entries above 0 of the mask that the model has}; of the own record where a merge has left no blocks."""
        now, inner = self._model.blocks, self._model.model
        masks: Mapping[str, Tensor] = {name: host_mask(inner, block) for name, block in now.items()} or self.masks
        return {name: int(masks[name].count_nonzero()) if name in masks else 0 for name in self.blocks}

    def others(self) -> dict[str, Tensor]:
        """The masks of what is not pruned, which others may set."""
        now: Mapping[str, Block] = self._model.blocks
        return {name: host_mask(self._model.model, block) for name, block in now.items() if name not in self._pruned}

    def original(self, name: str) -> Tensor:
        """Where what is kept of a block was before the first cut, int64 [kept], ascending."""
        blocks, inner = self._model.blocks, self._model.model
        if not blocks and name in self.masks:  # after merge_and_unload
            return self._origin.positions(name)[self.masks[name] != 0]
        mask = host_mask(inner, self._model.block(name))
        return origin_of(inner, blocks).positions(name)[mask != 0]
