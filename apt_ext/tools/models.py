"""Models from directories, for the commands; nothing is fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .data import Missing
from .phases import transformers_offline


def class_of(directory: Path) -> tuple[Any, Any]:
    """(the class of transformers that a directory's config.json names, or its AutoModel; the config). Missing in words."""
    transformers = transformers_offline()
    if not (directory / "config.json").is_file():
        raise Missing(f"model: expected a directory with a config.json, found none at {directory}")
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    except (ValueError, OSError) as error:
        raise Missing(f"model: {directory / 'config.json'}: {error}") from error
    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if names else None
    return kind or transformers.AutoModel, config


def empty_model(directory: Path) -> Any:
    """The model that config.json describes, on meta: shapes and no values."""
    kind, config = class_of(directory)
    with torch.device("meta"):
        return kind.from_config(config) if kind.__name__.startswith("Auto") else kind(config)
