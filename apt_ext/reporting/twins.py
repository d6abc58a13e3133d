"""Stock models of the sizes that an APTModel has, and had before its first cut, made without its weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.layer import APTAdapter
from ..common.checks import FLOATING
from ..model import APTModel
from ..pruning.architectures.lookup import Blocks, find_blocks
from ..pruning.cut import Lanes, tell_blocks, tell_constants, tell_modules, touched
from ..pruning.on_meta import stock_hooks
from ..pruning.wrappers import StreamCarrier

_STD = 0.02  # of the values: a pass over them overflows nowhere, and meets no denormal numbers


def stock_twin(model: APTModel, *, full: bool, device: torch.device | str = "meta") -> tuple[nn.Module, Blocks]:
    """A stock model in the place of the one inside, of random values, and its blocks; `model` is untouched.

    full    of the sizes before the first cut; False: of those of now, whatever the masks say
    device  where its Parameters are; on "meta" it takes no memory

    Ties between Parameters, buffers and the config come with it. Values are drawn from a generator of its own.
    """
    inner, origin = model.model, model.blocks.origin
    lanes: Lanes = {}
    for (name, side), width in origin.widths.items() if full and origin is not None else ():
        lanes.setdefault(name, {})[side] = torch.arange(width, device="cpu")
    shapes = _shapes(inner, lanes)
    generator = None if str(device) == "meta" else torch.Generator(device).manual_seed(0)
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(_drawn(parameter, shape, device, generator), requires_grad=False) for parameter, shape in shapes.items()
    }
    for buffer in inner.buffers():
        memo[id(buffer)] = buffer.detach().to(device, copy=True)
    memo |= stock_hooks(inner)
    for module in inner.modules():  # whoever holds the carrier gets a copy of what it carries
        if isinstance(module, APTAdapter | StreamCarrier):
            memo[id(module)] = copy.deepcopy(module.base_layer, memo)
    twin = copy.deepcopy(inner, memo)
    for name in ("save_pretrained", "push_to_hub"):  # of an APTModel's inside
        vars(twin).pop(name, None)
    if not lanes:
        return twin.eval(), find_blocks(twin, model.blocks.row)
    tell_modules(twin, lanes)
    blocks = tell_blocks(twin, model.blocks.row)
    if "hidden" in blocks and generator is not None:  # on meta constants have no values
        tell_constants(twin, blocks["hidden"].count)
    return twin.eval(), blocks


def _shapes(model: nn.Module, lanes: Lanes) -> dict[nn.Parameter, list[int]]:
    """{Parameter: its shape where sides have the channels that `lanes` says}, of all but the adapters' factors."""
    shapes: dict[nn.Parameter, list[int]] = {}
    for module in model.modules():
        if isinstance(module, APTAdapter):
            continue
        for parameter in module.parameters(recurse=False):
            shapes.setdefault(parameter, list(parameter.shape))
    for name, sides in lanes.items():
        for side, kept in sides.items():
            for parameter, dim in touched(model.get_submodule(name), side):
                if parameter in shapes:
                    shapes[parameter][dim] = len(kept)
    return shapes


def _drawn(parameter: nn.Parameter, shape: list[int], device: torch.device | str, generator: torch.Generator | None) -> Tensor:
    value = torch.empty(shape, dtype=parameter.dtype, device=device)
    if generator is None or parameter.dtype not in FLOATING:
        return value if generator is None else value.zero_()
    return value.fill_(1.0) if value.dim() == 1 else value.normal_(0.0, _STD, generator=generator)
