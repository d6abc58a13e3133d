"""A model for a while without its adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..adapter.layer import APTAdapter
from ..adapter.shared_memory import indexed
from ..pruning.wrappers import StreamCarrier


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """What `APTModel.disable_adapter` promises."""
    found = [module for module in model.modules() if isinstance(module, APTAdapter)]
    entered = [(adapter, adapter.disabled, adapter.merged, adapter.merge.keep) for adapter in found]
    stream = [(module, module.disabled) for module in model.modules() if isinstance(module, StreamCarrier)]
    try:
        with indexed():
            for adapter, _, _, _ in entered:
                adapter.unmerge_weights()
                adapter.set_disabled(True)
        for module, _ in stream:
            module.set_disabled(True)
        yield
    finally:
        for module, disabled in stream:
            module.set_disabled(disabled)
        for adapter, disabled, _, _ in entered:
            adapter.set_disabled(disabled)
        with indexed():
            for adapter, _, merged, keep in entered:
                if merged:
                    adapter.merge_weights(keep)
