"""APTConfig: which linears get an adapter, of which rank and scaling, what else trains, and what is pruned when. PEFT's names where the
meaning is PEFT's."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from .common.checks import error_prefix, listed
from .common.patterns import checked_regex, ends_with, matches
from .common.peft_config import SAME, translated

Patterns = list[str] | str
ALL_LINEAR = "all-linear"
KINDS = ("heads", "neurons", "hidden")


@dataclass(frozen=True)
class Schedule:
    """When blocks are pruned and ranks grow. An int counts optimizer steps, a float is a share of all steps.

    start    from here events are spread evenly; nothing is pruned or grows before
    warm_up  for so long after `start` the density stays what it is
    end      the last event: the density is at its target, every mask is exactly 0 or 1
    events   how many; at each of them ranks grow and, once the warm-up is over, masks become exactly 0 or 1
    window   masks move in so many steps before an event, by 1 / window a step; None: in all of them from event to event
    per_step masks move at every step after the warm-up, towards the density of that step; events only grow ranks, but for the last

    Raises TypeError (types) and ValueError (values), naming the field.
    """

    start: int | float = 0.1
    warm_up: int | float = 0
    end: int | float = 0.5
    events: int = 4
    window: int | float | None = None
    per_step: bool = False

    def __post_init__(self) -> None:
        for name in ("start", "warm_up", "end", "window"):
            value = getattr(self, name)
            if name == "window" and value is None:
                continue
            _check_number(f"schedule.{name}", value)
            if value < 0 or isinstance(value, float) and value > 1.0:
                raise ValueError(f"schedule.{name}: expected a number of steps (int) or a share of all in [0, 1] (float), got {value}")
        _check_int("schedule.events", self.events)
        _check_bool("schedule.per_step", self.per_step)


@dataclass(frozen=True)
class APTConfig:
    """What `get_apt_model` builds. Frozen: derive another with `dataclasses.replace`.

    r               rank of each adapter, at least 1; a linear too narrow for it gets the rank that it can hold
    lora_alpha      scaling is lora_alpha / r at the start and then constant, also when the rank grows
    lora_dropout    probability of dropping a low-rank input during training, in [0, 1)
    target_modules  the linears that get an adapter: names or ends of names ("query", "attention.self.query"), one regular expression for
                    the whole name, or "all-linear": all but the output layer of a language model and what modules_to_save holds
    exclude_modules the same, taken out of target_modules
    modules_to_save names or ends of names of modules that train whole; []: none; None: the task head of a stock model,
                    and what `from_pretrained` drew at random because its checkpoint did not hold it
    rank_pattern    {regular expression for the end of a name: rank}; the first that matches replaces r; it has to fit
    alpha_pattern   the same for lora_alpha
    max_rank        storage reserved for growth (see APTAdapter), None: growth re-allocates
    float32_factors all that trains in a 16-bit model, factors and whole modules, is float32, and so are its gradients and
                    optimizer state: steps that 16 bits would round away are not lost, and torch.amp.GradScaler works;
                    False: it has the model's dtype

    What a Controller does, and building the model does not read:

    prune           kinds of blocks that are pruned, of "heads", "neurons" and "hidden". None: heads and neurons where the
                    model's stock config can store what is left; neurons alone where it cannot store other heads (BERT,
                    GPT-2) and the density can be reached so; else heads and neurons, with a warning
    density         share of the layers' parameters (or what the Controller's budget counts) to keep, in [0, 1]
    schedule        a Schedule, or a dict of its fields
    round_to        neurons and hidden dimensions go in groups of so many, so that widths stay multiples of it
    uniform         every layer keeps the same number of each kind, as stock configs can say; False: each layer its own

    Raises TypeError (types) and ValueError (values), naming the field.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: Patterns = ALL_LINEAR
    exclude_modules: Patterns | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    max_rank: int | None = None
    float32_factors: bool = False
    prune: list[str] | None = None
    density: float = 1.0
    schedule: Schedule = field(default_factory=Schedule)
    round_to: int = 8
    uniform: bool = True

    def __post_init__(self) -> None:
        _check_int("r", self.r)
        _check_number("lora_alpha", self.lora_alpha)
        _check_number("lora_dropout", self.lora_dropout)
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout: expected a probability in [0, 1), got {self.lora_dropout}")
        _check_number("density", self.density)
        if not 0.0 <= self.density <= 1.0:
            raise ValueError(f"density: expected a share in [0, 1], got {self.density}")
        _check_int("round_to", self.round_to)
        prune = None if self.prune is None else _checked_names("prune", self.prune, regex=False)
        for kind in prune or ():
            if kind not in KINDS:
                raise ValueError(f"prune: expected kinds of {', '.join(KINDS)}, got {kind!r}")
        schedule = _checked_schedule(self.schedule)
        for name in ("uniform", "float32_factors"):
            _check_bool(name, getattr(self, name))
        ranks, alphas = _checked_patterns("rank_pattern", self.rank_pattern), _checked_patterns("alpha_pattern", self.alpha_pattern)
        for key, rank in ranks.items():
            _check_int(f"rank_pattern[{key!r}]", rank)
        for key, alpha in alphas.items():
            _check_number(f"alpha_pattern[{key!r}]", alpha)
        if self.max_rank is not None:
            _check_int("max_rank", self.max_rank)
            if max(self.r, *ranks.values(), 0) > self.max_rank:
                raise ValueError(f"max_rank: expected at least r and every rank of rank_pattern, got {self.max_rank}")
        targets = _checked_names("target_modules", self.target_modules, regex=True)
        exclude = None if self.exclude_modules is None else _checked_names("exclude_modules", self.exclude_modules, regex=True)
        save = None if self.modules_to_save is None else _checked_names("modules_to_save", self.modules_to_save, regex=False)
        if not targets:
            raise ValueError("target_modules: expected at least one name, got none")
        # Copies: what the caller's lists and dicts become later is not this configuration.
        for name, value in (
            ("target_modules", targets),
            ("exclude_modules", exclude),
            ("modules_to_save", save),
            ("prune", prune),
            ("schedule", schedule),
            ("rank_pattern", ranks),
            ("alpha_pattern", alphas),
        ):
            object.__setattr__(self, name, value)

    def rank_of(self, name: str) -> int:
        """The rank of the adapter of this name."""
        return next((rank for key, rank in self.rank_pattern.items() if ends_with(key, name)), self.r)

    def scaling_of(self, name: str) -> float:
        """lora_alpha / r with both taken from the patterns where they match."""
        alpha = next((alpha for key, alpha in self.alpha_pattern.items() if ends_with(key, name)), self.lora_alpha)
        return alpha / self.rank_of(name)

    def targets(
        self,
        linears: Collection[str],
        saved: Collection[str],
        output: str | None,
        *,
        drawn: Collection[str] = (),
        others: Mapping[str, str] | None = None,
    ) -> list[str]:
        """The names among `linears` that get an adapter, in their order.

        `saved` are the linears that train whole, `output` is the output layer of a language model; neither gets one
        by "all-linear". `drawn` are those of `saved` that nobody asked to save: naming one gives it no adapter. `others`
        {name: what it is} are no linears.

        ValueError, with the nearest names, for a name, expression or pattern that matches nothing, or only others of
        `saved` or `others`.
        """
        free = [name for name in linears if name not in saved]
        if self.target_modules == ALL_LINEAR:
            chosen = [name for name in free if name != output]
        else:
            apart = dict(others or {}) | dict.fromkeys(saved, " of modules_to_save, which train whole; name others to save")
            chosen = select("target_modules", self.target_modules, [*free, *drawn], apart)
            chosen = [name for name in chosen if name not in drawn]
        if self.exclude_modules is not None:
            excluded = set(select("exclude_modules", self.exclude_modules, linears))
            chosen = [name for name in chosen if name not in excluded]
        if not chosen:
            raise ValueError(f"target_modules: expected at least one linear layer, got none of {listed(linears, 4) or 'an empty list'}")
        for argument, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for key in pattern:
                if not any(ends_with(key, name) for name in (*chosen, *drawn)):
                    raise ValueError(f"{argument}: expected the end of a target's name, got {key!r}{nearest(key, chosen)}")
        return chosen

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON holds; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> APTConfig:
        """The configuration that `to_dict` wrote. An unknown key is a ValueError that names the closest known one."""
        if not isinstance(values, Mapping):
            raise TypeError(f"values: expected a dict, got {type(values).__name__}")
        _check_fields("values", cls, values)
        return cls(**values)

    @classmethod
    def from_peft(cls, lora_config: Any, **more: Any) -> APTConfig:
        """Translate a `peft.LoraConfig`, or the dict of one in adapter_config.json; `more` are further fields of APTConfig.

        Ranks, scalings (rsLoRA's too), dropout, targets, layers_to_transform and modules_to_save come through. PEFT's
        modules_to_save=None is [] here, or with a task_type that has a head that head (None here). Names in it are whole
        or begin behind a dot here; to PEFT "norm" is "input_layernorm" as well. How PEFT initialises factors does not come
        through; the logger "apt_ext" says so where it is not PEFT's default.

        ValueError naming a field of PEFT that asks for what there is not (DoRA, trained biases, target_parameters, ...),
        and a field of `more` that is unknown or is PEFT's too with another value. TypeError for another object.
        """
        found = translated(lora_config)
        _check_fields("more", cls, more)
        for name in SAME:
            said = found.get(name, _DEFAULTS[name])
            if name in more and more[name] != said:
                raise ValueError(
                    f"{name}: expected it in lora_config alone, which says {said!r:.200}, got {more[name]!r:.200}; change the "
                    f"LoraConfig, or the result with dataclasses.replace(config, {name}=...)"
                )
        return cls(**{**found, **more})


