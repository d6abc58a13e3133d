"""What a configuration of PEFT's LoRA means here, or why it is refused. Imports no PEFT."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from .checks import checked_bool, checked_int, checked_number, listed
from .patterns import checked_regex

# What APTConfig has too, under the same name.
SAME = ("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "exclude_modules", "target_modules", "modules_to_save")
# What says where the adapter came from, what acts only with a field that is refused, and what is read below.
_ELSEWHERE = (
    "peft_type",
    "peft_version",
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
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
_MERGE_FIRST = "an adapter is W x + s B A x here; merge it with PEFT (merge_and_unload) and train on from that model"
_LEAVE_OUT = "leave it out"
_REFUSED = {
    "use_dora": _MERGE_FIRST,
    "lora_bias": _MERGE_FIRST,
    "kasa_config": _MERGE_FIRST,
    "velora_config": _MERGE_FIRST,
    "monteclora_config": _MERGE_FIRST,
    "use_bdlora": _MERGE_FIRST,
    "use_qalora": "quantised linears get no adapter; load the model without quantisation",
    "megatron_config": "parallel linears of Megatron get no adapter; load the model as transformers has it",
    "layer_replication": "it makes another model; replicate the layers in the base model, then name them in target_modules",
    "target_parameters": "only linears get adapters, no lone Parameters such as those of experts; name linears in target_modules",
    "trainable_token_indices": "embeddings train whole or not at all; name the embedding in modules_to_save",
    "alora_invocation_tokens": "an adapter acts on all tokens; " + _LEAVE_OUT,
    "arrow_config": "there is no routing among adapters; " + _LEAVE_OUT,
    "ensure_weight_tying": "tied weights that train stay tied without being told, and a tied linear gets no adapter; " + _LEAVE_OUT,
}
# Ways to initialise that leave the base weights alone and start, like ours, where the product of the factors is zero.
_INITIALISED = ("gaussian", "eva", "orthogonal")
# PEFT adds these names for these tasks when it wraps a model, whether or not the model has them.
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}

logger = logging.getLogger("apt_ext")


def fields_of(lora_config: Any) -> dict[str, Any]:
    """The fields of a LoraConfig, or of the dict in adapter_config.json, once nothing in it is refused.

    TypeError for another object, and for a field of another type. ValueError naming a field that asks for what there is
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
    for name, value in values.items():
        if name not in SAME and name not in _ELSEWHERE and (value or name in _REFUSED and isinstance(value, Mapping)):
            why = _REFUSED.get(name, "this version does not know it")
            raise ValueError(f"lora_config: {name} has no meaning here, got {value!r:.200}; {why}")
    _check_types(values)
    if _plain(values.get("bias") or "none") != "none":
        raise ValueError(f"lora_config: expected bias='none', since biases of frozen layers do not train here, got {values['bias']!r}")
    start = values.get("init_lora_weights", True)
    if isinstance(start, str) and start not in _INITIALISED:
        raise ValueError(
            f"lora_config: expected init_lora_weights that leaves the base weights as they are, got {start!r}; convert "
            "it first (PEFT's path_initial_model_for_weight_conversion)"
        )
    return dict(values)


def translated(lora_config: Any) -> dict[str, Any]:
    """What APTConfig takes for a LoraConfig; raises what `fields_of` does, also for what only a model can resolve."""
    values = fields_of(lora_config)
    if values.get("target_modules") is None:
        raise ValueError(
            "lora_config: expected target_modules, got None, which PEFT resolves when it wraps a model; use "
            "peft_model.peft_config['default'], or name them"
        )
    found = {name: values[name] for name in SAME if values.get(name) is not None}
    if isinstance(values.get("exclude_modules"), Collection) and not isinstance(values["exclude_modules"], str):
        found["exclude_modules"] = sorted(values["exclude_modules"]) or None
    found["target_modules"] = _targets(values)
    found["modules_to_save"] = _saved(values)
    if values.get("use_rslora"):
        found |= _rank_stabilised(values)
    start = values.get("init_lora_weights", True)
    if start is not True and start is not None:
        logger.warning(
            "init_lora_weights: %r is not taken over; lora_A starts Gaussian with standard deviation 1 / sqrt(3 in_features) "
            "and lora_B at zero, as with True. APTModel.from_peft takes factors that PEFT has initialised or trained",
            start,
        )
    return found


def scaling_of(values: Mapping[str, Any], alpha: float, rank: int) -> float:
    """The scaling of an adapter of PEFT."""
    return float(alpha / (math.sqrt(rank) if values.get("use_rslora") else rank))


