"""Adapters that hand over the channels that are kept, instead of all of them with zeros."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .layer import APTAdapter


class Chain:
    """Writers whose outputs the reader alone reads, through elementwise functions that are finite at 0.

    Open where all of them compute on the same kept channels, fewer than all. Else everything is full-size.
    """

    def __init__(self, writers: list[APTAdapter], reader: APTAdapter) -> None:
        self.writers, self.reader, self.same = writers, reader, False
        for writer in writers:
            writer.packing.chain_out = self
        reader.packing.chain_in = self
        self.compare()

    def compare(self) -> None:
        """Look again, after a change of masks or of who is compacted."""
        kept, writers = self.reader.packing.current, [writer.packing.current for writer in self.writers]
        self.same = kept is not None and all(writer is not None and writer.hands_over(kept) for writer in writers)

    def is_open(self) -> bool:
        """True where kept channels alone are handed over."""
        return self.same and not any(one.merged or one.disabled for one in (*self.writers, self.reader))
