"""`export`: a directory that stock `transformers` loads."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import disk
from ..model import APTModel, adapters
from .cutting import widths
from .shrink import shrink

MANIFEST = "apt_export.json"


def export(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write an APTModel, which is shrunk, or what `shrink` returned into the directory `path`, for `from_pretrained` of its stock class.

    It is written beside `path`, loaded from there by the stock class and compared bit for bit, and takes its place in one step only then;
    whatever raises, or kills the process, leaves `path` as it was. It may be missing, empty, or hold an earlier export that nobody changed
    (apt_export.json lists the files), which is replaced.

    Raises ValueError saying which constraint fails: layers of different widths, which no stock config says; a class that is not
    transformers' own; a directory with other content; a tensor that does not come back as it was. TypeError for another kind of model.
    ImportError without transformers.
    """
    try:
        from transformers import PreTrainedModel
    except ImportError as error:
        raise ImportError('export needs transformers: pip install "apt_ext[hf]"') from error
    if not isinstance(model, APTModel) and any(True for _ in adapters(model)):
        raise TypeError(f"model: expected an APTModel or the result of shrink, got a {type(model).__name__} with adapters in it")
    target = Path(path).absolute()
    _check_target(target)
    small: Any = shrink(model) if isinstance(model, APTModel) else model
    kind = type(small)
    if not isinstance(small, PreTrainedModel):
        raise TypeError(f"model: expected a model of transformers inside, got {kind.__name__}")
    if kind.__module__.partition(".")[0] != "transformers":
        raise ValueError(f"model: expected a class of transformers, which others can load, got {kind.__module__}.{kind.__name__}")
    _check_widths(small)
    with disk.made(target.parent), disk.stage(target.parent, target.name) as beside:
        new = beside / "new"
        small.save_pretrained(new)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # of layers without neurons, which are meant
            loaded = kind.from_pretrained(new, dtype="auto", local_files_only=True)
        difference = _difference(small, loaded)
        if difference:
            raise ValueError(f"model: expected {kind.__name__} to load the same values again, but {difference}")
        disk.seal(new, MANIFEST)
        disk.place(new, target)


def _check_widths(model: Any) -> None:
    """ValueError where layers have widths that the config does not say."""
    for field, sizes in widths(model).items():
        said = getattr(model.config, field, None)
        if set(sizes.values()) != {said}:
            listed = ", ".join(f"{name}: {size}" for name, size in sizes.items())
            raise ValueError(
                f"model: expected one width for all layers, which is all that {field} of {type(model.config).__name__} can say (it says "
                f"{said}), got {listed}; mask the same number in every layer, or use the model as shrink returned it"
            )


def _check_target(target: Path) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ValueError(f"path: expected a directory, a missing or an empty one, got another kind of file: {target}")
    if target.exists() and any(target.iterdir()) and not disk.unchanged(target, MANIFEST):
        raise ValueError(
            f"path: expected a missing or empty directory, or an unchanged earlier export, got one with other content: {target}; "
            "choose another or empty it"
        )


def _difference(model: nn.Module, loaded: nn.Module) -> str | None:
    """What is not bitwise the same in two models, in words; None if nothing is."""
    ours, theirs = dict(_tensors(model)), dict(_tensors(loaded))
    if ours.keys() != theirs.keys():
        return f"their tensors differ: {sorted(ours.keys() ^ theirs.keys())[:4]}"
    for name, tensor in ours.items():
        other = theirs[name]
        if (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
            return f"{name} comes back as {other.dtype} {list(other.shape)} from {tensor.dtype} {list(tensor.shape)}"
        if not torch.equal(_bits(tensor), _bits(other)):
            return f"the values of {name} differ"
    return None


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, those included that no state_dict holds (rotary frequencies)."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
