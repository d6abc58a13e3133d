"""Attention masks of transformers in a graph: none is made for a batch without padding, as none is in the eager step.

While a stream is captured transformers cannot ask whether anything is masked, and makes a mask always, which takes slower kernels. The
eager step that comes before a capture shows what it makes for a batch of this shape; where that was nothing at all, the graph makes
nothing. `AttentionMaskInterface.register` is transformers' own way to say so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_NAME = "sdpa"  # of the attention whose kernels depend on whether there is a mask


class MaskWatch:
    """What transformers makes of the attention masks of one kind of batch.

    made    whether a mask was made in the eager step; None before it
    """

    def __init__(self, batch: Mapping[str, Any], padded: bool) -> None:
        # Without a mask, transformers looks in the positions for several sequences in a row: that depends on their values.
        packed = batch.get("position_ids") is not None
        self._may_skip = not padded and not packed
        self.made: bool | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note whether a mask is made meanwhile."""

        def watched(original: Callable[..., Any]) -> Callable[..., Any]:
            def make(*args: Any, **kwargs: Any) -> Any:
                mask = original(*args, **kwargs)
                self.made = self.made or mask is not None
                return mask

            return make

        with _replaced(watched) as there:
            self.made = False if there else None
            yield

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Make no mask meanwhile, if none was made in the eager step and no value of the batch can change that."""
        if not self._may_skip or self.made is not False:
            yield
            return
        with _replaced(lambda original: _no_mask):
            yield


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


@contextmanager
def _replaced(change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[bool]:
    """Put a changed function in the place of the one that makes masks; False where transformers is not loaded or has none."""
    module = sys.modules.get("transformers.masking_utils")
    interface = getattr(module, "AttentionMaskInterface", None)
    known = getattr(module, "ALL_MASK_ATTENTION_FUNCTIONS", {})
    if interface is None or _NAME not in known:
        yield False
        return
    original = known[_NAME]
    interface.register(_NAME, change(original))
    try:
        yield True
    finally:
        interface.register(_NAME, original)
