"""What a configuration of PEFT's LoRA means here, or why it is refused. Imports no PEFT."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .checks import checked_int, checked_number

# What APTConfig has too, under the same name.
_SAME = ("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "exclude_modules")
# What says where the adapter came from or how it was initialised, and what is read where it matters.
_ELSEWHERE = (
    "peft_type",
    "peft_version",
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "target_modules",
    "modules_to_save",
    "fan_in_fan_out",  # the class of the linear says it
    "use_rslora",
    "bias",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
)
# Ways to initialise that leave the base weights alone.
_INITIALISED = ("gaussian", "eva", "orthogonal")
# PEFT adds these names for these tasks, whether or not the model has them.
HEADS = ("classifier", "score")
_HEADS_ADDED = ("SEQ_CLS", "TOKEN_CLS")


def fields_of(lora_config: Any) -> dict[str, Any]:
    """The fields of a LoraConfig, or of the dict in adapter_config.json, once nothing in it is refused.

    TypeError for another object, and for an r or lora_alpha that is no number. ValueError naming a field that asks for what there is
    not.
    """
    values = lora_config if isinstance(lora_config, Mapping) else getattr(lora_config, "to_dict", lambda: None)()
    if not isinstance(values, Mapping) or "peft_type" not in values:
        raise TypeError(f"lora_config: expected a peft.LoraConfig or the dict of one, got {type(lora_config).__name__}")
    kind = _plain(values["peft_type"])
    if kind != "LORA":
        raise ValueError(f"lora_config: expected peft_type LORA, got {kind}")
    for name in ("r", "lora_alpha"):
        if name not in values:
            raise ValueError(f"lora_config: expected {name}, which is missing")
    checked_int("lora_config: r", values["r"], 1)
    checked_number("lora_config: lora_alpha", values["lora_alpha"])
    if _plain(values.get("bias", "none")) != "none":
        raise ValueError(f"lora_config: expected bias='none', since biases of frozen layers do not train here, got {values['bias']!r}")
    start = values.get("init_lora_weights", True)
    if isinstance(start, str) and start not in _INITIALISED:
        raise ValueError(
            f"lora_config: expected init_lora_weights that leaves the base weights as they are, got {start!r}; convert "
            "it first (PEFT's path_initial_model_for_weight_conversion)"
        )
    for name, value in values.items():
        if name not in _SAME and name not in _ELSEWHERE and value:
            raise ValueError(f"lora_config: {name} has no meaning here, got {value!r}; an adapter is W x + s B A x")
    return dict(values)


def translated(lora_config: Any) -> dict[str, Any]:
    """What APTConfig takes for a LoraConfig; raises what `fields_of` does, also for what only a model can resolve."""
    values = fields_of(lora_config)
    if values.get("target_modules") is None:
        raise ValueError(
            "lora_config: expected target_modules, got None, which PEFT resolves when it wraps a model; use peft_model.peft_config"
        )
    if values.get("layers_to_transform") is not None:
        raise ValueError(
            "lora_config: expected no layers_to_transform; APTModel.from_peft takes them, or name the layers in target_modules"
        )
    found = {name: values[name] for name in _SAME if values.get(name) is not None}
    targets = values["target_modules"]
    found["target_modules"] = targets if isinstance(targets, str) else sorted(targets)
    if isinstance(values.get("exclude_modules"), set):
        found["exclude_modules"] = sorted(values["exclude_modules"])
    saved = list(values.get("modules_to_save") or [])
    if _plain(values.get("task_type")) in _HEADS_ADDED and set(saved) == set(HEADS):
        found["modules_to_save"] = None  # the head that the model has
    else:
        found["modules_to_save"] = saved
    if values.get("use_rslora"):
        found |= _rank_stabilised(values)
    return found


def scaling_of(values: Mapping[str, Any], alpha: float, rank: int) -> float:
    """The scaling of an adapter of PEFT."""
    return float(alpha / (math.sqrt(rank) if values.get("use_rslora") else rank))


def _rank_stabilised(values: Mapping[str, Any]) -> dict[str, Any]:
    """lora_alpha and alpha_pattern whose lora_alpha / r is PEFT's lora_alpha / sqrt(r)."""
    r, alpha = values["r"], values["lora_alpha"]
    ranks, alphas = values.get("rank_pattern") or {}, values.get("alpha_pattern") or {}
    if ranks and alphas:
        raise ValueError(
            "lora_config: expected use_rslora with rank_pattern or alpha_pattern, got both, of which only a model says "
            "which meet; APTModel.from_peft takes them"
        )
    pattern = {key: alpha * math.sqrt(rank) for key, rank in ranks.items()}
    pattern |= {key: own * math.sqrt(r) for key, own in alphas.items()}
    return {"lora_alpha": alpha * math.sqrt(r), "alpha_pattern": pattern}


def _plain(value: Any) -> Any:
    """An entry of an enum as the text that JSON has for it."""
    return getattr(value, "value", value)
