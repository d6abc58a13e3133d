"""Prune while transformers' Trainer trains: `APTCallback` for any Trainer, TRL's too, and `APTTrainer`. Needs the extra "hf"."""

try:
    import transformers as _transformers  # noqa: F401  # asked first, for an error in words
except ImportError as error:
    from ..common.extras import lacking

    raise ImportError(lacking("apt_ext.hf", "transformers", error)) from error

from .callback import APTCallback
from .trainer import APTTrainer

__all__ = ["APTCallback", "APTTrainer"]


def __dir__() -> list[str]:
    return sorted(__all__)
