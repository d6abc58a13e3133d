"""What a cut removes, and how modules and config say their new sizes: shared by `shrink` (a stock copy) and cuts in place."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.layer import APTAdapter
from .architectures.lookup import (
    Architecture,
    Block,
    Blocks,
    as_blocks,
    ends_with,
    find_blocks,
    in_encoder,
    output_layer,
    side_width,
    stored,
    weight_dim,
)
from .block_masks import host_mask, lanes_of
from .wrappers import MaskedEmbedding

logger = logging.getLogger("apt_ext")

# Without heads the CPU attention of torch 2.11 divides by zero, which ends the process.
_ATTENTION_NEEDS_HEADS = torch.__version__ < "2.12"

# {module: {"in" or "out": [kept] int64, the channels that stay}}; sides that lose nothing are not in it
Lanes = dict[str, dict[str, Tensor]]
# {Parameter: {dimension: [kept] int64}}
Changes = dict[nn.Parameter, dict[int, Tensor]]


@dataclass(frozen=True)
class Removal:
    """What stays: `kept` {block: [count] bool} and `lanes`; `spared` names the blocks of which one stays with output weights of zero."""

    kept: dict[str, Tensor]
    lanes: Lanes
    spared: tuple[str, ...] = ()


def removal(model: nn.Module, blocks: Mapping[str, Block], masks: Mapping[str, Tensor] | None = None) -> Removal:
    """What the exact zeros of masks remove; nothing is changed.

    masks  {block: [count]} for those that do not count as the model has them

    Where stock classes cannot run with nothing left one head or neuron stays, under its mask of zero. ValueError where layers would not be
    alike that have to be, or no dimension of the residual stream is kept. RuntimeError where the model has no values.
    """
    for module in model.modules():
        if isinstance(module, APTAdapter):
            module.settle("cut")
    found = {name: host_mask(model, block) for name, block in blocks.items()} | dict(masks or {})
    if any(mask.is_meta for mask in found.values()):
        raise RuntimeError("model: expected masks with values, got a model on meta (apt_ext.plan says what a cut would do)")
    kept = {name: found[name].cpu() != 0 for name in blocks}
    row = as_blocks(model, blocks).row
    spared = () if row is None else tuple(_spare(row, model, blocks, kept))
    if row is not None and row.alike:
        _check_alike(blocks, kept)
    if "hidden" in kept and not bool(kept["hidden"].any()):
        raise ValueError("hidden: expected a mask that keeps at least one dimension, got one of zeros")
    return Removal(kept, lanes_for(model, blocks, kept), spared)


def lanes_for(model: nn.Module, blocks: Mapping[str, Block], kept: dict[str, Tensor]) -> Lanes:
    """The channels that stay when of each block the `kept` ([count] bool) do."""
    lanes: dict[tuple[str, str], Tensor] = {}
    for name, block in blocks.items():
        if bool(kept[name].all()):
            continue
        for side in block.sides:
            width = side_width(model.get_submodule(side.module), side.side)
            here = lanes_of(kept[name], side, width)
            before = lanes.get((side.module, side.side))
            lanes[side.module, side.side] = here if before is None else before & here
    found: Lanes = {}
    for (module, direction), stay in lanes.items():
        found.setdefault(module, {})[direction] = stay.nonzero().flatten()
    return found


def _spare(row: Architecture, model: nn.Module, blocks: Mapping[str, Block], kept: dict[str, Tensor]) -> Iterable[str]:
    """Let one head or neuron stay where the stock class needs one."""
    for name in never_empty(row, model, blocks):
        if blocks[name].count and not bool(kept[name].any()):
            alike = _same_part(name, blocks) if row.alike else [name]
            for other in alike:
                if blocks[other].count and not bool(kept[other].any()):
                    kept[other][0] = True
                    yield other


def never_empty(row: Architecture, model: nn.Module, blocks: Mapping[str, Block]) -> list[str]:
    """The blocks that have to keep one: all, or the heads where a decoder's cache is asked for its length or torch needs them."""
    if row.never_empty:
        return [name for name, block in blocks.items() if block.kind != "hidden"]
    if _ATTENTION_NEEDS_HEADS:
        return [name for name, block in blocks.items() if block.kind == "heads"]
    if not decodes(row, model):
        return []
    config = getattr(model, "config", None)
    types = getattr(config, "layer_types", None) or []
    first: dict[object, str] = {}  # a cache has one length for each type of layer
    for name, block in sorted(blocks.items(), key=lambda item: item[1].layer):
        if block.kind == "heads" and not block.is_cross and not in_encoder(model, block):
            first.setdefault(types[block.layer] if block.layer < len(types) else None, name)
    return list(first.values())


