"""`export`: a directory that stock `transformers` loads."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor, nn

from ..common.checks import checked_bool, checked_module, checked_path
from ..common.extras import lacking
from ..common.modes import evaluating, exact_products
from ..model import APTModel, adapters
from ..pruning.architectures.lookup import Blocks, find_blocks
from ..pruning.sizes import Sizes
from ..storage import atomic_dir, hub
from ..storage import per_layer as own_format
from ..storage.formats import per_layer_refusals, retype_failures, stock_refusals
from ..storage.per_layer import MANIFEST
from ..storage.remote_code import CODE, auto_class_of
from . import cards, carried, reload
from .cards import Origin, checked_metrics
from .fresh import Reloaded, started
from .shrinking import shrink

_REMEDY = "or write it for apt_ext.load_export with per_layer=True, or use the model as shrink returned it"
# How far outputs may differ between two processes whose tensors are bitwise the same: a BLAS adds in another order at other addresses,
# and a loader derives constants in the model's dtype that a conversion had rounded.
_CLOSE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    per_layer: bool = False,
    unfinished: bool = False,
    metrics: Mapping[str, float] | None = None,
) -> str:
    """Write an APTModel, which is shrunk, or what `shrink` returned into the directory `path`, for `from_pretrained` of its stock class.

    It is written beside `path`, loaded from there in a fresh process without apt_ext, compared (every tensor bit for bit, an output to
    rounding), and takes its place in one step only then; whatever raises, or kills the process, leaves `path` as it was. It may be missing,
    empty, or hold an earlier export that nobody changed (apt_export.json lists the files), which is replaced.

    Beside the weights there are README.md, a model card with the commands that load it, and provenance.json: versions, base, settings.
    Processors, chat templates and what says how to generate travel from where the model was loaded. `use_cache` of the config is what it
    was when the adapters came, which Trainer sets to False.

    tokenizer       saved with the model (anything with `save_pretrained`, a processor too); None: the tokenizer's files in the directory
                    that the model was loaded from, or in the Hub's cache
    max_shard_size  tensors beyond it go into further files
    per_layer       where no stock config can say the widths, write them beside the stock files for `apt_ext.load_export`, and code
                    with which `from_pretrained(..., trust_remote_code=True)` loads them without apt_ext
    unfinished      write an APTModel as it is also where a Controller has not reached its density
    metrics         {name: number}, for the card

    Returns the name of the class that loads it: the model's own; another that computes the same from the same tensors, where only its
    config can say the widths (LLaMA as Mistral); or "apt_ext.load_export".

    Raises ValueError saying which constraint fails and what would pass: widths that no stock config says; a class that is not transformers'
    own; a directory with other content; a tensor or an output that does not come back. TypeError for another kind of model. RuntimeError
    where a Controller has not reached its density. ImportError without transformers.
    """
    target = checked_path(path).absolute()
    options = {"tokenizer": tokenizer, "max_shard_size": max_shard_size, "per_layer": per_layer, "unfinished": unfinished}
    return write_export(model, target, target.name, metrics=metrics, **options)


def write_export(
    model: nn.Module,
    target: Path,
    name: str,
    *,
    call: str = "export",
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    per_layer: bool = False,
    unfinished: bool = False,
    metrics: Mapping[str, float] | None = None,
) -> str:
    """`export`, with a card that loads it as `name`; `call` is what the user called."""
    checked_module("model", model)
    if not isinstance(model, APTModel) and any(True for _ in adapters(model)):
        raise TypeError(f"model: expected an APTModel or the result of shrink, got a {type(model).__name__} with adapters in it")
    if not checked_bool("unfinished", unfinished) and isinstance(model, APTModel):
        model.refuse_unfinished(call)
    numbers = checked_metrics(metrics)
    check_target(target)
    there = _entries(target)
    origin = Origin.of(model)
    inside: Any = model.model if isinstance(model, APTModel) else model
    with started(type(inside).__name__) as reloaded:
        small: Any = shrink(model, unfinished=True) if isinstance(model, APTModel) else model
        check_class(small)
        blocks = find_blocks(small)
        written, loader = expressed(small, per_layer, blocks)
        with atomic_dir.made(target.parent), atomic_dir.stage(target.parent, target.name) as beside:
            new = beside / "new"
            save = partial(save_stock, written, new, max_shard_size)
            if loader == "apt_ext":
                assert blocks.row is not None  # without one there is no such format
                save = partial(own_format.save, small, new, blocks.row, max_shard_size=max_shard_size)
            describe = partial(cards.write, new, name, written, blocks, origin, numbers)
            complete(small, new, loader, reloaded, save, tokenizer, describe)
            if _entries(target) != there:  # by others meanwhile
                check_target(target)
            atomic_dir.place(new, target)
    return "apt_ext.load_export" if loader == "apt_ext" else loader


def _entries(target: Path) -> dict[str, tuple[int, ...]]:
    """What tells whether somebody has written there, {name: [its numbers]}; nothing where nothing is."""
    found = [target, *target.iterdir()] if target.is_dir() else [target]
    stats = {str(one): one.lstat() for one in found if one.exists() or one.is_symlink()}
    return {name: (stat.st_mode, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def save_stock(written: Any, directory: Path, max_shard_size: int | str = "5GB") -> None:
    """What stock transformers writes: the class's own `save_pretrained`, not the instance's (see `stock_saving`)."""
    type(written).save_pretrained(written, directory, max_shard_size=max_shard_size)


def complete(
    small: Any,
    directory: Path,
    loader: str,
    reloaded: Reloaded,
    save: Callable[[], None],
    tokenizer: Any = None,
    describe: Callable[[bool], None] = lambda with_tokenizer: None,
) -> None:
    """Save a model with its tokenizer and seal the directory; ValueError unless a fresh process loads the same model from there.

    reloaded  of `fresh.started`
    save      writes the model into the directory
    describe  writes the card; it is told whether there is a tokenizer
    """
    saved, ended = Event(), Event()
    with ThreadPoolExecutor(3) as pool:  # hashing and the disk take as long as saving and loading
        try:
            ours = pool.submit(reload.digests, reload.listed(small), ended)
            flushed = pool.submit(atomic_dir.flush, directory, saved)
            save()
            describe(carried.carry(tokenizer, small, directory))
            saved.set()
            sealed = pool.submit(atomic_dir.seal, directory, MANIFEST)
            if loader == "apt_ext":  # which reads the manifest
                sealed.result()
            _compare(small, directory, _loaders(small, directory, loader), reloaded, ours.result())
            sealed.result()
            flushed.result()
        finally:
            saved.set()
            ended.set()


def check_class(model: nn.Module) -> None:
    """TypeError or ValueError for a model that stock transformers cannot load, whatever its sizes are. ImportError without transformers."""
    try:
        from transformers import PreTrainedModel
    except ImportError as error:
        raise ImportError(lacking("export", "transformers", error)) from error
    kind = type(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a model of transformers inside, got {kind.__name__}")
    if kind.__module__.partition(".")[0] != "transformers":
        by_code = "; load the directory with apt_ext.load_export to prune it further" if kind.__name__.startswith("PerLayer") else ""
        raise ValueError(f"model: expected a class of transformers, which others can load, got {kind.__module__}.{kind.__name__}{by_code}")


def expressed(small: Any, per_layer: bool, blocks: Blocks | None = None, remedy: str = _REMEDY) -> tuple[Any, str]:
    """The model under a class and config that can say its sizes, and what loads it; ValueError with `remedy` where there is none."""
    blocks = find_blocks(small) if blocks is None else blocks
    row, sizes, kind = blocks.row, Sizes.of(small, blocks), type(small)
    failures = stock_refusals(small, sizes)
    if not failures:
        return small, kind.__name__
    others = retype_failures(small.config, sizes)
    if not others and row is not None and row.retype is not None:
        other = _retyped(small, row.retype[0])
        if other is not None:
            return other, type(other).__name__
    refused = per_layer_refusals(small, sizes)
    if per_layer and not refused:
        return small, "apt_ext"
    also = f"; nor can another class say it: {'; '.join(others)}" if row is not None and row.retype is not None and others else ""
    if per_layer:
        remedy = f"nor can per_layer=True: {'; '.join(refused)}; use the model as shrink returned it"
    raise ValueError(f"model: expected sizes that a stock config can say, but {'; '.join(failures)}{also}; {remedy}")


def _retyped(small: Any, model_type: str) -> Any:
    """The same modules as another class of transformers that has the same names and computes the same; None where it has no such class."""
    import transformers

    own, other = type(small.config).__name__.removesuffix("Config"), model_type.capitalize()
    kind = getattr(transformers, type(small).__name__.replace(own, other, 1), None)
    if kind is None:
        return None
    config_class = getattr(transformers, f"{other}Config")
    known, own_name = config_class(), ("model_type", "architectures", "transformers_version")
    fields = {key: value for key, value in small.config.to_dict().items() if hasattr(known, key) and key not in own_name}
    twin = copy.copy(small)
    twin.__class__ = kind
    twin.config = config_class.from_dict({**fields, "sliding_window": None})
    return twin


def _loaders(small: Any, directory: Path, loader: str) -> list[str]:
    """What has to load the directory: `loader`, and the auto class by the code of a directory with widths of their own."""
    auto = auto_class_of(type(small), type(small.config)) if (directory / CODE).is_file() else None
    return [loader] if auto is None else [loader, auto]


def _compare(small: Any, directory: Path, loaders: list[str], reloaded: Reloaded, ours: dict[str, list[Any]]) -> None:
    """ValueError unless fresh processes load the same tensors by each of `loaders`, and compute the same from them.

    ours  what `reload.digests` said of the model before it ran: a forward may change a buffer
    """
    from safetensors.torch import load_file, save_file

    exchange = directory.with_name("exchange.safetensors")
    inputs, expected = probe(small)
    if expected is not None and bool(expected.isnan().any()):
        raise ValueError("model: expected outputs that are numbers, got NaN for transformers' dummy inputs: weights may hold NaN or Inf")
    for loader in loaders:
        if expected is not None:
            save_file({name: tensor.cpu().contiguous().clone() for name, tensor in inputs.items()}, exchange)
        found = reloaded(directory, loader, exchange)
        by_code = f"{loader} with trust_remote_code=True" if loader.startswith("Auto") else loader
        name = "apt_ext.load_export" if loader == "apt_ext" else by_code
        if "error" in found:
            raise ValueError(f"model: expected {name} to load it again, but it does not: {found['error']}")
        difference = _difference(ours, found["tensors"])
        if difference:
            raise ValueError(f"model: expected {name} to load the same values again, but {difference}")
        far = apart(load_file(exchange)["output"], expected.cpu()) if expected is not None else None
        if far:
            raise ValueError(f"model: expected {name} to compute the same from the same tensors, but an output differs by {far}")


def apart(output: Tensor, expected: Tensor) -> float | str | None:
    """How far an output is from what was expected, where that is more than rounding."""
    if output.shape != expected.shape:
        return "another shape"
    within = _CLOSE.get(expected.dtype, 0.0) * max(float(expected.abs().max()), 1.0) if expected.numel() else 0.0
    return None if bool(((output - expected).abs() <= within).all()) else float((output - expected).abs().max())


def probe(small: Any) -> tuple[dict[str, Tensor], Tensor | None]:
    """transformers' own dummy inputs, one row of them, and the model's first output; None where it wants other inputs."""
    words = getattr(small.config, "vocab_size", None) or 1  # an index beyond them would end a CUDA context
    inputs = {name: (tensor[:1] % words).to(small.device) for name, tensor in small.dummy_inputs.items() if isinstance(tensor, Tensor)}
    with evaluating(small), exact_products():
        try:
            return inputs, reload.first_output(small, inputs).detach()
        except (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError, StopIteration):
            return inputs, None


def check_target(target: Path) -> None:
    """ValueError unless `export` can write this directory: a missing or empty one, or an earlier export that nobody changed."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ValueError(f"path: expected a directory, a missing or an empty one, got another kind of file: {target}")
    if target.exists() and any(target.iterdir()) and not atomic_dir.unchanged(target, MANIFEST):
        raise ValueError(
            f"path: expected a missing or empty directory, or an unchanged earlier export, got one with other content: {target}; "
            "choose another or empty it"
        )


def _difference(ours: dict[str, list[Any]], theirs: dict[str, list[Any]]) -> str | None:
    """What is not the same in two answers of `reload.digests`, in words; None if nothing is."""
    if ours.keys() != theirs.keys():
        return f"their tensors differ: {sorted(ours.keys() ^ theirs.keys())[:4]}"
    for name, (dtype, shape, content) in ours.items():
        other = theirs[name]
        if [dtype, shape] != other[:2]:
            return f"{name} comes back as {other[0]} {other[1]} from {dtype} {shape}"
        if content != other[2]:
            return f"the values of {name} differ"
    return None


hub.export_with(write_export)
