"""What lets stock `from_pretrained(..., trust_remote_code=True)` load layers with widths of their own, without apt_ext.

A directory gets modeling_apt.py, which is our file of this name with the classes of this model at its end, and config.json the
entries `auto_map`, by which transformers finds them, and `apt_per_layer`, which that file explains.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..pruning.architectures.lookup import Blocks
from ..pruning.cut import CONSTANTS
from . import modeling_apt
from .shaped import shaped

logger = logging.getLogger("apt_ext")

CODE = "modeling_apt.py"
ENTRIES = ("apt_per_layer", "auto_map")  # what it adds to config.json


def write(model: Any, wide: Any, directory: Path, blocks: Blocks, real: Mapping[str, Any]) -> None:
    """Add to the stock files of `model`, as `save_pretrained` wrote them with the config `wide`, what loads it.

    real  the entries of `wide` that are wider than the model, as the model's own config says them
    """
    modeling_apt.rename_weights(directory)
    kind: Any = type(model)
    twin = _twin(lambda: kind(copy.deepcopy(wide)))
    if twin is None:
        logger.warning(
            "save_pretrained: transformers cannot make a %s before it has its values, so the directory is for apt_ext.load_export "
            "alone and carries no code for trust_remote_code=True",
            kind.__name__,
        )
        return
    names = auto_classes(kind, type(wide))
    body: Any = names.get("AutoModel", kind)
    counts = {name: block.count for name, block in blocks.items()}
    cut = _twin(lambda: shaped(body, copy.deepcopy(wide), blocks.row, counts, {}))
    body_shapes: dict[str, str] = {}
    if cut is None:  # a row that does not fit the body alone
        names.pop("AutoModel", None)
    else:
        body_shapes = _shapes(cut, _twin(lambda: body(copy.deepcopy(wide))), f"{body.base_model_prefix}.")
    (directory / CODE).write_text(_code(type(model), type(wide), names), encoding="utf-8")
    file = directory / "config.json"
    said = json.loads(file.read_text(encoding="utf-8"))
    maps = {name: kind.__name__ for name, kind in names.items()} | {"AutoConfig": type(wide).__name__}
    said["auto_map"] = {name: f"{Path(CODE).stem}.{_named(kind)}" for name, kind in sorted(maps.items())}
    said["apt_per_layer"] = {
        "wide": {field: getattr(wide, field) for field in real},
        "real": dict(real),
        "shapes": body_shapes | _shapes(model, twin),
        "attributes": _attributes(model, twin, blocks),
    }
    file.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def auto_classes(kind: type, config_class: type) -> dict[str, type]:
    """{auto class of transformers: the class that it makes for such a config}: those that make `kind`, and AutoModel."""
    from transformers.models.auto import modeling_auto

    found: dict[str, type] = {}
    for name in sorted(vars(modeling_auto)):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and config_class in mapping:
            made = mapping[config_class]
            for one in made if isinstance(made, tuple | list) else (made,):
                if one is kind or name == "AutoModel":
                    found.setdefault(name, one)
    return found


def auto_class_of(kind: type, config_class: type) -> str | None:
    """The auto class of transformers that says best what `kind` is for; None: none makes it."""
    found = [name for name, one in auto_classes(kind, config_class).items() if one is kind]
    return min(found, key=lambda name: (name == "AutoModelForPreTraining", name), default=None)


def _named(stock: str) -> str:
    return f"PerLayer{stock}"


def _code(kind: type, config_class: type, names: Mapping[str, type]) -> str:
    """The modeling file, with classes for `kind` and its body."""
    auto = {one: name for name, one in reversed(list(names.items()))}
    kinds = {one.__name__: auto.get(one, "AutoModel") for one in (kind, *names.values())}
    config = config_class.__name__
    lines = [
        Path(modeling_apt.__file__).read_text(encoding="utf-8"),
        f"\nfrom transformers import {', '.join(sorted([config, *kinds]))}  # noqa: E402\n",
        f'\n\nclass {_named(config)}(PerLayerConfig, {config}):\n    _auto_class = "AutoConfig"\n',
    ]
    for stock, name in kinds.items():
        body = f'    config_class = {_named(config)}\n    _auto_class = "{name}"\n'
        lines.append(f"\n\nclass {_named(stock)}(PerLayerModel, {stock}):\n{body}")
    return "".join(lines)


def _twin(make: Callable[[], nn.Module]) -> nn.Module | None:
    """What `make` makes, on meta; None where the class does not allow it."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return make()
        except Exception:  # a class's own code
            return None


def _shapes(model: nn.Module, wide: nn.Module | None, prefix: str = "") -> dict[str, str]:
    """{name of a Parameter: its shape}, of those that are narrower than in `wide`, a model of the same class."""
    theirs = {} if wide is None else dict(wide.named_parameters(remove_duplicate=False))
    return {
        f"{prefix}{name}": "x".join(map(str, parameter.shape))
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name in theirs and parameter.shape != theirs[name].shape
    }


def _attributes(model: nn.Module, wide: nn.Module, blocks: Blocks) -> dict[str, dict[str, int | float]]:
    """{name of a module: {attribute: number}}, of those that a cut sets and `wide` has otherwise."""
    rules = [block.rule for block in blocks.values() if block.rule is not None]
    attributes = sorted({*CONSTANTS, *(one for rule in rules for one in (*rule.counts, *rule.totals))})
    theirs = dict(wide.named_modules())
    found: dict[str, dict[str, int | float]] = {}
    for name, module in model.named_modules():
        for attribute in attributes:
            ours = _number(module, attribute)
            if ours is not None and ours != _number(theirs[name], attribute):
                found.setdefault(name, {})[attribute] = ours
    return found


def _number(module: nn.Module, attribute: str) -> int | float | None:
    """The number that an attribute of a module is, or None: also for one on meta."""
    value = getattr(module, attribute, None)
    if isinstance(value, Tensor):
        return None if value.is_meta or value.dim() or not value.is_floating_point() else float(value)
    return value if type(value) in (int, float) else None