def decodes(row: Architecture, model: nn.Module) -> bool:
    """Whether the model, of this row of the table, is a decoder or has one."""
    return row.decoder or (row.decoder is None and bool(getattr(getattr(model, "config", None), "is_decoder", False)))


def alike(model: nn.Module, blocks: Mapping[str, Block]) -> list[list[str]]:
    """Groups of blocks of heads of which the same have to stay in each; none where layers are free."""
    row = as_blocks(model, blocks).row
    heads = [name for name, block in blocks.items() if block.kind == "heads"] if row is not None and row.alike else []
    return list({group[0]: group for group in (_same_part(name, blocks) for name in heads)}.values())


def _same_part(name: str, blocks: Mapping[str, Block]) -> list[str]:
    """The blocks of the same part of every layer of the stack that `name` is in."""
    one = blocks[name]
    return [other for other, block in blocks.items() if (block.stack, block.part) == (one.stack, one.part)]


def _check_alike(blocks: Mapping[str, Block], kept: dict[str, Tensor]) -> None:
    for name, block in blocks.items():
        if block.kind != "heads":
            continue
        first = _same_part(name, blocks)[0]
        words, same = "same heads", torch.equal(kept[name], kept[first])
        if block.is_cross:  # they read no position bias, but the first layer makes one of zeros for all
            words, same = "number of heads", int(kept[name].sum()) == int(kept[first].sum())
        if not same:
            raise ValueError(
                f"{name}: expected the {words} of {first}, because the layers of "
                f"this stack share one position bias, got {_shown(kept[name])} and {_shown(kept[first])}; give them one mask"
            )


def _shown(kept: Tensor) -> str:
    return f"heads {kept.nonzero().flatten().tolist()} of {len(kept)}"


def report_spared(spared: tuple[str, ...]) -> None:
    """Say which blocks keep a head or neuron that computes nothing."""
    if spared:
        logger.warning("%s: one stays, with output weights of zero: the stock class cannot run with nothing there", ", ".join(spared))


# -- Parameters --------------------------------------------------------------------------------------------------------


def parameter_changes(model: nn.Module, lanes: Lanes) -> Changes:
    """Which entries of which Parameters stay; of adapters the factors too. A tied Parameter is there once."""
    changes: Changes = {}
    for name, sides in lanes.items():
        module = model.get_submodule(name)
        for direction, kept in sides.items():
            for parameter, dim in touched(module, direction):
                changes.setdefault(parameter, {})[dim] = kept
    return changes


def touched(module: nn.Module, direction: str) -> Iterable[tuple[nn.Parameter, int]]:
    """(Parameter, dimension) of everything that runs along one side of a module."""
    base = stored(module)
    for name, parameter in base.named_parameters(recurse=False):
        if parameter.dim() == 2 and name == "weight":
            yield parameter, weight_dim(base, direction)
        elif direction == "out":
            yield parameter, 0
    if isinstance(module, APTAdapter):
        yield (module.lora_A, 1) if direction == "in" else (module.lora_B, 0)


def left(parameter: nn.Parameter, changes: Changes) -> list[int]:
    """The shape that is left of a Parameter."""
    dims = changes.get(parameter, {})
    return [len(dims[dim]) if dim in dims else size for dim, size in enumerate(parameter.shape)]


def selected(value: Tensor, dims: dict[int, Tensor]) -> Tensor:
    """The entries of `value` that stay, a new tensor."""
    for dim, kept in dims.items():
        value = value.index_select(dim, kept.to(value.device))
    return value