_DEFAULTS = {entry.name: entry.default for entry in dataclasses.fields(APTConfig)} | {"rank_pattern": {}, "alpha_pattern": {}}


def select(
    argument: str,
    patterns: Patterns,
    names: Collection[str],
    others: Mapping[str, str] | None = None,
) -> list[str]:
    """The `names` that match: a list holds names or ends of names, a string is one expression for whole names.

    ValueError, with the nearest names, for an entry that matches nothing, or only `others`, {name: words on it}.
    """
    found: set[str] = set()
    for entry in [patterns] if isinstance(patterns, str) else patterns:
        with error_prefix(argument):
            matched = [name for name in names if _is_meant(patterns, entry, name)]
            apart = [] if matched else [name for name in others or () if _is_meant(patterns, entry, name)]
        if not matched:
            if apart and others is not None:
                why = f", which matches only {listed(apart, 4)}{others[apart[0]]}{nearest(entry, names)}"
            else:
                why = f", which matches none{nearest(entry, names)}"
            raise ValueError(f"{argument}: expected names of modules of this model, got {entry!r}{why}")
        found.update(matched)
    return [name for name in names if name in found]


def _is_meant(patterns: Patterns, entry: str, name: str) -> bool:
    return matches(entry, name) if isinstance(patterns, str) else f".{name}".endswith(f".{entry}")


