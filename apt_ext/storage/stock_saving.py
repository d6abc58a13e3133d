"""What `save_pretrained` and `push_to_hub` of a stock model do where the stock ones would write what nothing loads.

Two kinds of model look stock and are not: one with adapters in it (the model inside an APTModel, which Trainer may have
been given), and one whose layers have widths of their own. They carry a `save_pretrained` of ours as an attribute of the
instance: the class stays the stock one.
"""

from __future__ import annotations

import logging
import os
import weakref
from typing import Any, Protocol

from torch import nn

from ..common.stock_class import own_class
from ..pruning.architectures.lookup import Architecture, find_blocks
from ..pruning.sizes import Sizes
from .formats import stock_refusals
from .per_layer import PerLayerSaving

logger = logging.getLogger("apt_ext")

_ATTRIBUTES = ("save_pretrained", "push_to_hub")


class SavesAdapters(Protocol):
    """An APTModel, as far as saving needs it; its class makes another around the same model."""

    model: Any
    apt_config: Any
    saved: Any
    blocks: Any
    target: Any
    use_cache_before: Any

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the adapters."""

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Send an export."""


def restore(model: nn.Module, row: Architecture | None) -> None:
    """Give a model without adapters the stock saving, or the format per layer where no stock config says its widths."""
    for name in _ATTRIBUTES:
        vars(model).pop(name, None)
    if row is None or not callable(getattr(model, "save_pretrained", None)):
        return
    if stock_refusals(model, Sizes.of(model, find_blocks(model, row))):
        vars(model)["save_pretrained"] = PerLayerSaving(model, row)


def install(apt: SavesAdapters) -> None:
    """Make the model inside save and upload what the APTModel does: adapters, and an export."""
    saving = AdapterSaving(apt)
    if callable(getattr(apt.model, "save_pretrained", None)):
        vars(apt.model)["save_pretrained"] = saving
    if callable(getattr(apt.model, "push_to_hub", None)):
        vars(apt.model)["push_to_hub"] = ExportPush(saving)


def note(apt: SavesAdapters) -> None:
    """Let the model inside know what its APTModel's blocks and target are: it may outlive the APTModel."""
    saving = vars(apt.model).get("save_pretrained")
    if isinstance(saving, AdapterSaving):
        saving.note(apt)


def refuse_push() -> None:
    """Raise RuntimeError: what `save_pretrained` writes is no model that stock transformers loads."""
    raise RuntimeError(
        "push_to_hub: expected False, got True, with adapters in the model; call push_to_hub(repo_id), which sends an export"
    )


class ExportPush:
    """`push_to_hub` of the model inside an APTModel: that of the APTModel. Copies of the model alone have it too."""

    def __init__(self, saving: AdapterSaving) -> None:
        self._saving = saving

    def __call__(self, repo_id: str, **options: Any) -> str:
        """Send what `APTModel.push_to_hub` sends, an export of the model as it is."""
        return self._saving.whole().push_to_hub(repo_id, **options)


class AdapterSaving:
    """`save_pretrained` of the model inside an APTModel: that of the APTModel. Copies of the model alone have it too."""

    def __init__(self, apt: SavesAdapters) -> None:
        self.config, self.saved = apt.apt_config, apt.saved
        self._model: weakref.ref[nn.Module] = weakref.ref(apt.model)  # which holds this: let go, it is freed at once
        self._kind: Any = own_class(type(apt))
        self._apt: weakref.ref[SavesAdapters] | None = weakref.ref(apt)
        self._blocks, self._target, self._use_cache = apt.blocks, apt.target, apt.use_cache_before
        self._said = False

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the APTModel puts in another; one of the model alone is what the model is now.
        apt = self._living()
        now = {} if apt is None else {"_blocks": apt.blocks, "_target": apt.target}
        return {**vars(self), **now, "_apt": None, "_model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._model = weakref.ref(state["_model"])

    @property
    def model(self) -> Any:
        """The model that this saves."""
        return self._model()

    def note(self, apt: SavesAdapters) -> None:
        """Take over the blocks and the target that `apt` has now, if it is the one that this saves."""
        if self._living() is apt:
            self._blocks, self._target = apt.blocks, apt.target

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Any = None,
        push_to_hub: bool = False,
        **_: Any,
    ) -> None:
        """Write what `APTModel.save_pretrained` writes, for `APTModel.from_pretrained`.

        `state_dict` and the other arguments of the stock method, which Trainer gives, do not matter to it. On other
        processes than the main one nothing is written. RuntimeError with `push_to_hub`.
        """
        if push_to_hub:
            refuse_push()
        if not is_main_process:
            return
        self.whole().save_pretrained(save_directory)
        if not self._said:
            self._said = True
            logger.warning(
                "save_pretrained: wrote the adapters of %s and not its base weights; APTModel.from_pretrained(base_model, "
                "%r) loads them, apt_ext.export writes a model that stock transformers loads. Trainer itself can neither "
                "resume from this directory nor load the best model of a run from it",
                type(self.model).__name__,
                str(save_directory),
            )

    def whole(self) -> SavesAdapters:
        """Return the APTModel around the model, or another where that is gone."""
        apt = self._living()
        if apt is not None:
            return apt
        made: SavesAdapters = self._kind(self.model, self.config, self._blocks, self.saved)
        made.target, made.use_cache_before = self._target, self._use_cache
        return made

    def _living(self) -> SavesAdapters | None:
        apt = self._apt() if self._apt is not None else None
        return apt if apt is not None and apt.model is self.model else None
