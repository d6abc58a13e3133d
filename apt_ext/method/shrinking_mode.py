"""Whether what a Controller prunes is cut, left out of the products, or masked alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from torch import nn
from torch.optim import Optimizer

from ..adapter.layer import APTAdapter
from ..distributed.dtensor import is_sharded
from ..model import APTModel
from ..optim.initial_state import state_starts
from ..optim.resize import resizable_state, wrapper_of
from ..pruning.architectures.lookup import Block, stored
from ..pruning.block_masks import submodule
from ..wrapping.module_hooks import is_compiled

logger = logging.getLogger("apt_ext")


def chosen_mode(
    shrink: str | None,
    model: nn.Module,
    apt: APTModel,
    pruned: Mapping[str, Block],
    adapters: Mapping[str, APTAdapter],
    optimizers: Sequence[Optimizer],
) -> str:
    """Return the mode that `shrink` asks for; of None, "cut" where that can be, else "compact", of which the logger tells.

    model     what the Controller was given, which holds the APTModel
    pruned    the blocks that will be
    adapters  those with a rank

    ValueError or RuntimeError where "cut" is asked for and cannot be.
    """
    if shrink in ("compact", "none") or not pruned:
        return shrink if pruned and shrink is not None else "none"
    impossible = _why_no_cut(apt, pruned, optimizers)
    if shrink == "cut":
        if impossible is not None:
            kind, why = impossible
            raise kind(f"shrink: {why}; shrink='compact' leaves Parameters as they are")
        return "cut"
    if impossible is not None:
        why = impossible[1]
    elif is_compiled(model) or is_compiled(apt):
        why = "the model is compiled, and would compile anew after each cut"
    elif any(adapter.max_rank is not None for adapter in adapters.values()):
        why = "max_rank reserves storage that is to stay as it is"
    else:
        return "cut"
    say_compact(why, adapters)
    return "compact"


def say_compact(why: str, adapters: Mapping[str, APTAdapter]) -> None:
    """Say that the default became "compact", and what that means."""
    sharded = any(is_sharded(adapter.lora_A) for adapter in adapters.values())
    what = (
        "FSDP has sharded the layers, so they stay full-size under their masks"
        if sharded
        else ("layers compute on what is kept, and the memory of what is pruned stays in use")
    )
    logger.warning(
        "Controller: what is pruned is compacted and not cut (shrink='compact'), because %s. So %s, until shrink() or export() cuts; "
        "shrink='compact' says that this is meant",
        why,
        what,
    )


def _why_no_cut(apt: APTModel, pruned: Mapping[str, Block], optimizers: Sequence[Optimizer]) -> tuple[type[Exception], str] | None:
    """The kind and words of the error of a cut that cannot be, or None."""
    parameters = [parameter for parameter in apt.parameters() if parameter.requires_grad]
    given = {id(parameter) for one in optimizers for group in one.param_groups for parameter in group["params"]}
    for side in (side for block in pruned.values() for side in block.sides):
        for name, parameter in stored(submodule(apt.model, side.module)).named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in given:
                return ValueError, (
                    f"{side.module}.{name} trains, becomes smaller with each cut, and is held by none of the optimizers that were given; "
                    "give a list of all that hold something of this model"
                )
    wanted = set(map(id, parameters))
    for one in optimizers:
        held = any(id(parameter) in wanted for group in one.param_groups for parameter in group["params"])
        if held and state_starts(one) is None:
            return ValueError, f"the state of {type(one).__name__} cannot follow a cut"
    if (wrapper := wrapper_of(parameters)) is not None:
        return RuntimeError, f"{wrapper} holds the Parameters, and would go on with the old ones after a cut"
    try:
        resizable_state(parameters, list(optimizers))
    except RuntimeError as error:
        return RuntimeError, str(error)
    return None
