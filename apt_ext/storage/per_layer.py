"""A directory whose layers have widths of their own: the stock files, and beside them what no stock config can say.

config.json there is that of a model as wide as the widest layer, rounded up to what the config accepts. `load_export` makes that wide model
and cuts it to the widths of apt_widths.json before it loads the tensors. Their files have names of our own, so that stock `from_pretrained`
finds none and says so, whatever it is told to ignore. apt_widths.json holds the row of the table as well (see `row_file`).
The directory carries code, too, by which `from_pretrained(..., trust_remote_code=True)` loads it without apt_ext (see `remote_code`).
"""

from __future__ import annotations

import copy
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.checks import checked_path, error_prefix
from ..common.extras import lacking
from ..pruning.architectures.lookup import Architecture, architecture_of, find_blocks
from ..pruning.sizes import Sizes
from . import atomic_dir, remote_code, row_file, tensor_file
from .modeling_apt import WEIGHTS
from .shaped import shaped, unknown_entries, widest

logger = logging.getLogger("apt_ext")

MANIFEST = "apt_export.json"  # of every export
FILE = "apt_widths.json"
_OTHER_WEIGHTS = (f"{WEIGHTS}*", "model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin*")
_FORMAT = 1
_MOST_TEXT = 1 << 20  # bytes of each JSON file


def save(model: Any, directory: Path, row: Architecture, **stock: Any) -> None:
    """Write a model of this row; `stock`: further arguments of the stock `save_pretrained`."""
    blocks = find_blocks(model, row)
    sizes = Sizes.of(model, blocks)
    unknown = unknown_entries(model.config, sizes)
    if unknown:
        raise ValueError(f"model: expected sizes that its config can say at least of the widest layer, but {'; '.join(unknown)}")
    wide = copy.copy(model)  # the same modules under another config
    wide.config = copy.deepcopy(model.config)
    entries = widest(row, sizes)
    for field, width in entries.items():
        setattr(wide.config, field, width)
    type(model).save_pretrained(wide, directory, **stock)  # the instance may have one of ours, see `saving`
    real = {field: getattr(model.config, field) for field in entries}
    remote_code.write(model, wide.config, directory, blocks, real)
    says = {
        "format": _FORMAT,
        "class": type(model).__name__,
        "widths": {name: block.count for name, block in sizes.blocks.items()},
        "config": real,
        "row": row_file.written(row, model),
    }
    (directory / FILE).write_text(json.dumps(says, indent=2) + "\n", encoding="utf-8")


class PerLayerSaving:
    """`save_pretrained` of a model whose widths no stock config says: the format that `apt_ext.load_export` reads."""

    def __init__(self, model: nn.Module, row: Architecture) -> None:
        self.model, self.row = model, row
        self._said = False

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        **_: Any,
    ) -> None:
        """Write the model into the directory, which is made if it is missing; other files there stay.

        Complete on the disk before anything changes, and in place in one step, as `APTModel.save_pretrained`. On other
        processes than the main one nothing is written. RuntimeError with `push_to_hub`, whose method uploads what this
        one writes; ValueError where the model's class is none of transformers, or `save_directory` a file.
        """
        kind = type(self.model)
        if kind.__module__.partition(".")[0] != "transformers":
            raise ValueError(
                f"save_pretrained: expected a class of transformers, which load_export can make, got {kind.__module__}."
                f"{kind.__name__}; its layers have widths that no stock config says"
            )
        if push_to_hub:
            raise RuntimeError("push_to_hub: expected False, got True; call push_to_hub(repo_id), which uploads what load_export reads")
        if not is_main_process:
            return
        directory = checked_path(save_directory)
        if directory.exists() and not directory.is_dir():
            raise ValueError(f"save_directory: expected a directory or a missing one, got a file: {directory}")
        with atomic_dir.made(directory), atomic_dir.stage(directory, MANIFEST) as beside:
            new = beside / "new"
            save(self.model, new, self.row, state_dict=state_dict, max_shard_size=max_shard_size)
            names = sorted(file.name for file in new.iterdir())
            atomic_dir.seal(new, MANIFEST)
            atomic_dir.commit(new, directory, MANIFEST, names)
        for pattern in _OTHER_WEIGHTS:  # of earlier saves here, which stock loading would find; stock saving removes them, too
            for file in directory.glob(pattern):
                if file.name not in names:
                    file.unlink(missing_ok=True)
        if not self._said:
            self._said = True
            logger.warning(
                "save_pretrained: the widths of this %s differ by layer or from what its config can say, so %s is for "
                "apt_ext.load_export, or for from_pretrained(..., trust_remote_code=True); without it stock classes find no tensors there",
                kind.__name__,
                directory,
            )


