"""The factors of an adapter that PEFT trained, from a directory or a PeftModel, which is only read."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.layer import APTAdapter
from ..common.checks import checked_path, error_prefix, linear_shape
from ..common.names import covered
from ..common.patterns import ends_with
from ..common.peft_config import fields_of, scaling_of
from ..config import APTConfig
from ..storage.atomic_dir import json_object
from .bases import is_of_peft
from .compiled import uncompiled

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MOST_TEXT = 1 << 20  # bytes of a configuration


@dataclass(frozen=True)
class Pair:
    """The factors of one linear: A [r, K], B [N, r], and what their product is multiplied by."""

    A: Tensor
    B: Tensor
    scaling: float


@dataclass(frozen=True)
class Lora:
    """An adapter of PEFT.

    fields  of its configuration
    pairs   {linear: its factors}
    saved   {module that trained whole: {name within it: value}}
    """

    fields: dict[str, Any]
    pairs: dict[str, Pair]
    saved: dict[str, dict[str, Tensor]]

    def config(self, model: nn.Module) -> APTConfig:
        """The configuration under which `model` has these adapters and no others."""
        r, alpha = self.fields["r"], self.fields["lora_alpha"]
        scaling = scaling_of(self.fields, alpha, r)
        pairs = {name: fitting(pair, model, name) for name, pair in self.pairs.items()}
        odd = {name: pair for name, pair in pairs.items() if len(pair.A) != r}
        other = {name: pair for name, pair in pairs.items() if name in odd or pair.scaling != scaling}
        return APTConfig(
            r=r,
            lora_alpha=scaling * r,
            lora_dropout=self.fields.get("lora_dropout") or 0.0,
            target_modules=list(pairs),
            modules_to_save=list(self.saved),
            rank_pattern={exactly(name): len(pair.A) for name, pair in odd.items()},
            alpha_pattern={exactly(name): pair.scaling * len(pair.A) for name, pair in other.items()},
        )

    def check(self, model: nn.Module, adapters: Mapping[str, APTAdapter], saved: Iterable[str]) -> None:
        """ValueError naming what `model`, with `adapters` and with `saved` training whole, cannot take."""
        for name, pair in self.pairs.items():
            adapter = adapters.get(name)
            if adapter is None or not adapter.rank:
                raise ValueError(f"config: expected {name} among target_modules, for which PEFT has factors")
            fitted = fitting(pair, model, name)
            if len(fitted.A) != adapter.rank or not math.isclose(fitted.scaling, adapter.scaling, rel_tol=1e-9):
                raise ValueError(
                    f"config: expected rank {len(fitted.A)} and scaling {fitted.scaling:g} for {name}, as PEFT has them, got "
                    f"{adapter.rank} and {adapter.scaling:g}"
                )
        holders: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            holders.setdefault(id(parameter), []).append(name)
        for name, values in self.saved.items():
            if not covered(name, list(saved)):
                raise ValueError(f"config: expected {name} in modules_to_save, which PEFT has trained whole")
            own = _plain_state(model, name)
            if own.keys() != values.keys() or any(own[key].shape != value.shape for key, value in values.items()):
                theirs, ours = ({key: list(v.shape) for key, v in found.items()} for found in (values, own))
                raise ValueError(f"base_model: expected {name} to hold what PEFT has trained, {theirs}, got {ours}")
            for key, value in values.items():
                others = [holder for holder in holders.get(id(own[key]), []) if not covered(holder, [name])]
                if others and not torch.equal(own[key].to(value), value):
                    raise ValueError(
                        f"base_model: expected {name}.{key} to be its own, because PEFT has trained a copy of it, got it tied "
                        f"to {others[0]}; untie them in the base model (tie_word_embeddings=False)"
                    )

    @torch.no_grad()
    def write(self, model: nn.Module, adapters: Mapping[str, APTAdapter]) -> None:
        """Put the values where `check` has found places for them."""
        for name, pair in self.pairs.items():
            fitted = fitting(pair, model, name)
            adapters[name].Wa.copy_(fitted.A)
            adapters[name].Wb.copy_(fitted.B)
        for name, values in self.saved.items():
            own = _plain_state(model, name)
            for key, value in values.items():
                own[key].copy_(value)


def read(peft: Any) -> Lora:
    """The adapter in a directory that PEFT wrote, or the only one of a PeftModel.

    TypeError for anything else. ValueError naming the file, field or tensor that cannot be taken.
    """
    if isinstance(peft, nn.Module):
        return _of_model(uncompiled(peft))
    if not isinstance(peft, str | os.PathLike):
        raise TypeError(f"peft: expected a directory or a PeftModel, got {type(peft).__name__}")
    return _of_directory(checked_path(peft))


def exactly(name: str) -> str:
    """The key of rank_pattern and alpha_pattern that is this name and not the end of another."""
    return "^" + re.escape(name)


def fitting(pair: Pair, model: nn.Module, name: str) -> Pair:
    """The factors; where PEFT's rank is above min(N, K) of the linear, some of that rank with the same product."""
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"base_model: expected a linear {name}, for which PEFT has factors, got none") from None
    if isinstance(linear, APTAdapter):
        out_features, in_features = linear.out_features, linear.in_features
    else:
        with error_prefix(name):
            out_features, in_features, _ = linear_shape(linear)
    if pair.A.shape[1:] != (in_features,) or pair.B.shape[:1] != (out_features,) or len(pair.A) != pair.B.shape[1]:
        raise ValueError(
            f"base_model: expected {name} of the sizes of PEFT's factors, lora_A {list(pair.A.shape)} and lora_B "
            f"{list(pair.B.shape)}, got {in_features} inputs and {out_features} outputs"
        )
    if len(pair.A) <= min(out_features, in_features):
        return pair
    product = (pair.B.double() @ pair.A.double()).to(pair.A.dtype)
    one = torch.eye(min(out_features, in_features), dtype=product.dtype, device=product.device)
    return Pair(product, one, pair.scaling) if out_features <= in_features else Pair(one, product, pair.scaling)


def _of_model(peft: nn.Module) -> Lora:
    configs = getattr(peft, "peft_config", None)
    if not isinstance(configs, Mapping) or not is_of_peft(peft):
        raise TypeError(f"peft: expected a directory or a PeftModel, got a {type(peft).__name__}")
    if len(configs) != 1:
        raise ValueError(
            f"peft: expected a PeftModel with one adapter, got {', '.join(configs) or 'none'}; delete_adapter(name) takes one away"
        )
    ((adapter, config),) = configs.items()
    fields = fields_of(config)
    tensors, scalings = {}, {}
    for name, module in peft.named_modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, Mapping) and adapter in scaling:
            scalings[name.removeprefix(_PREFIX)] = float(scaling[adapter])
    whole = f".modules_to_save.{adapter}."
    for key, value in peft.state_dict().items():
        if whole in key:
            tensors[key.replace(whole, ".", 1)] = value
        elif ".lora_" in key:
            tensors[re.sub(rf"(\.lora_\w+)\.{re.escape(adapter)}(?=\.weight$|$)", r"\1", key)] = value
    return _lora(fields, tensors, scalings)


def _of_directory(path: Path) -> Lora:
    for file in (CONFIG_FILE, TENSORS_FILE):
        if not (path / file).is_file():
            raise ValueError(f"{path / file}: expected a file that PEFT wrote, got none{_hint(path)}")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with error_prefix(str(path / CONFIG_FILE)):
        fields = fields_of(_json(path / CONFIG_FILE))
    with error_prefix(str(path / TENSORS_FILE)):
        try:
            tensors = load_file(path / TENSORS_FILE)
        except SafetensorError as error:
            raise ValueError(f"expected safetensors, got something else ({error})") from None
        return _lora(fields, tensors, {})


def _json(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        text = stream.read(_MOST_TEXT + 1)
    if len(text) > _MOST_TEXT:
        raise ValueError(f"expected at most {_MOST_TEXT} bytes, got more")
    try:
        return json_object(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # JSON's and Unicode's
        raise ValueError(f"expected JSON, got something else ({error})") from None


def _hint(path: Path) -> str:
    """What is in a directory instead of an adapter."""
    if (path / "adapter_model.bin").is_file():
        return "; adapter_model.bin is a pickle, which is never read: save the adapter again with PEFT"
    inner = sorted(child.name for child in path.iterdir() if (child / CONFIG_FILE).is_file()) if path.is_dir() else []
    return f"; give the directory of one adapter: {', '.join(inner)}" if inner else ""


def _lora(fields: dict[str, Any], tensors: Mapping[str, Tensor], scalings: Mapping[str, float]) -> Lora:
    """Sort tensors by what they are; what is not in `scalings`, a model's own, is as the fields say."""
    factors: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name = key.removeprefix(_PREFIX)
        factor = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if factor is not None and value.dim() == 2:
            factors.setdefault(factor[1], {})[factor[2]] = value
        elif ".lora_" in name:
            raise ValueError(f"expected factors of linears, [r, in] and [out, r], got {name} of shape {list(value.shape)}")
        else:
            module = _saved_module(name, fields.get("modules_to_save") or [])
            saved.setdefault(module, {})[name.removeprefix(f"{module}.")] = value
    pairs = {}
    for name, found in factors.items():
        if found.keys() != {"A", "B"}:
            raise ValueError(f"expected lora_A and lora_B of {name}, got only lora_{next(iter(found))}")
        rank = len(found["A"])
        pattern = fields.get("alpha_pattern") or {}
        alpha = next((alpha for key, alpha in pattern.items() if ends_with(key, name)), fields["lora_alpha"])
        pairs[name] = Pair(found["A"], found["B"], scalings.get(name, scaling_of(fields, alpha, rank)))
    if not pairs:
        raise ValueError("expected factors lora_A and lora_B, got none")
    return Lora(fields, pairs, saved)


def _saved_module(name: str, modules_to_save: Iterable[str]) -> str:
    """The module that PEFT has trained whole, of a name within it: the outermost that ends with one of `modules_to_save`."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        module = ".".join(parts[:end])
        if module.endswith(tuple(modules_to_save)):  # PEFT's rule: "classifier" is "pre_classifier" as well
            return module
    raise ValueError(
        f"expected factors of linears and modules_to_save, got {name}; PEFT writes embeddings that were resized or are "
        "targets: load them into the base model, or name them in modules_to_save"
    )


def _plain_state(model: nn.Module, module: str) -> dict[str, Tensor]:
    """{name within the module: value}, as named before wrapping and without masks and factors."""
    inner = model.get_submodule(module)
    adapters = [name for name, child in inner.named_modules() if isinstance(child, APTAdapter)]
    own = {}
    for name, value in inner.state_dict(keep_vars=True).items():
        holder = next((adapter for adapter in adapters if not adapter or name.startswith(f"{adapter}.")), None)
        if holder is None or "base_layer." in name:
            own[name.replace("base_layer.", "")] = value
    return own
