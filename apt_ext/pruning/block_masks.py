"""How the mask of a block is set, read, and made part of the weights for good."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from ..adapter.layer import APTAdapter
from ..adapter.mask import Mask
from ..common.checks import checked_mask, listed
from ..distributed.dtensor import is_sharded
from .architectures.lookup import Block, Blocks, Side, is_linear, side_width, stored, unknown_modules
from .wrappers import StreamCarrier, carrier_for, is_carrier


def set_mask(model: nn.Module, name: str, block: Block, mask: Tensor, agree: Callable[..., None]) -> None:
    """Give every side of the block its mask: all of `mask` where the side scales, else its exact zeros alone.

    `agree` (see `agreement.change`) is called with what every rank must hold alike, once all is checked.

    mask [count], floating, values in [0, 1], any device. TypeError, ValueError and, while an adapter of the block is merged, RuntimeError;
    no mask has then changed. What the block touches and carries no mask yet is wrapped, once there is something to carry.
    """
    modules = _modules(model, block)
    merged = next((name for name, module in modules.items() if getattr(module, "merged", False)), None)
    if merged is not None:
        raise RuntimeError(f"set_block_mask: {merged} of block {name!r} is merged under its present masks; unmerge it first")
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask of block {name!r} must be a Tensor, got {type(mask).__name__}")
    if mask.is_meta and not next(modules[block.scaling_side.module].parameters()).is_meta:
        raise ValueError(f"mask of block {name!r} must hold values, got one on meta")
    values = checked_mask(f"mask of block {name!r}", mask, torch.empty(block.count, device=mask.device))
    scaling = Mask.of(values)
    sides = [side for side in block.sides if side.acts]
    if scaling.all_ones and any(not is_carrier(modules[side.module]) for side in sides):
        return agree(values, partial(host_mask, model, block))  # nothing to carry, and nothing was carried
    placed = missing_carriers(model, name, block)
    modules |= placed
    kept = (values != 0).to(values.dtype)
    whole = {(True, block.count): scaling}  # {(scales, width): what modules carry of which the block has a whole side}
    new: dict[str, dict[str, Tensor | Mask]] = {}
    for side in sides:
        carrier, name = modules[side.module], f"mask_{side.side}"
        assert isinstance(carrier, APTAdapter | StreamCarrier)
        masks, given = new.setdefault(side.module, {}), values if side.scales else kept
        width = len(getattr(carrier, name))
        if side.parts == 1:
            if (side.scales, width) not in whole:
                whole[side.scales, width] = Mask(expand(given, side, width))
            masks[name] = whole[side.scales, width]
        else:
            lanes = masks[name] if name in masks else masks.setdefault(name, carrier.host_mask(name).clone())
            assert isinstance(lanes, Tensor)
            stretch(lanes, side).copy_(expand(given, side, width))
    changes = [modules[name].mask_change(masks) for name, masks in new.items()]  # type: ignore[operator]  # carriers have it
    agree(values, partial(host_mask, model, block))
    # Nothing above changed anything, and nothing below can fail.
    put_carriers(model, placed)
    for change in changes:
        change()


def _modules(model: nn.Module, block: Block) -> dict[str, nn.Module]:
    return {side.module: submodule(model, side.module) for side in block.sides}


def submodule(model: nn.Module, name: str) -> nn.Module:
    """`model.get_submodule(name)`, from the registries themselves: attribute access through nn.Module is slow."""
    found = model
    for part in name.split("."):
        inner = found._modules.get(part)
        if inner is None:
            return model.get_submodule(name)  # which finds what a wrapper passes on, or says what is missing
        found = inner
    return found


def missing_carriers(model: nn.Module, block_name: str, block: Block) -> dict[str, nn.Module]:
    """{name: what carries a mask there} for what the block touches and cannot carry one yet: embeddings, norms, heads of the stream.

    The model is not changed: `put_carriers` puts them in place, under masks of ones.

    RuntimeError where FSDP2 has sharded one, whose Parameters would be lost to it.
    """
    modules = _modules(model, block)
    bare = {side.module: side.of for side in block.sides if side.acts and not is_carrier(modules[side.module])}
    sharded = next((name for name in bare if any(map(is_sharded, modules[name].parameters()))), None)
    if sharded is not None:
        raise RuntimeError(
            f"block {block_name!r}: expected to be masked once before fully_shard, which wraps embeddings, norms and output layers, got "
            f"{sharded} sharded as it is; before fully_shard, set_block_mask({block_name!r}, mask) to anything and back to ones"
        )
    made = {name: carrier_for(modules[name], of) for name, of in bare.items()}
    for name, carrier in made.items():
        if isinstance(carrier, APTAdapter):
            carrier.label = name
    return made


def put_carriers(model: nn.Module, placed: Mapping[str, nn.Module]) -> None:
    """Put each carrier in the place of the module that it wraps."""
    for name, carrier in placed.items():
        model.set_submodule(name, carrier)


def take_carriers(model: nn.Module, placed: Mapping[str, nn.Module]) -> None:
    """Undo `put_carriers`."""
    for name, carrier in placed.items():
        model.set_submodule(name, stored(carrier))


def get_mask(model: nn.Module, block: Block) -> Tensor:
    """A copy of the block's mask [count], float32: what its scaling side carries."""
    carrier = model.get_submodule(block.scaling_side.module)
    return host_mask(model, block).to(next(chain(carrier.buffers(), carrier.parameters())).device)


