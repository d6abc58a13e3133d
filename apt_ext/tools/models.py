"""Models from directories, for the commands; nothing is fetched."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..common.extras import lacking
from ..pruning.on_meta import positions
from .data import Missing

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


def transformers_offline() -> Any:
    """The transformers library, told to fetch nothing and to keep its bars and notices to itself."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    try:
        import transformers
    except ImportError as error:
        raise Missing(lacking("this command", "transformers", error)) from error
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return transformers


def class_of(path: Path) -> tuple[Any, Any]:
    """(the class of transformers that a directory's config.json names, or its AutoModel; the config). Missing in words.

    A .gguf file holds a language model.
    """
    transformers = transformers_offline()
    if path.is_file():
        with _worded(path):
            return transformers.AutoModelForCausalLM, transformers.AutoConfig.from_pretrained(path.parent, **_where(path))
    if not (path / "config.json").is_file():
        raise Missing(f"model: expected a directory with a config.json, found none at {path}")
    with _worded(path / "config.json"):
        config = transformers.AutoConfig.from_pretrained(path, **_where(path))
        names = config.architectures or []
        kind = getattr(transformers, names[0], None) if names else None
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    return kind if known else transformers.AutoModel, config


def _where(path: Path) -> dict[str, Any]:
    """What from_pretrained needs to know beside the directory."""
    return {"local_files_only": True, **({"gguf_file": path.name} if path.is_file() else {})}


@contextmanager
def _worded(path: Path) -> Iterator[None]:
    """Missing for whatever transformers raises at values that it does not expect, which it may only meet while it builds the model."""
    try:
        yield
    except Exception as error:
        raise Missing(f"model: {path}: {type(error).__name__}: {' '.join(str(error).split())}") from error


def _built(path: Path, kind: Any = None) -> Any:
    named, config = class_of(path)
    kind = kind or named
    with _worded(path if path.is_file() else path / "config.json"):
        return kind.from_config(config) if kind.__name__.startswith("Auto") else kind(config)


def empty_model(path: Path, kind: Any = None) -> Any:
    """The model that a directory's config.json or a .gguf file describes, as its own class or as `kind`, on meta: shapes and no values."""
    with torch.device("meta"):
        return _built(path, kind)


def random_model(directory: Path) -> Any:
    """The model that config.json describes, float32, its Parameters drawn by torch's generator."""
    return _built(directory).float().eval()


def check_length(model: Any, length: int) -> None:
    """Missing where the model has fewer positions."""
    most = positions(model)
    if most is not None and length > most:
        raise Missing(f"length: expected at most the {most} positions of {type(model).__name__}, got {length}")


def load_stock(directory: Path, dtype: torch.dtype | str) -> Any:
    """The model in a directory, by the class of transformers that its config.json names."""
    kind, _ = class_of(directory)
    return kind.from_pretrained(directory, local_files_only=True, dtype=dtype).eval()


def package_file(source: str) -> Path:
    """A directory or file as it is; of an installed package's name, the directory with a config.json or the .gguf file that it holds."""
    if Path(source).exists():
        return Path(source)
    try:
        files = metadata.files(source) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in sorted(files, key=lambda file: len(file.parts)):  # the outermost config.json is the model's
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
        if path.name == "config.json" and path.is_file():
            return path.parent
    if _HUB_ID.fullmatch(source):
        return _from_hub(source)
    raise Missing(
        f"model: expected a directory, a .gguf file or an installed package that holds one, got {source}; a model of the Hub is given as "
        "owner/name (google-bert/bert-base-uncased)"
    )


def _from_hub(source: str) -> Path:
    """The directory of a model of the Hub in huggingface_hub's cache, fetched where it is not there. Missing in words."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise Missing(lacking("a model of the Hub", "huggingface_hub", error)) from error
    try:
        return Path(snapshot_download(source, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # of the network, the Hub or the disk
        said = " ".join(str(error).split())[:200]
        raise Missing(
            f"model: expected a directory, a .gguf file, an installed package that holds one, or a model of the Hub, got {source}, which "
            f"could not be fetched: {type(error).__name__}: {said}"
        ) from error


def check_weights(path: Path) -> None:
    """Missing unless there is a .gguf file, or a directory with a config.json and weights beside it."""
    if path.is_file():
        return
    class_of(path)
    if not any((path / f"{name}{end}").is_file() for name in _WEIGHTS for end in ("", ".index.json")):
        raise Missing(f"model: expected {' or '.join(_WEIGHTS)} beside config.json, found none in {path}")


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in a directory or a .gguf file. Missing in words."""
    with _unreadable(path):
        tokenizer = transformers_offline().AutoTokenizer.from_pretrained(path.parent if path.is_file() else path, **_where(path))
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):  # what some classes make of a directory without any
        raise Missing(f"model: expected a tokenizer's files in {path}, found none")
    return tokenizer


def load(path: Path, kind: Any, head: bool = False, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """The model from a directory or a .gguf file. Missing in words, also where weights are not of the model.

    head    the task's head and the pooler may be new, or of another number of labels; every other Parameter has to be there
    config  values that take the place of config.json's
    """
    transformers_offline()
    check_weights(path)
    more = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True, **config}
    with _unreadable(path):
        model, found = kind.from_pretrained(path.parent if path.is_file() else path, **_where(path), **more)
        _check_loaded(path, model, found, head)
        return (_plain(model) if path.is_file() else model).eval()


@contextmanager
def _unreadable(path: Path) -> Iterator[None]:
    """Missing for what transformers raises at files that it cannot read."""
    from safetensors import SafetensorError

    try:
        yield
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        raise Missing(f"model: {path}: {error}") from error


def _check_loaded(source: Path, model: Any, found: dict[str, Any], head: bool) -> None:
    inner = f"{model.base_model_prefix}."
    lost = [key for key in sorted(found["missing_keys"]) if not head or (key.startswith(inner) and ".pooler." not in key)]
    if lost:
        names = ", ".join(lost[:3])
        other = f"; it holds {sorted(found['unexpected_keys'])[0]}" if found["unexpected_keys"] else ""
        raise Missing(f"model: {source}: expected the weights of {type(model).__name__}, found none for {len(lost)} ({names}...){other}")
    mismatched = [entry for entry in sorted(found["mismatched_keys"]) if not head or entry[0].startswith(inner)]
    if mismatched:
        key, there, expected = mismatched[0]
        raise Missing(f"model: {source}: expected {key} of shape {list(expected)}, which config.json says, got {list(there)}")


def _plain(model: Any) -> Any:
    """The same values in a model that knows nothing of the quantised file they were read from, and which transformers therefore saves."""
    config = type(model.config).from_dict({k: v for k, v in model.config.to_dict().items() if k != "quantization_config"})
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    for name, buffer in model.named_buffers():
        owner, _, last = name.rpartition(".")
        plain.get_submodule(owner)._buffers[last] = buffer
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain
