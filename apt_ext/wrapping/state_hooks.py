"""What torch's `state_dict` and `load_state_dict` do of an APTModel beside what torch does."""

from __future__ import annotations

from typing import Any

from ..adapter.state_dict import checked_before
from ..pruning.target import load_target, target_after
from . import cut_states, run_state


def save_cuts(apt: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """A hook of torch's `state_dict`."""
    state.update(cut_states.tensors_of(apt.blocks, prefix))


@checked_before
def load_cuts(apt: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook before torch's `load_state_dict`, which then finds the sizes of `state`; that is torch's own copy.

    It takes the target as well, once nothing can be refused: a wrapper's load comes here without the checks of ours.
    """
    target_after(apt.target, state, prefix)
    with cut_states.cut_to(apt.model, apt.blocks, cut_states.read(state, apt.blocks, prefix)) as blocks:
        apt.blocks = blocks
    load_target(apt, state, prefix)
    kept = cut_states.without(run_state.without_run(state, prefix), prefix)
    for key in state.keys() - kept.keys():
        del state[key]
