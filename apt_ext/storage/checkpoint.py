"""What was trained, on the disk: a configuration, the tensors, and the manifest that makes them one checkpoint.

Read into memory, no larger than the model explains, and never as pickle.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ..common.checks import FLOATING, checked_path, error_prefix, listed
from ..common.names import parameters_of
from ..config import APTConfig
from ..pruning.architectures.lookup import task_heads
from ..pruning.target import KEY, Target
from . import atomic_dir, base_model, tensor_file
from .base_model import BaseModel

CONFIG_FILE = "apt_config.json"
TENSORS_FILE = "apt_model.safetensors"
RUN_FILE = "model.safetensors"  # what Trainer calls it: with a Controller's state, in place of TENSORS_FILE
MANIFEST_FILE = "apt_manifest.json"
_FILES = (CONFIG_FILE, TENSORS_FILE)
_RUN_FILES = (CONFIG_FILE, RUN_FILE)
_FORMAT = 1  # of the two files
_MOST_TEXT = 1 << 20  # bytes of a configuration
_CHUNK = 1 << 24  # bytes that are read at once
_MOST_OF_A_RUN = 1 << 23  # values of a Controller's state
_MOST_BEFORE = 64  # times as many there may have been before a cut, of a base that was cut alike


def save(
    path: str | os.PathLike[str],
    config: APTConfig,
    tensors: dict[str, Tensor],
    stream: bool,
    whole: list[str],
    target: Target | None,
    about: Mapping[str, Any],
    file: str = TENSORS_FILE,
) -> None:
    """Write a checkpoint into the directory `path`; what `APTModel.save_pretrained` promises.

    stream  whether masks of hidden dimensions are among the tensors
    whole   the modules and Parameters that train whole: another base model may say otherwise
    target  what a Controller was to reach; left out where it is None, as in files of versions without it
    about   what `base_model.about` says
    file    of the tensors, TENSORS_FILE or RUN_FILE
    """
    from safetensors.torch import save as serialize

    directory = checked_path(path)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"path: expected a directory or a missing one, got a file: {directory}")
    if any(value.is_meta for value in tensors.values()):
        raise RuntimeError("save_pretrained: expected tensors with values, got a model on meta")
    reach = {} if target is None else {KEY: target.to_dict()}
    values = {"format": _FORMAT, "stream": stream, "saved": whole, **about, **config.to_dict(), **reach}
    text = json.dumps(values, indent=2) + "\n"
    # Copies: safetensors refuses tensors that share memory, as tied weights do.
    copies = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    with atomic_dir.made(directory), atomic_dir.stage(directory, MANIFEST_FILE) as new:
        (new / file).write_bytes(serialize(copies, {"format": "pt"}))
        (new / CONFIG_FILE).write_text(text, encoding="utf-8")
        atomic_dir.seal(new, MANIFEST_FILE)
        atomic_dir.commit(new, directory, MANIFEST_FILE, (CONFIG_FILE, file))


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Checkpoint]:
    """The checkpoint in the directory `path`, one and the same whatever is saved there meanwhile. ValueError naming the file."""
    directory = checked_path(path)
    with ExitStack() as stack:
        try:
            files = stack.enter_context(atomic_dir.opened(directory, MANIFEST_FILE, _FILES, _RUN_FILES))
        except ValueError as error:
            if (directory / MANIFEST_FILE).exists() or not (directory / "config.json").is_file():
                raise
            raise ValueError(
                f"{error}; the directory holds a whole model, as export writes it, which needs no base: load it with "
                "AutoModelFor....from_pretrained, or with apt_ext.load_export where apt_widths.json is in it"
            ) from error
        yield Checkpoint(files)


class Checkpoint:
    """One that is open; its methods read and judge. ValueError naming the file."""

    def __init__(self, files: dict[str, atomic_dir.Sealed]) -> None:
        self._of_a_run = RUN_FILE in files
        self._config, self._tensors = files[CONFIG_FILE], files[RUN_FILE if self._of_a_run else TENSORS_FILE]
        self.stream = False  # whether hidden masks are in it, once `config` was read
        self._saved: list[str] | None = None  # names of what trained whole, likewise; None: an older version wrote it
        self._heads_alone = False  # whether that version saved the task heads, and nothing else
        self.target: Target | None = None  # what a Controller was to reach, likewise
        self.base: BaseModel | None = None  # the model that it was trained on, likewise; None: an older version wrote it

    def config(self) -> APTConfig:
        """The configuration that it was saved with."""
        with error_prefix(str(self._config.path), ValueError):
            values = self._config.json(_MOST_TEXT)
            if (version := values.pop("format", None)) != _FORMAT:
                raise ValueError(f'expected "format": {_FORMAT}, which this version of apt_ext reads, got {version!r}')
            self.stream = values.pop("stream", False) is True
            saved = values.pop("saved", None)
            if saved is not None and not (isinstance(saved, list) and all(name and isinstance(name, str) for name in saved)):
                raise ValueError(f'expected "saved" to be a list of names, got {saved!r}')
            self.target = Target.of_dict(values.pop(KEY)) if KEY in values else None
            self.base = base_model.taken(values)
            config = APTConfig.from_dict(values)
            self._saved, self._heads_alone = saved, config.modules_to_save is None
            return config

    def read_through(self) -> None:
        """Read both files, to the end and for nothing else. ValueError naming the one that is damaged."""
        for file in (self._config, self._tensors):
            with error_prefix(str(file.path), ValueError):
                left = file.size
                while left:
                    left -= len(file.read(min(left, _CHUNK)))
                file.done()

    def saved_in(self, model: nn.Module) -> list[str] | None:
        """What of `model` trained whole, once `config` was read; None: what the configuration says of it."""
        if self._saved is None:
            return task_heads(model) if self._heads_alone else None
        with error_prefix(str(self._config.path), ValueError):
            for name in self._saved:
                try:
                    parameters_of(model, name)
                except AttributeError:
                    raise ValueError(f'"saved": expected names of this {type(model).__name__}, got {name!r}') from None
        return self._saved

    @contextmanager
    def tensors(self, expected: Mapping[str, Tensor], blocks: Mapping[str, int]) -> Iterator[dict[str, Tensor]]:
        """The tensors, which `check` is still to judge; a file much larger than those of `expected` is not read.

        blocks  {block: how many there are of it}: what was saved after a cut says which are left of how many

        What is refused within this context, by us or by who loads them, becomes a ValueError that names the file.
        """
        with error_prefix(str(self._tensors.path), ValueError):
            cuts = {name: _MOST_BEFORE * (count + 1) for name, count in blocks.items()}
            run = {"": _MOST_OF_A_RUN} if self._of_a_run else {}
            yield tensor_file.read(self._tensors, {**_most_values(expected), **cuts, **run})


def _free_dim(name: str) -> int | None:
    """The dimension that is a rank: any that the linear allows."""
    return {"lora_A": 0, "lora_B": 1}.get(name.rpartition(".")[2])


def _most_values(expected: Mapping[str, Tensor]) -> dict[str, int]:
    """{name: how many values it may have}: a rank goes up to the wider side, for a cut may have left less of it."""
    most = {name: like.numel() for name, like in expected.items()}
    for name, A in expected.items():
        B = expected.get(f"{name.removesuffix('lora_A')}lora_B") if name.endswith("lora_A") else None
        if B is not None and A.dim() == B.dim() == 2:
            rank = max(A.shape[1], B.shape[0], A.shape[0])
            most |= {name: rank * A.shape[1], f"{name.removesuffix('lora_A')}lora_B": rank * B.shape[0]}
    return most


def check(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], ranks: Mapping[str, int]) -> None:
    """ValueError unless the tensors are those of `expected` in name, shape and dtype.

    ranks  {adapter: the highest rank that it may have}
    """
    if found.keys() != expected.keys():
        missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        raise ValueError(f"expected the tensors of this model: {len(missing)} missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}")
    others = list(_other_widths(found, expected))
    if others:
        shown = listed(others, 4, "; ")
        raise ValueError(
            f"expected layers of the widths that this base model has, got others: {shown}. A checkpoint holds no base weights, and "
            "this one does not say what was cut: it fits only a base of its own widths (what apt_ext.export wrote holds all and "
            "needs none)"
        )
    for name, like in expected.items():
        dtype, shape, free = found[name].dtype, list(found[name].shape), _free_dim(name)
        most = max(ranks.get(name.rpartition(".")[0], 0), like.shape[free] if free is not None else 0)
        fits = (size <= most if dim == free else size == like.shape[dim] for dim, size in enumerate(shape))
        if len(shape) != like.dim() or not all(fits):
            raise ValueError(
                f"{name}: expected shape {['rank' if dim == free else size for dim, size in enumerate(like.shape)]}, got {shape}"
            )
        if dtype != like.dtype and not (dtype in FLOATING and like.is_floating_point()):
            raise ValueError(f"{name}: expected dtype {like.dtype}, got {dtype}")


def _other_widths(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Iterator[str]:
    """The masks, which are as long as a layer is wide, of another length."""
    for name, like in expected.items():
        if name.rpartition(".")[2] in ("mask_in", "mask_out") and found[name].shape != like.shape:
            yield f"{name}: expected shape {list(like.shape)}, got {list(found[name].shape)}"