def replace_parameters(model: nn.Module, changes: Changes) -> None:
    """New, smaller Parameters in the places of the old ones; ties are kept."""
    cut = {old: nn.Parameter(selected(old.detach(), dims)) for old, dims in changes.items()}
    for module in model.modules():
        module._parameters.update({name: cut[old] for name, old in module._parameters.items() if old in cut})


# -- what modules and config say about themselves ----------------------------------------------------------------------


def tell_modules(model: nn.Module, lanes: Lanes) -> None:
    """Set the sizes that linears, embeddings and norms say they have."""
    for name, sides in lanes.items():
        module = model.get_submodule(name)
        base = stored(module)
        for direction, kept in sides.items():
            names = ("in_features", "nx") if direction == "in" else ("out_features", "nf", "embedding_dim")
            for one in {id(base): base, id(module): module}.values():
                for attribute in names:
                    if attribute in vars(one):
                        setattr(one, attribute, len(kept))
            if isinstance(base, nn.LayerNorm | nn.RMSNorm):
                base.normalized_shape = (len(kept),)


def tell_blocks(model: nn.Module, row: Architecture | None) -> Blocks:
    """Set what attention modules say about their heads, and the config where all layers agree; returns the blocks as they are now.

    They have no `origin`.
    """
    blocks = find_blocks(model, row)
    for block in blocks.values():
        if block.rule is not None and block.owner:
            owner, heads = model.get_submodule(block.owner), _query_heads(model, block)
            for attribute in block.rule.counts:
                setattr(owner, attribute, heads)
            for attribute in block.rule.totals:
                setattr(owner, attribute, heads * block.size)
    for config in configs(model):
        tell_config(config, blocks.row, blocks, widths(model, blocks))
    return blocks


def tell_config(config: Any, row: Architecture | None, blocks: Mapping[str, Block], sizes: Mapping[str, Mapping[str, int]]) -> None:
    """Set the entries of a config that `sizes` (see `widths`) gives one value each, and the size of heads."""
    said = {field: set(found.values()) for field, found in sizes.items()}
    for block in blocks.values():
        if block.rule is not None and block.rule.size and row is not None and not row.derives_head_size:
            said.setdefault(block.rule.size_field, set()).add(block.size)  # stock classes fall back to hidden_size / heads
    for field, values in said.items():
        if len(values) == 1:
            setattr(config, field, next(iter(values)))


def configs(model: nn.Module) -> list[Any]:
    """Every config in the model, each once: the stacks of an encoder-decoder have copies."""
    found = {id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None}
    return list(found.values())