def load_export(path: str | os.PathLike[str]) -> nn.Module:
    """The model in a directory that `export(..., per_layer=True)` wrote, of its stock class, in evaluation mode and in its own dtype.

    A directory that stock transformers can load has no apt_widths.json and is not for this function. Nothing is read as pickle, and no code
    of the directory runs, which `from_pretrained(..., trust_remote_code=True)` of transformers does.
    The directory holds the row of the table by which the model was cut, so a row that was registered need not be registered here;
    only to prune the model further it has to be.

    Raises ValueError naming the file where it is missing, damaged, or does not fit the tensors. ImportError without transformers.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(lacking("load_export", "transformers", error)) from error
    directory = checked_path(path)
    with atomic_dir.opened(directory, MANIFEST) as files:
        if FILE not in files or "config.json" not in files:
            raise ValueError(f"{directory / FILE}: expected it and config.json in {MANIFEST}, got {sorted(files)[:8]}")
        with error_prefix(str(directory / FILE), ValueError):
            said = files[FILE].json(_MOST_TEXT)
            kind = getattr(transformers, str(said.get("class")), None)
            if said.get("format") != _FORMAT or not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
                raise ValueError(f'expected "format": {_FORMAT} and the name of a model class of transformers, got {str(said)[:200]}')
            counts, entries = said.get("widths"), said.get("config")
            for name, numbers, also in (("widths", counts, ()), ("config", entries, (None,))):
                good = isinstance(numbers, dict) and all(
                    number in also or (type(number) is int and number >= 0) for number in numbers.values()
                )
                if not good:
                    raise ValueError(f'expected "{name}" to be numbers, got {str(numbers)[:200]}')
            row = row_file.read(said["row"]) if "row" in said else None
            model = _made(kind, files["config.json"], row, counts or {}, entries or {})
        _load_tensors(model, directory, [file for name, file in files.items() if name.endswith(".safetensors")])
        own_row = row or architecture_of(model)
        assert own_row is not None  # by which it was just made
        vars(model)["save_pretrained"] = PerLayerSaving(model, own_row)
    return model.eval()  # type: ignore[no-any-return]


def _made(kind: Any, file: atomic_dir.Sealed, row: Architecture | None, counts: dict[str, int], entries: dict[str, int]) -> Any:
    """A model with these numbers of blocks, whose values are of no account."""
    with error_prefix("config.json"):
        said = {entry: value for entry, value in file.json(_MOST_TEXT).items() if entry not in remote_code.ENTRIES}
        config = kind.config_class.from_dict(said)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(config, "dtype", None) or before)
    try:
        return shaped(kind, config, row, counts, entries)
    finally:
        torch.set_default_dtype(before)


def _load_tensors(model: nn.Module, directory: Path, files: list[atomic_dir.Sealed]) -> None:
    """ValueError unless the files hold each of the model's tensors, a tied one under any of its names, and no other."""
    state = model.state_dict(keep_vars=True)

    sizes = {name: value.numel() for name, value in state.items()}
    tensors: dict[str, Tensor] = {}
    for file in files:
        with error_prefix(str(file.path), ValueError):
            found = tensor_file.read(file, sizes)
            wrong = [name for name, value in found.items() if name not in state or state[name].shape != value.shape]
            if wrong or found.keys() & tensors.keys():
                raise ValueError(
                    f"expected the tensors of {FILE}, each once: unknown, of another shape or twice {(wrong or list(found))[:3]}"
                )
            tensors |= found
    came = {id(state[name]) for name in tensors}
    missing = [name for name, tensor in state.items() if id(tensor) not in came]
    with error_prefix(str(directory), ValueError):
        if missing:
            raise ValueError(f"expected the tensors of {FILE}: missing {missing[:3]}")
        model.load_state_dict(tensors, strict=False)
