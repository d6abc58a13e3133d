"""Take an APTModel apart, in a copy: a stock base, cut at the exact zeros, and factors beside it, as PEFT has them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.layer import APTAdapter
from ..adapter.mask import Mask
from ..adapter.shared_memory import indexed
from ..common.names import covered
from ..distributed.dtensor import is_sharded
from ..model import APTModel, adapters
from ..pruning.architectures.lookup import Block
from ..pruning.block_masks import expand, host_mask, stretch, submodule
from ..pruning.cut import folded, removal, tell_constants
from ..pruning.float32_heads import narrowing
from ..pruning.wrappers import StreamCarrier
from ..storage import stock_saving
from ..wrapping.peft_factors import Pair

_BY_HAND = "masks that set_block_mask has set, which are consistent"


@dataclass(frozen=True)
class Parts:
    """What an APTModel is made of.

    base     the model of stock modules, without adapters and masks
    changed  whether that is another than the base model that adapters were put into: something is masked to zero, or cut
    pairs    {linear: its factors}
    saved    {module that trained whole, and what shares its weights: {name within it: value}}
    """

    base: Any
    changed: bool
    pairs: dict[str, Pair]
    saved: dict[str, dict[str, Tensor]]


def taken_apart(model: APTModel) -> Parts:
    """The parts of a copy of `model`, which is untouched.

    ValueError for masks that no stock base holds (fractions; heads that are masked in part), layers that have to keep
    the same heads, and no factors. RuntimeError for values that are sharded, on meta or not finite, and within `disable_adapter`.
    """
    _check_values(model)
    _check_masks(model)
    removal(model.model, model.blocks)
    with torch.inference_mode(False), torch.no_grad():  # Parameters born in inference mode could never be trained
        twin = copy.deepcopy(model)
        with indexed():
            for _, adapter in adapters(twin):
                adapter.unmerge_weights()
        twin.compact(False)
        cut = twin.checked_cut()
        twin.make_cut(cut)
        changed = any(block.count != twin.blocks.full[name] for name, block in twin.blocks.items())
        return _bare(twin, changed)


def _bare(twin: APTModel, changed: bool) -> Parts:
    base, row = twin.model, twin.blocks.row
    names = saved_modules(base, twin.saved)
    width = twin.blocks["hidden"].count if "hidden" in twin.blocks else None
    values = folded(base, row, width)
    pairs = {}
    for name, adapter in list(adapters(twin)):
        pair, selected = _without_masks(base, name, adapter)
        changed |= selected
        if pair.A.numel() and pair.B.numel():
            pairs[name] = pair
        assert adapter.base_layer is not None
        base.set_submodule(name, adapter.base_layer)
    for name, module in list(base.named_modules()):
        if isinstance(module, StreamCarrier):
            _expect_ones(name, module.host_mask("mask_out"))
            base.set_submodule(name, module.base_layer)
    for parameter, value in values:
        parameter.copy_(value)
    if width is not None:
        tell_constants(base, width)
    narrowing(base)()
    stock_saving.restore(base, row)
    if not pairs:
        raise ValueError("model: expected an adapter with a rank on what is kept, got none; apt_ext.export writes a model without adapters")
    within = next((name for name in pairs if covered(name, names)), None)
    if within is not None:
        raise ValueError(
            f"model: expected no adapter within what trains whole, got {within}, where PEFT can save only all of "
            f"{next(one for one in names if covered(within, [one]))}; merge_and_unload and apt_ext.export keep both"
        )
    for parameter in base.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    saved = {name: {key: value.clone() for key, value in base.get_submodule(name).state_dict().items()} for name in names}
    return Parts(base, changed or bool(values), pairs, saved)


def saved_modules(model: nn.Module, saved: list[str]) -> list[str]:
    """The names of the modules that PEFT has to save so that all of `saved` is: it saves whole modules, and copies of tied weights.

    A lone Parameter becomes the module that holds it, other holders of a weight come with it, and so do modules whose
    names end alike, which PEFT takes for the same.
    """
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(_plain(name))
    modules = dict.fromkeys(_plain(name) for name, _ in model.named_modules(remove_duplicate=False) if name)
    found = [_plain(name) if _plain(name) in modules else _plain(name).rpartition(".")[0] for name in saved]
    while True:
        tied = [names for names in holders.values() if any(covered(name, found) for name in names)]
        more = [name.rpartition(".")[0] for names in tied for name in names if not covered(name, found)]
        more += [name for name in modules if name.endswith(tuple(found)) and not covered(name, found)] if found else []
        if "" in (*found, *more):
            raise ValueError("model: expected modules that train whole, got a Parameter of the model itself, which PEFT cannot save")
        if not more:
            return [name for name in dict.fromkeys(found) if not covered(name, [other for other in found if other != name])]
        found += more


def _plain(name: str) -> str:
    """A name as before wrapping."""
    return f"{name}.".replace(".base_layer.", ".").removesuffix(".")


def _without_masks(model: nn.Module, name: str, adapter: APTAdapter) -> tuple[Pair, bool]:
    """The factors of an adapter whose masks, zeros and ones, are put into them and the base layer; whether there are zeros."""
    A, B = adapter.Wa.detach().clone(), adapter.Wb.detach().clone()
    gone_in, gone_out = ((adapter.host_mask(side) == 0).nonzero().flatten().to(A.device) for side in ("mask_in", "mask_out"))
    if len(gone_in) or len(gone_out):
        weight = adapter.weight
        others = [other for other, parameter in model.named_parameters(remove_duplicate=False) if parameter is weight]
        if len(others) > 1:
            raise ValueError(f"{name}: expected {_BY_HAND}, got zeros over a weight that is tied: {' = '.join(map(_plain, others))}")
        assert adapter.matrix is not None
        adapter.matrix.detach().index_fill_(1, gone_in, 0).index_fill_(0, gone_out, 0)
        if adapter.bias is not None:
            adapter.bias.detach().index_fill_(0, gone_out, 0)
        A.index_fill_(1, gone_in, 0)
        B.index_fill_(0, gone_out, 0)
    return Pair(A, B, adapter.scaling), bool(len(gone_in) or len(gone_out))


def _check_values(model: APTModel) -> None:
    if any(adapter.disabled for _, adapter in adapters(model)):
        raise RuntimeError("to_peft: expected adapters that act, got disabled ones; call it outside of disable_adapter()")
    for name, parameter in model.model.named_parameters():
        if is_sharded(parameter) or parameter.is_meta:
            what = "sharded by FSDP2" if is_sharded(parameter) else "on meta"
            raise RuntimeError(f"to_peft: expected a model whose values are all here, got {name} {what}; load its full state_dict first")


def _check_masks(model: APTModel) -> None:
    """ValueError for fractions, and for a block whose mask says less than its lanes do."""
    found = [(f"block {name!r}", host_mask(model.model, block)) for name, block in model.blocks.items()]
    for name, module in model.model.named_modules():
        if isinstance(module, APTAdapter | StreamCarrier):
            found += [(f"{mask_name} of {name}", mask) for mask_name, mask in module.host_masks().items()]
    soft = next((where for where, mask in found if Mask(mask).has_fractions), None)
    if soft is not None:
        raise ValueError(
            f"model: expected masks of exact zeros and ones, since PEFT has no masks, got fractions in {soft}; set them "
            "to 0 or 1, train to the Controller's last event, or merge them with apt_ext.export"
        )
    for name, block in model.blocks.items():
        _check_lanes(model.model, name, block)


def _check_lanes(model: nn.Module, name: str, block: Block) -> None:
    side = block.scaling_side
    carrier = submodule(model, side.module)
    if isinstance(carrier, APTAdapter | StreamCarrier):
        lanes = carrier.host_mask(f"mask_{side.side}")
        if not torch.equal(stretch(lanes, side), expand(host_mask(model, block), side, len(lanes))):
            raise ValueError(f"{side.module}: expected {_BY_HAND}, got others within one of block {name!r}")


def _expect_ones(name: str, mask: Tensor) -> None:
    if not bool((mask == 1).all()):
        raise ValueError(f"{name}: expected {_BY_HAND}, got zeros there that no block has")


def flat(saved: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """{name in the model: value} of what trained whole."""
    return {f"{module}.{key}": value for module, values in saved.items() for key, value in values.items()}