def copied_configs(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """(module, its config to be): copies, for other models may have been made from the same one. What is one config stays one."""
    holders = [module for module in model.modules() if getattr(module, "config", None) is not None]
    return list(zip(holders, copy.deepcopy([module.config for module in holders]), strict=True))


def widths(model: nn.Module, blocks: Mapping[str, Block], counts: Mapping[str, int] | None = None) -> dict[str, dict[str, int]]:
    """{entry of the config: {block: its width}}: a stock config can say it only where all widths of an entry are equal.

    counts  {block: how many there will be}; None: as many as there are in this model
    """
    found: dict[str, dict[str, int]] = {}
    for name, block in blocks.items():
        count = block.count if counts is None else counts[name]
        if block.kind == "heads" and block.rule is not None:
            if hasattr(getattr(model, "config", None), block.rule.groups_field):
                found.setdefault(block.rule.groups_field, {})[name] = count
            if counts is not None:
                count *= _query_heads(model, block) // max(block.count, 1)
            else:
                count = _query_heads(model, block)
        found.setdefault(block.width_field, {})[name] = count
    return found


def _query_heads(model: nn.Module, block: Block) -> int:
    """A block of heads is a KV group: the input of the output projection counts the query heads."""
    return side_width(model.get_submodule(block.reader), "in") // block.size


# -- what hidden_size scales -------------------------------------------------------------------------------------------


def folded(model: nn.Module, row: Architecture | None, width: int | None = None) -> list[tuple[nn.Parameter, Tensor]]:
    """New values of Parameters that take over what the hidden mask scales, and constants that stock code derives from a hidden size.

    An embedding is multiplied by its mask. Where the output layer shares its weight the last norm is divided by the same. With `width`, the
    hidden size to be, Gemma's embedding scale and T5's output scale of the present size go the same way. Nothing is changed here.
    RuntimeError where a value would not be finite.
    """
    if row is None or row.stream is None:
        return []
    scales: dict[nn.Parameter, Tensor] = {}
    for module in model.modules():
        embedding = stored(module)
        weight = _weight(embedding)
        if not isinstance(embedding, nn.Embedding) or weight is None or weight in scales:
            continue
        factor = torch.ones(weight.shape[1], dtype=torch.float64, device=weight.device)
        if isinstance(module, MaskedEmbedding):
            factor *= module.mask_out
        root = getattr(embedding, "embed_scale", None)
        if width is not None and isinstance(root, Tensor) and round(float(root) ** 2) != width:
            factor *= root.double() / torch.tensor(width**0.5, dtype=root.dtype, device=root.device).double()
        if not bool((factor == 1).all()):
            scales[weight] = factor
    values = [(weight, _scaled(weight, factor)) for weight, factor in scales.items()]
    gain = _output_gain(model, width, scales)
    if gain is not None:
        norms = [stored(module) for name, module in model.named_modules() if ends_with(row.stream.last_norm, name)]
        for norm in norms[-1:]:
            for name, parameter in norm.named_parameters(recurse=False):
                offset = row.stream.norm_offset if name == "weight" else 0.0
                value = ((parameter.detach().double() + offset) * gain - offset).to(parameter.dtype)
                values.append((parameter, torch.where(gain == 0, 0, value)))
    for parameter, value in values:
        if not bool(torch.isfinite(value).all()):
            raise RuntimeError(
                f"hidden: the mask's fractions cannot be folded into a Parameter of shape {list(parameter.shape)}: not finite"
            )
    return values


CONSTANTS = ("embed_scale", "scalar_embed_scale", "model_dim")  # what `tell_constants` sets


def tell_constants(model: nn.Module, width: int) -> None:
    """Set what stock modules derived from the hidden size when they were made, to what they would derive from `width`."""
    for module in model.modules():
        root = getattr(module, "embed_scale", None)
        if isinstance(root, Tensor) and (root.is_meta or round(float(root) ** 2) != width):
            root.fill_(width**0.5)
            module.scalar_embed_scale = width**0.5
        if isinstance(getattr(module, "model_dim", None), int):
            setattr(module, "model_dim", width)  # noqa: B010  # which mypy takes for a submodule


def _scaled(weight: nn.Parameter, factor: Tensor) -> Tensor:
    """weight [rows, width] times factor [width], zeros selected; a block of rows at a time, for an embedding is large."""
    value = torch.empty_like(weight)
    for start in range(0, len(weight), 4096):
        rows = weight.detach()[start : start + 4096]
        value[start : start + 4096] = torch.where(factor == 0, 0, rows.double() * factor).to(weight.dtype)
    return value


def _output_gain(model: nn.Module, width: int | None, scales: dict[nn.Parameter, Tensor]) -> Tensor | None:
    """What the last norm has to be multiplied by [width], so that the output layer finds what it would have found; None: nothing."""
    name = output_layer(model)
    weight = None if name is None else _weight(stored(model.get_submodule(name)))
    if weight is None:
        return None
    scale = scales.get(weight)
    gain = None if scale is None else torch.where(scale == 0, 0, 1 / scale)
    old = getattr(model, "model_dim", None)
    if width is not None and isinstance(old, int) and old != width and getattr(model.config, "scale_decoder_outputs", False):
        ratio = (width / old) ** 0.5
        gain = (torch.ones(weight.shape[1], dtype=torch.float64, device=weight.device) if gain is None else gain) * ratio
    return gain


def _weight(module: nn.Module) -> nn.Parameter | None:
    return module._parameters.get("weight")
