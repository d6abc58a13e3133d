"""What a saved adapter says of the model that it was trained on: its name, revision and class, and the ranks of its adapters."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .._version import __version__
from ..adapter.layer import APTAdapter
from ..common.checks import checked_int, checked_keys, checked_mapping

logger = logging.getLogger("apt_ext")

_GENERIC = ("model", "models", "data", "checkpoint")  # names of directories that tell nothing
# A directory of the Hub's cache: owner, name, commit.
_IN_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]?$")
BASE, RANKS, VERSION = "base", "ranks", "apt_ext"  # in apt_config.json; files of earlier versions have none of them


@dataclass(frozen=True)
class BaseModel:
    """A base model.

    kind      the name of its class
    name      the directory or the Hub's name that it was loaded from; None: it was not loaded, or does not say
    revision  the commit of the Hub's repository; None: it is not known
    """

    kind: str
    name: str | None = None
    revision: str | None = None

    @classmethod
    def of(cls, model: nn.Module) -> BaseModel:
        """The one that `model` is, or was before adapters came."""
        name = getattr(getattr(model, "config", None), "_name_or_path", None) or None
        cached = _IN_CACHE.search(name) if name else None
        if cached is not None:
            return cls(type(model).__name__, f"{cached[1]}/{cached[2]}", cached[3])
        return cls(type(model).__name__, name, _revision(model.config, name) if name else None)

    @classmethod
    def of_dict(cls, values: Any) -> BaseModel:
        """TypeError or ValueError for what `asdict` did not give."""
        values = checked_keys(BASE, values, ("kind", "name", "revision"))
        for key, value in values.items():
            if not isinstance(value, str) and (value is not None or key == "kind"):
                raise TypeError(f"{BASE}.{key} must be a str{' or None' if key != 'kind' else ''}, got {type(value).__name__}")
            if isinstance(value, str) and (not value or len(value) > 4096 or not value.isprintable()):
                raise ValueError(f"{BASE}.{key} must be a name in printable characters, at most 4096 of them, got {value!r:.100}")
        return cls(**values)

    def tell_of_another(self, model: nn.Module) -> None:
        """Say that `model`, on which the adapters have just been put, is of another name or class than the one that they come from."""
        now = BaseModel.of(model)
        same_place = self.name is None or now.name is None or Path(self.name).name == Path(now.name).name
        if now.kind == self.kind and same_place:
            return
        logger.warning(
            "from_pretrained: the adapters were trained on %s, and were put into %s. All shapes fit, so they are loaded; results "
            "are those of training only on the same base weights",
            self,
            now,
        )

    def __str__(self) -> str:
        return f"a {self.kind}" + (f" of {self.name!r}" if self.name else "")

    @property
    def hub_name(self) -> str | None:
        """Its name where that is one of the Hub's, and no directory."""
        name = self.name
        return name if name and name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not Path(name).exists() else None

    @property
    def title(self) -> str | None:
        """Its name for people: the Hub's, that of an installed package that holds it, or its directory's."""
        parts = Path(self.name or "").parts
        if self.hub_name or not parts:
            return self.hub_name
        packages = next((i for i, part in enumerate(parts) if part in ("site-packages", "dist-packages")), len(parts) - 1)
        if packages + 1 < len(parts):
            return parts[packages + 1].replace("_", "-")
        return "/".join(parts[-2:]) if parts[-1] in _GENERIC and len(parts) > 1 else parts[-1]


def about(model: nn.Module) -> dict[str, Any]:
    """What apt_config.json says of a model with adapters, beside what it was configured to be: plain values."""
    return {VERSION: __version__, BASE: asdict(BaseModel.of(model)), RANKS: ranks_of(model)}


def ranks_of(model: nn.Module) -> dict[str, int]:
    """{adapter: its rank as it is, after growth}; those that only carry masks are left out."""
    return {name: one.rank for name, one in model.named_modules() if isinstance(one, APTAdapter) and one.rank}


def taken(values: dict[str, Any]) -> BaseModel | None:
    """Take out of `values` what `about` put in; the base, None where an earlier version wrote them. TypeError or ValueError."""
    version = values.pop(VERSION, None)
    if version is not None and not isinstance(version, str):
        raise TypeError(f"{VERSION} must be a str, the version that wrote it, got {type(version).__name__}")
    ranks: Mapping[Any, Any] = checked_mapping(RANKS, values.pop(RANKS, {}))
    for name, rank in ranks.items():
        checked_int(f"{RANKS}[{name!r:.200}]", rank, 1)
    return BaseModel.of_dict(values.pop(BASE)) if BASE in values else None


def _revision(config: Any, name: str) -> str | None:
    """The commit that the Hub's files in the cache are of, where it can be only one."""
    said = getattr(config, "_commit_hash", None)  # of earlier releases of transformers
    if isinstance(said, str):
        return said
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    try:
        file = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name of the Hub
        return None
    if not isinstance(file, str) or Path(name).is_dir():
        return None
    commit = Path(file).parent
    return commit.name if [one.name for one in commit.parent.iterdir()] == [commit.name] else None
