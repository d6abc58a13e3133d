"""A model of transformers whose layers have widths of their own, for `from_pretrained(..., trust_remote_code=True)`.

apt_ext wrote this file; it needs torch and transformers alone. config.json describes a model as wide as the widest layer.
The classes at the end make that model and narrow it to the shapes that `config.apt_per_layer` lists:

wide        entries of config.json, with which the model is made
real        the same entries as the model says them once it is made
shapes      {name of a Parameter: "rows x columns" without spaces}, of those that are narrower
attributes  {name of a module: {name: number}}, what modules say about their heads and their width

The tensors are in files that stock classes do not look for, so that none of them fills what does not fit at random.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

WEIGHTS = "apt_weights"  # begins the names of the files with tensors
INDEX = f"{WEIGHTS}.safetensors.index.json"
_PARTS = ("wide", "real", "shapes", "attributes")


class PerLayerConfig:
    """What is added to a stock config."""

    apt_per_layer = None
    transformers_weights = INDEX  # where transformers looks for tensors instead of model.safetensors

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the stock config with the sizes that the model is made with."""
        said = checked(self)
        set_entries(self, said["wide"])
        # The code is saved beside it, so the classes are no longer those of the repository that this came from.
        vars(self)["auto_map"] = {name: str(one).rpartition("--")[2] for name, one in vars(self).get("auto_map", {}).items()}
        try:
            super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        finally:
            set_entries(self, said["real"])


class PerLayerModel:
    """What is added to a stock model."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        said = checked(config)
        set_entries(config, said["wide"])
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        narrow(self, said["shapes"], said["attributes"])
        for module in self.modules():  # type: ignore[attr-defined]
            if getattr(module, "config", None) is not None:
                set_entries(module.config, said["real"])

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write what the same classes load, with this file."""
        if push_to_hub:
            raise ValueError("push_to_hub: expected False, got True; call push_to_hub(repo_id)")
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        rename_weights(Path(save_directory))


def checked(config: Any) -> dict[str, Any]:
    """What the config says of the layers. ValueError for anything but numbers and names."""
    said = getattr(config, "apt_per_layer", None)
    if not isinstance(said, dict) or sorted(said) != sorted(_PARTS) or not all(isinstance(part, dict) for part in said.values()):
        raise ValueError(f'config.json: expected "apt_per_layer" with {", ".join(_PARTS)}, got {str(said)[:200]}')
    for part in ("wide", "real"):
        if said[part].keys() != said["wide"].keys() or not all(one is None or type(one) is int for one in said[part].values()):
            raise ValueError(f'config.json: expected numbers of the same entries in "{part}", got {str(said[part])[:200]}')
    for name, shape in said["shapes"].items():
        if not isinstance(shape, str) or not re.fullmatch(r"\d{1,15}(x\d{1,15})*", shape):
            raise ValueError(f'config.json: expected "shapes" such as "20x24", got {str(shape)[:100]!r} for {name}')
    for name, values in said["attributes"].items():
        if not isinstance(values, dict) or not all(type(one) in (int, float) and one >= 0 for one in values.values()):
            raise ValueError(f'config.json: expected "attributes" that are numbers, got {str(values)[:200]} for {name}')
    return said


def set_entries(config: Any, entries: dict[str, Any]) -> None:
    """Set entries of a config."""
    for name, value in entries.items():
        setattr(config, name, value)


def narrow(model: Any, shapes: dict[str, str], attributes: dict[str, dict[str, Any]]) -> None:
    """Cut Parameters to their shapes, from the front, and tell modules what they are now. Ties stay.

    Names are those of the model that was exported. Its body alone, and a model with another head, have other beginnings.
    """
    modules, prefix = dict(model.named_modules()), f"{model.base_model_prefix}."
    cut: dict[int, nn.Parameter] = {}

    def found(name: str) -> Any:
        return next((modules[one] for one in (name, name.removeprefix(prefix), prefix + name) if one in modules), None)

    for name, shape in shapes.items():
        path, _, last = name.rpartition(".")
        module = found(path)
        old = None if module is None else module._parameters.get(last)
        if old is None or id(old) in cut:
            continue  # a head that this class does not have, or a tied Parameter that was cut by another name
        sizes = [int(size) for size in shape.split("x")]
        if len(sizes) != old.dim() or any(size > most for size, most in zip(sizes, old.shape, strict=True)):
            raise ValueError(f"config.json: expected a shape of {name} within {list(old.shape)}, got {shape}")
        values = old.detach()[tuple(slice(size) for size in sizes)].clone()
        cut[id(old)] = nn.Parameter(values, requires_grad=old.requires_grad)
    for module in modules.values():
        for name, old in list(module._parameters.items()):
            if id(old) in cut:
                module._parameters[name] = cut[id(old)]
                _tell(module)
    for name, values in attributes.items():
        module = found(name)
        for attribute, value in values.items() if module is not None else ():
            now = getattr(module, attribute, None)
            if isinstance(now, Tensor) and now.dim() == 0:
                now.fill_(value)
            elif type(now) in (int, float):
                setattr(module, attribute, value)


def _tell(module: nn.Module) -> None:
    """Set the sizes that a module says it has."""
    weight: Any = module._parameters.get("weight")
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = tuple(weight.shape)
    elif type(module).__name__ == "Conv1D":
        module.nx, module.nf = weight.shape


def rename_weights(directory: Path) -> None:
    """Give the tensors that a stock class wrote into this directory names that stock classes do not look for, and an index."""
    from safetensors import safe_open

    for file in directory.glob(f"{WEIGHTS}*"):
        file.unlink()
    places: dict[str, str] = {}
    size = 0
    for file in sorted(directory.glob("model*.safetensors")):
        renamed = file.with_name(file.name.replace("model", WEIGHTS, 1))
        size += file.stat().st_size
        with safe_open(file, "pt") as tensors:
            places |= dict.fromkeys(tensors.keys(), renamed.name)
        file.rename(renamed)
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
