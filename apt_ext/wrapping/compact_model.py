"""Compact the adapters of a model together, and chain those that hand over kept channels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from torch import nn

from ..adapter.chain import Chain
from ..adapter.layer import APTAdapter
from ..adapter.second_copy import say_second_copy, unsaid
from ..adapter.shared_memory import indexed
from ..adapter.weight_store import PLACES
from ..common.checks import error_prefix
from ..pruning.architectures.lookup import Block
from ..pruning.wrappers import MaskedLinear


def compact(model: nn.Module, on: bool, dense: str) -> Callable[[], None]:
    """Compact every adapter of `model`, or none; return what undoes it. What `APTModel.compact` promises, without chains."""
    found = [(name, adapter) for name, adapter in model.named_modules() if _computes_packed(adapter)]
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    work: list[tuple[str, APTAdapter, str]] = []
    for name, adapter in found:
        assert isinstance(adapter, APTAdapter)
        alone = adapter.weight is None or owners[id(adapter.weight)] == 1
        work.append((name, adapter, dense if alone or dense not in PLACES else "keep"))
    with indexed():
        for name, adapter, place in work:
            with error_prefix(name):
                adapter.packing.check(adapter, on, place)
    done: list[Callable[[], None]] = []

    def undo() -> None:
        for step in reversed(done):
            step()

    try:
        for _, adapter, place in work:
            back = _way_back(adapter)
            with unsaid():  # one line for all of them is enough
                adapter.compact(on, place)
            done.append(back)
    except BaseException:  # of memory there was not enough
        undo()
        raise
    return undo


def say_memory(model: nn.Module) -> None:
    """Log one line where the copies of what `model` keeps are nearly a second set of weights."""
    say_second_copy(module for module in model.modules() if isinstance(module, APTAdapter))


def _computes_packed(module: nn.Module) -> bool:
    return isinstance(module, APTAdapter) and not isinstance(module, MaskedLinear)


def _way_back(adapter: APTAdapter) -> Callable[[], None]:
    """A function that compacts the adapter again as it is compacted now, or not."""
    compacted, place = adapter.compacted, adapter.packing.store.place

    def undo() -> None:
        kept = adapter.packing.current
        with unsaid():
            if not compacted or kept is None or not kept.is_captured:
                adapter.compact(False)  # its memory first; what a CUDA graph reads stays
            if compacted:
                adapter.compact(True, place)

    return undo


def link_chains(model: nn.Module, blocks: Iterable[Block]) -> None:
    """Chain the adapters of each of these blocks of neurons that can hand over kept channels, and no others."""
    for adapter in model.modules():
        if isinstance(adapter, APTAdapter):
            adapter.packing.unchain()
    for block in blocks:
        sides = [(side, model.get_submodule(side.module)) for side in block.sides if block.kind == "neurons" and side.acts]
        plain = all(_computes_packed(module) and side.parts == 1 for side, module in sides)
        writers = [module for side, module in sides if side.side == "out"]
        readers = [module for side, module in sides if side.side == "in"]
        if plain and writers and len(readers) == 1:
            Chain(writers, readers[0])  # type: ignore[arg-type]