def host_mask(model: nn.Module, block: Block) -> Tensor:
    """The block's mask on the host; waits for the device where somebody else has written it."""
    side = block.scaling_side
    carrier = submodule(model, side.module)
    if not isinstance(carrier, APTAdapter | StreamCarrier):
        return torch.ones(block.count, dtype=torch.float32, device="cpu")
    lanes = stretch(carrier.host_mask(f"mask_{side.side}"), side)
    return lanes[:: max(len(lanes) // max(block.count, 1), 1)].clone()


def stretch(lanes: Tensor, side: Side) -> Tensor:
    """The part of the lanes of a whole module side that belongs to `side`; a view."""
    width = len(lanes) // side.parts
    return lanes.narrow(0, side.part * width, width)


def expand(mask: Tensor, side: Side, width: int) -> Tensor:
    """A block's mask [count], each entry repeated for its adjacent channels of a module side of `width` channels."""
    return mask.repeat_interleave(width // side.parts // max(len(mask), 1)).to(mask.device)


def lanes_of(kept: Tensor, side: Side, width: int) -> Tensor:
    """[width] bool: the channels of a module side that stay when the blocks `kept` [count] (bool) do."""
    lanes = torch.ones(width, dtype=torch.bool, device="cpu")
    stretch(lanes, side).copy_(expand(kept.cpu(), side, width))
    return lanes


def missing_block(model: nn.Module, name: str, blocks: Blocks, near: str) -> str:
    """The error for a name that is no block of the model: what there is, or what to declare, with the modules that were seen."""
    if blocks and name != "hidden":
        return f"name: expected a block of this model, got {name!r}{near}"
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    modules = dict(model.named_modules())
    if blocks.row is None:
        linears = {name: m for name, m in modules.items() if is_linear(stored(m)) and not name.endswith(".base_layer")}
        seen = [f"{name} [{side_width(m, 'out')}, {side_width(m, 'in')}]" for name, m in linears.items()]
        return (
            f"name: expected a block of this model, got {name!r}, but its architecture is not in the table; declare it with "
            f"apt_ext.register_architecture(Architecture(({model_type!r},), (Layers(pattern, (BlockRule(kind, width_field, sides),)),), "
            f"Stream(...))); the linears of this {type(model).__name__}, [out, in]: {listed(seen, 12)}"
        )
    if name != "hidden":
        return f"name: expected a block of this model, got {name!r}, but it has none (after merge_and_unload() none are left)"
    unknown = unknown_modules(model, blocks.row)
    return (
        f"name: expected a block of this model, got {name!r}; the row of {model_type!r} does not say how these modules touch the residual "
        f"stream: {listed(unknown, 12) or 'all are known, but their widths differ'}"
    )