def _check_types(values: Mapping[str, Any]) -> None:
    """TypeError or ValueError for fields that could not be read: a file may hold anything."""
    checked_int("lora_config: r", values["r"], 1)
    checked_number("lora_config: lora_alpha", values["lora_alpha"])
    checked_bool("lora_config: use_rslora", values.get("use_rslora") or False)
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = values.get(name) or {}
        if not isinstance(pattern, Mapping) or not all(isinstance(key, str) for key in pattern):
            raise TypeError(f"lora_config: {name}: expected a dict with regular expressions as keys, got {pattern!r:.200}")
        for key, value in pattern.items():
            checked_regex(f"lora_config: key of {name}", key)
            if name == "rank_pattern":
                checked_int(f"lora_config: {name}[{key!r}]", value, 1)
            else:
                checked_number(f"lora_config: {name}[{key!r}]", value)
    for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        entries = values.get(name)
        is_text = isinstance(entries, str) and name != "modules_to_save"
        is_list = isinstance(entries, list | tuple | set) and all(isinstance(entry, str) for entry in entries)
        if entries is not None and not is_text and not is_list:
            raise TypeError(f"lora_config: {name}: expected a list of names, got {entries!r:.200}")
    layers = values.get("layers_to_transform")
    given = layers if isinstance(layers, list | tuple | set) else [] if layers is None else [layers]
    for layer in given:
        checked_int("lora_config: layers_to_transform", layer, 0)


def _targets(values: Mapping[str, Any]) -> list[str] | str:
    """target_modules, within layers_to_transform where there are some."""
    targets, layers = values["target_modules"], values.get("layers_to_transform")
    if layers is None or isinstance(layers, list | tuple | set) and not layers:
        if isinstance(targets, str):
            return targets.lower() if targets.lower() == "all-linear" else targets
        return sorted(targets)
    if isinstance(targets, str):
        raise ValueError(
            f"lora_config: expected target_modules as a list where layers_to_transform is given, as in PEFT, got {targets!r:.200}"
        )
    return _in_layers(sorted(targets), [layers] if isinstance(layers, int) else sorted(layers), values.get("layers_pattern"))


def _in_layers(targets: list[str], layers: list[int], patterns: Any) -> str:
    """One expression for what PEFT makes of target_modules, layers_to_transform and layers_pattern.

    A target that is a whole name is one in any layer. Of others the first number behind a name, or behind the first of
    `patterns` that there is, has to be one of `layers`: the atomic group (?>...) finds that place and keeps to it.
    """
    names = "|".join(map(re.escape, targets))
    patterns = [patterns] if patterns and isinstance(patterns, str) else list(patterns or ())
    odd = next((pattern for pattern in patterns if not _is_name(pattern)), None)
    if odd is not None:
        raise ValueError(
            f"lora_config: expected layers_pattern to hold names such as 'layers', got {odd!r:.200}; name the layers in target_modules"
        )
    places = [rf"(?:|.*?\.){re.escape(pattern)}" for pattern in patterns] or [r".*?\.[^.]*"]
    place = "|".join(rf"{before}\.(?=\d+\.)" for before in places)
    number = "|".join(map(str, layers))
    return rf"(?:{names})|(?=(?>{place})0*(?:{number})\.).*\.(?:{names})"


def _saved(values: Mapping[str, Any]) -> list[str] | None:
    """modules_to_save with what PEFT adds for the task; None: the head that the model has."""
    saved = list(dict.fromkeys(values.get("modules_to_save") or []))
    task = _plain(values.get("task_type"))
    heads = _HEADS.get(task, ()) if isinstance(task, str) else ()
    others = [name for name in saved if name not in heads]
    if not heads or others and len(heads) == 1:
        return [*others, *heads]
    if not others:
        return None
    if len(saved) - len(others) == 1:
        return saved  # one head is named
    raise ValueError(
        f"lora_config: expected modules_to_save that name the one head of the model beside {listed(others, 4)}, because with task_type "
        f"{task} PEFT adds {' and '.join(heads)}, whichever there is, got {listed(saved, 8)}; APTModel.from_peft finds it, or leave the "
        "others out of modules_to_save"
    )


def _rank_stabilised(values: Mapping[str, Any]) -> dict[str, Any]:
    """lora_alpha and alpha_pattern whose lora_alpha / r is PEFT's lora_alpha / sqrt(r)."""
    r, alpha = values["r"], values["lora_alpha"]
    ranks, alphas = values.get("rank_pattern") or {}, values.get("alpha_pattern") or {}
    if ranks and alphas and not all(map(_is_name, (*ranks, *alphas))):
        raise ValueError(
            "lora_config: expected use_rslora with rank_pattern or alpha_pattern, or names as keys of both, got both with "
            "expressions, of which only a model says which meet; APTModel.from_peft takes them"
        )
    pattern: dict[str, float] = {}
    for key, own in alphas.items():
        for other, rank in ranks.items():
            longer, shorter = (key, other) if len(key) > len(other) else (other, key)
            if f".{longer}".endswith(f".{shorter}"):  # what ends with both ends with the longer one
                pattern.setdefault(longer, own * math.sqrt(rank))
        pattern.setdefault(key, own * math.sqrt(r))
    for key, rank in ranks.items():
        pattern.setdefault(key, alpha * math.sqrt(rank))
    return {"lora_alpha": alpha * math.sqrt(r), "alpha_pattern": pattern}


def _is_name(pattern: str) -> bool:
    return re.fullmatch(r"[\w.]+", pattern) is not None


def _plain(value: Any) -> Any:
    """An entry of an enum as the text that JSON has for it."""
    return getattr(value, "value", value)
