"""Say what memory the copies of compacted weights take where it is nearly that of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from torch import Tensor

from ..common.log import advise

if TYPE_CHECKING:
    from .layer import APTAdapter

_NEARLY_ALL = 0.9  # of the weights' bytes
_unsaid = ContextVar("apt_ext_unsaid", default=False)


@contextmanager
def unsaid() -> Iterator[None]:
    """Say nothing within: somebody who knows more adapters does."""
    token = _unsaid.set(True)
    try:
        yield
    finally:
        _unsaid.reset(token)


def say_second_copy(adapters: Iterable[APTAdapter]) -> None:
    """Log one line where what is kept of these adapters' weights takes nearly as much memory as they do.

    A weight that is in other memory than the copy counts in neither.
    """
    if _unsaid.get():
        return
    copies = weights = 0
    for adapter in adapters:
        kept, weight = adapter.packing.current, adapter.packing.source(adapter)
        packed = None if kept is None else kept.packed
        if packed is not None and weight is not None and weight.device == packed.device:
            copies += _bytes(packed)
            weights += _bytes(weight)
    if copies > _NEARLY_ALL * weights:
        advise(
            "second copy",
            "compact: little or nothing is pruned, so the copy of what is kept takes %s beside the %s of the "
            "frozen weights; compact() after masks are set takes what they keep, and cut() needs no second "
            "copy",
            _in_words(copies),
            _in_words(weights),
        )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _in_words(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"
