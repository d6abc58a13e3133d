"""`save_pretrained` of an APTModel."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..common.checks import checked_mapping
from ..distributed import agreement
from ..pruning.target import KEY
from ..pruning.wrappers import StreamCarrier
from ..storage import checkpoint
from ..storage.atomic_file import replace_file
from ..storage.base_model import about
from . import cut_states, model_state, run_state

_WEIGHTS = "adapters-alone-APTModel.from_pretrained-reads-them.safetensors"


def save(apt: Any, path: str | os.PathLike[str], state_dict: Mapping[str, Any] | None, for_trainer: bool) -> None:
    """Write what `APTModel.save_pretrained` promises; `for_trainer`: with the Controller's state, in model.safetensors."""
    hidden = apt.blocks["hidden"].sides if "hidden" in apt.blocks else ()
    stream = any(isinstance(apt.model.get_submodule(side.module), StreamCarrier) for side in hidden)
    own = model_state.own_state(apt.model, apt.saved) if state_dict is None else _gathered(apt, state_dict)
    cuts = cut_states.tensors_of(apt.blocks)
    if not for_trainer:
        checkpoint.save(path, apt.apt_config, own | cuts, stream, apt.saved, apt.target, about(apt.model))
        return
    controller = run_state.controller_of(apt)
    target = {} if apt.target is None else {KEY: apt.target.to_tensor()}
    state = None if controller is None else controller.state_dict()
    tensors = run_state.packed(own, cuts | target, state, agreement.ranks(), run_state.scalings_of(apt.model))
    checkpoint.save(path, apt.apt_config, tensors, stream, apt.saved, apt.target, about(apt.model), checkpoint.RUN_FILE)
    _keep_stock_classes_off(apt.model, Path(path, "config.json"))


def _keep_stock_classes_off(model: Any, file: Path) -> None:
    """Write the model's config with a name of weights that are not there: without one, stock classes would begin with random weights."""
    text = getattr(getattr(model, "config", None), "to_json_string", None)
    if callable(text) and (not file.exists() or _WEIGHTS in file.read_text(encoding="utf-8")):
        replace_file(file, json.dumps({**json.loads(text()), "transformers_weights": _WEIGHTS}, indent=2).encode() + b"\n")


def _gathered(apt: Any, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """What of a gathered state of the APTModel is its own; ValueError where something is missing."""
    checked_mapping("state_dict", state_dict)
    inner = {key.removeprefix(run_state.MODEL): value for key, value in state_dict.items() if key.startswith(run_state.MODEL)}
    own = model_state.own_of(apt.model, apt.saved, inner)
    trained = {name for name, parameter in apt.model.named_parameters() if parameter.requires_grad}
    missing = sorted(trained - own.keys())
    if missing:
        raise ValueError(
            f"state_dict: expected all of what APTModel.state_dict() holds, got {len(missing)} missing, model.{missing[0]} first; "
            "leave it out, or give the gathered state of the whole model"
        )
    return own
