"""What every module that carries masks has: what is known of them, and which functions it has computed under them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .mask import Mask, PlacedMasks
from .recompute_check import FunctionHistory


class MaskCarrier(nn.Module):
    """A module around `base_layer`, with masks in buffers.

    base_layer  the stock module that it stands for, or None
    label       its name in the model, for messages; "" where it is in none
    disabled    True within `disable_adapter`
    history     which functions it has computed
    placed      what is known of the masks that lie in the buffers
    """

    base_layer: nn.Module | None
    placed: PlacedMasks

    def __init__(self, **parts: Any) -> None:
        """`parts`: what else decides on the function, at the start (see FunctionHistory)."""
        super().__init__()
        self.label = ""
        self.disabled = False
        self.history = FunctionHistory(disabled=False, **parts)

    @property
    def merged(self) -> bool:
        """True while the masks are part of the base layer's weight."""
        return False

    def begin_masks(self, *names: str) -> None:
        """The buffers are there; nothing is known of their values."""
        self.placed = PlacedMasks(dict.fromkeys(names, False), self._buffers)

    def naming(self, call: str) -> str:
        """`call`, and which module it is about."""
        return f"{call} of {self.label or type(self).__name__}"

    def set_disabled(self, disabled: bool) -> None:
        """Compute as the base layer alone, without masks, or end that."""
        if disabled != self.disabled:
            self.disabled = disabled
            self.history.note(disabled=disabled)

    def mask_change(self, masks: Mapping[str, Tensor | Mask]) -> Callable[[], None]:
        """Prepare a change to these checked masks, {buffer: values}: what can fail is done here, calling the result makes it."""
        raise NotImplementedError

    def host_mask(self, name: str) -> Tensor:
        """The values of the mask `name`, to be read only; waits for the device where somebody else has written them."""
        return self.placed.on_host(name, self._buffers[name])

    def host_masks(self) -> dict[str, Tensor]:
        """{name: host_mask}."""
        return {name: self.host_mask(name) for name in self.placed.names}

    def known_ones(self) -> dict[str, bool]:
        """{name: True if the mask is noted as all ones and nobody wrote into it since}."""
        return {name: self.placed.is_ones(name, self._buffers[name]) for name in self.placed.names}

    def masks_are_own(self) -> bool:
        """False where ``torch.func.functional_call`` has put other masks in place for a call."""
        return all(self.placed.lies_in(name, self._buffers[name]) for name in self.placed.names)

    def note_mask(self, name: str, mask: Mask) -> None:
        """Note that the buffer `name` holds these values now."""
        self.placed.note(name, self._buffers[name], mask.all_ones, mask.values)
        self.history.note(**{name: mask.digest})

    def note_ones(self, ones: Mapping[str, bool]) -> None:
        """Note which masks, as they are now, are all ones."""
        for name, known in ones.items():
            self.placed.note(name, self._buffers[name], known)

    def __getstate__(self) -> dict[str, Any]:
        # Version counters start anew in a copy: what travels is whether a mask is known to be all ones.
        return {**super().__getstate__(), "placed": self.known_ones()}  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.placed = PlacedMasks(state["placed"], self._buffers)