def nearest(wanted: str, names: Iterable[str]) -> str:
    """ "; nearest: a, b" for an error message, comparing as many parts of the names as `wanted` has."""
    parts = wanted.count(".") + 1
    ends = sorted({".".join(name.split(".")[-parts:]) for name in names})
    close = get_close_matches(wanted, ends, n=3, cutoff=0.4) or ends[:6]
    return f"; nearest: {', '.join(close)}" if close else ""


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def _check_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value) or isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError(f"{name}: expected a finite number, got {value}")


def _checked_names(name: str, value: Any, regex: bool) -> Any:
    if regex and isinstance(value, str):
        return checked_regex(name, value)
    if not isinstance(value, list | tuple | set) or not all(isinstance(entry, str) for entry in value):
        raise TypeError(f"{name}: expected a list of names{' or a regular expression' if regex else ''}, got {value!r}")
    if "" in value:
        raise ValueError(f"{name}: expected names, got an empty one")
    return sorted(value) if isinstance(value, set) else list(value)


def _checked_schedule(value: Any) -> Schedule:
    if isinstance(value, Schedule):
        return value
    if not isinstance(value, Mapping):
        raise TypeError(f"schedule: expected a Schedule or a dict of its fields, got {type(value).__name__}")
    _check_fields("schedule", Schedule, value)
    return Schedule(**value)


def _check_fields(argument: str, cls: type, values: Mapping[str, Any]) -> None:
    """ValueError for a key that is no field of the dataclass `cls`, with the closest one."""
    known = [entry.name for entry in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            raise ValueError(f"{argument}: expected fields of {cls.__name__}, got {key!r}{nearest(str(key), known)}")


def _checked_patterns(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{name}: expected a dict with regular expressions as keys, got {value!r}")
    return {checked_regex(f"key of {name}", key): entry for key, entry in value.items()}
