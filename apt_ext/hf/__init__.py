"""Prune while transformers' Trainer trains: `APTCallback` for any Trainer, TRL's too, and `APTTrainer`. Needs the extra "hf"."""

try:
    import transformers as _transformers  # noqa: F401  # asked first, for an error in words
except ImportError as error:
    raise ImportError('apt_ext.hf needs transformers: python -m pip install "apt_ext[hf]"') from error

from .callback import APTCallback
from .trainer import APTTrainer

__all__ = ["APTCallback", "APTTrainer"]


def __dir__() -> list[str]:
    return sorted(__all__)
