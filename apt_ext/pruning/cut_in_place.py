"""Cut a model with adapters in place: everything that has one of its sizes follows, or nothing does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.layer import APTAdapter
from ..optim.resize import Resize, resizable_state, resize_parameters
from .architectures.lookup import Blocks, origin_of, stored
from .cut import (
    Changes,
    Removal,
    copied_configs,
    lanes_for,
    parameter_changes,
    removal,
    report_spared,
    selected,
    tell_blocks,
    tell_modules,
)
from .wrappers import is_carrier

_SIZES = ("in_features", "out_features", "nx", "nf", "embedding_dim", "normalized_shape")


@dataclass(frozen=True)
class Cut:
    """A cut that was checked and has not been made.

    gone     what it removes
    changes  of which Parameters
    """

    model: nn.Module
    blocks: Blocks
    gone: Removal
    changes: Changes
    optimizer: object | None

    @property
    def is_empty(self) -> bool:
        """Whether it removes nothing."""
        return not self.gone.lanes

    def make(self) -> Blocks:
        """Make it; returns the blocks that are left.

        Every Parameter keeps its identity, and is resized with its gradient and optimizer state; the frozen ones too, so that
        all of it is allocated before the first change.
        """
        model, lanes, full = self.model, self.gone.lanes, self.blocks.full
        # One that an earlier cut has spared was told of then.
        report_spared(tuple(name for name in self.gone.spared if self.blocks[name].count > 1 or full[name] == 1))
        origin = origin_of(model, self.blocks).after(self.gone.kept)
        if self.is_empty:
            return self.blocks
        with torch.no_grad():
            masks = [_mask_change(carrier, sides) for name, sides in lanes.items() if is_carrier(carrier := model.get_submodule(name))]
        configured = copied_configs(model)
        with _whole_weights(model):
            resize_parameters(self._resizes(), self.optimizer)
            for module, config in configured:
                module.config = config
            for change in masks:
                change()
            tell_modules(model, lanes)
        return Blocks(self.blocks.row, tell_blocks(model, self.blocks.row), origin)

    def _resizes(self) -> list[Resize]:
        sizes = []
        with torch.no_grad():
            for parameter, dims in self.changes.items():
                value = selected(parameter.detach(), dims)
                sizes += [Resize(parameter, value, dim, kept, fresh=True) for dim, kept in dims.items()]
        return sizes


def checked_cut(model: nn.Module, blocks: Blocks, optimizer: object | None, masks: Mapping[str, Tensor] | None = None) -> Cut:
    """Check a cut at the exact zeros of the masks; nothing is changed.

    masks  {block: [count]} for those that do not count as the model has them

    Raises what `APTModel.cut` does.
    """
    return _checked(model, blocks, removal(model, blocks, masks), optimizer)


def checked_cut_to(model: nn.Module, blocks: Blocks, kept: Mapping[str, Tensor]) -> Cut:
    """Check a cut that leaves of each block what `kept` ([count] bool) says, whatever the masks are."""
    return _checked(model, blocks, Removal(dict(kept), lanes_for(model, blocks, dict(kept))), None)


def _checked(model: nn.Module, blocks: Blocks, gone: Removal, optimizer: object | None) -> Cut:
    merged = next((name for name in gone.lanes if getattr(model.get_submodule(name), "merged", False)), None)
    if merged is not None:
        raise RuntimeError(f"cut: {merged} is merged under its present masks; unmerge it first")
    changes = parameter_changes(model, gone.lanes)
    resizable_state(list(changes), optimizer)
    return Cut(model, blocks, gone, changes, optimizer)


def _mask_change(carrier: nn.Module, sides: dict[str, Tensor]) -> Callable[[], None]:
    """The change of a carrier's masks to the channels that stay (see `APTAdapter.mask_change`)."""
    masks = {f"mask_{direction}": carrier.get_buffer(f"mask_{direction}") for direction in sides}
    kept = {name: mask.index_select(0, sides[name.removeprefix("mask_")].to(mask.device)) for name, mask in masks.items()}
    return carrier.mask_change(kept)  # type: ignore[operator, no-any-return]  # both kinds of carriers have it


@contextmanager
def _whole_weights(model: nn.Module) -> Iterator[None]:
    """Within this context weights that `compact` has put into host memory are in their places."""
    offloaded = [one for one in model.modules() if isinstance(one, APTAdapter) and one.packing.store.is_offloaded]
    try:
        for adapter in offloaded:
            adapter.packing.store.restore(adapter.weight)
        yield
    finally:
        for adapter in offloaded:
            adapter.packing.offload(adapter)


def way_back(model: nn.Module, cut: Cut) -> Callable[[], None]:
    """Return a function that brings the model back to what it is now, after `cut` was made without an optimizer.

    It allocates nothing of the order of the model: until then the memory of now is kept.
    """
    parameters = [(parameter, parameter.detach(), parameter.grad) for parameter in cut.changes]
    masks: list[tuple[Any, dict[str, Tensor]]] = [
        (carrier, {f"mask_{side}": carrier.get_buffer(f"mask_{side}").detach().clone() for side in sides})
        for name, sides in cut.gone.lanes.items()
        if is_carrier(carrier := model.get_submodule(name))
    ]
    said = [
        (module, attribute, vars(module)[attribute])
        for name in cut.gone.lanes
        for module in {id(one): one for one in (model.get_submodule(name), stored(model.get_submodule(name)))}.values()
        for attribute in _SIZES
        if attribute in vars(module)
    ]
    for block in cut.blocks.values():
        if block.rule is not None and block.owner:
            owner = model.get_submodule(block.owner)
            said += [
                (owner, attribute, getattr(owner, attribute))
                for attribute in (*block.rule.counts, *block.rule.totals)
                if hasattr(owner, attribute)
            ]
    configured = [(module, module.config) for module in model.modules() if getattr(module, "config", None) is not None]
    stores = [(one.packing.store, one.packing.store.host) for one in model.modules() if isinstance(one, APTAdapter)]

    def undo() -> None:
        for store, host in stores:
            store.host = host
        with torch.inference_mode(False), torch.no_grad():
            for parameter, value, gradient in parameters:
                parameter.set_(value)  # type: ignore[call-overload]
                parameter.grad = gradient
        for module, attribute, value in said:
            setattr(module, attribute, value)
        for module, config in configured:
            module.config = config
        for carrier, values in masks:
            carrier.mask_change(values)()
            if isinstance(carrier, APTAdapter):
                carrier.guard_factors()

    return undo
