"""What a report is about: the arguments of `report`, checked, with what the model itself knows."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from torch import nn

from ..common.checks import checked_path
from ..common.extras import lacking
from ..method.controller import Controller
from ..model import APTModel, adapters
from ..pruning.architectures.lookup import Blocks, find_blocks
from ..pruning.block_masks import host_mask
from ..storage.per_layer import FILE, load_export


@dataclass(frozen=True)
class Subject:
    """A model with its blocks, and the Controller that pruned it.

    apt     None for a model without adapters
    stock   the model without adapters, or the one inside `apt`
    kept    {block: how many of it have a mask above 0}
    """

    apt: APTModel | None
    stock: nn.Module
    blocks: Blocks
    kept: dict[str, int]
    controller: Controller | None

    @classmethod
    def of(cls, model: Any, controller: Any) -> Subject:
        """TypeError and ValueError for what is no model, no Controller, or a Controller of another model."""
        if controller is not None and not isinstance(controller, Controller):
            raise TypeError(f"controller: expected a Controller or None, got {type(controller).__name__}")
        if isinstance(model, str | os.PathLike):
            model = _loaded(checked_path(model))
        if not isinstance(model, nn.Module):
            raise TypeError(
                "model: expected an APTModel, a model without adapters such as shrink returns, or the directory of an export, "
                f"got {type(model).__name__}"
            )
        found = [module for module in model.modules() if isinstance(module, APTModel)]
        apt = found[0] if len(found) == 1 else None
        if controller is not None and controller.model is not apt:
            raise ValueError("controller: expected the one that was made for this model, or None, got that of another model")
        if apt is None:
            if any(True for _ in adapters(model)):
                raise TypeError(f"model: expected an APTModel, got a {type(model).__name__} with adapters in it; pass what holds them")
            blocks = find_blocks(model)
            return cls(None, model, blocks, {name: block.count for name, block in blocks.items()}, None)
        blocks = apt.blocks or find_blocks(apt.model, apt.blocks.row)  # there are none after merge_and_unload
        kept = {name: int(host_mask(apt.model, block).count_nonzero()) for name, block in blocks.items()}
        return cls(apt, apt.model, blocks, kept, controller)


def _loaded(directory: Path) -> Any:
    """The model that `export` wrote into this directory."""
    exported_in("model", directory)
    if (directory / FILE).is_file():
        return load_export(directory)
    try:
        import transformers
    except ImportError as error:
        raise ImportError(lacking("report of a directory", "transformers", error)) from error
    name = _class_in(directory)
    kind = getattr(transformers, name, None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise ValueError(f"model: expected the name of a class of transformers in {directory / 'config.json'}, got {name!r}")
    kind_of: Any = kind
    return kind_of.from_pretrained(directory, local_files_only=True).eval()


def _class_in(directory: Path) -> str:
    found = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    names = found.get("architectures") if isinstance(found, dict) else None
    return str(names[0]) if names else ""


def exported_in(argument: str, path: Any) -> dict[str, Any]:
    """{"directory", "class", "loads", "bytes", "files"} of an export; ValueError for another directory."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{argument}: expected the directory that export wrote, got {type(path).__name__}")
    directory = checked_path(path)
    if not (directory / "config.json").is_file():
        raise ValueError(f"{argument}: expected a directory that export wrote, with a config.json in it, got {str(directory)!r}")
    per_layer = (directory / FILE).is_file()
    files = [file for file in sorted(directory.rglob("*")) if file.is_file()]
    name = _class_in(directory)
    return {
        "directory": str(directory),
        "class": name,
        "loads": "apt_ext.load_export" if per_layer else f"transformers.{name}.from_pretrained",
        "bytes": sum(file.stat().st_size for file in files),
        "files": len(files),
    }


def checked_metrics(metrics: Any) -> dict[str, float | str | None]:
    """{name: number or text}; TypeError names what is neither. A number that is not finite is None."""
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise TypeError(f"metrics: expected a dict of names and numbers, got {type(metrics).__name__}")
    found: dict[str, float | str | None] = {}
    for name, value in metrics.items():
        if not isinstance(name, str) or not isinstance(value, Real | str):
            raise TypeError(f"metrics[{name!r}]: expected a number or text under a name, got {type(value).__name__}")
        number = value if isinstance(value, str | int) else float(value)
        found[name] = number if isinstance(number, str) or math.isfinite(number) else None
    return found
