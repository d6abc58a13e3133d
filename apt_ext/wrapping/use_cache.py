"""Whether a model caches keys and values when it generates, as its config said before it was trained: Trainer sets it to False."""

from __future__ import annotations

from typing import Any

from torch import nn


def said(model: nn.Module) -> bool | None:
    """`use_cache` of the model's config; None: it does not say."""
    value = getattr(getattr(model, "config", None), "use_cache", None)
    return value if isinstance(value, bool) else None


def restore(model: Any, value: bool | None) -> None:
    """Let the config say `value` again, unless it is None."""
    if value is not None and said(model) is not None:
        model.config.use_cache = value
