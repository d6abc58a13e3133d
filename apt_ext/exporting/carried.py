"""What travels with an exported model beside its weights: tokenizer, processors, chat templates, how it generates."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

logger = logging.getLogger("apt_ext")

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)
_OTHERS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "generation_config.json")
_TEMPLATES = "additional_chat_templates"  # a directory, which no manifest of ours lists


def carry(tokenizer: Any, small: Any, directory: Path) -> bool:
    """Write what belongs to the model `small` into `directory`; whether a tokenizer is there now.

    tokenizer  what is saved there; None: the files beside the weights that `small` was loaded from, in a directory or in
               the Hub's cache. Files that are not a tokenizer's come from there in either case, where they are not there yet
    """
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
        if (directory / _TEMPLATES).is_dir():
            shutil.rmtree(directory / _TEMPLATES)
            (directory / "chat_template.jinja").unlink(missing_ok=True)  # which would hide the others
            tokenizer.save_pretrained(directory, save_jinja_files=False)  # all templates in tokenizer_config.json
    name = str(getattr(small.config, "_name_or_path", "") or "")
    for file in (*(_TOKENIZER if tokenizer is None else ()), *_OTHERS):
        source = _found(name, file) if name else None
        if source is not None and not (directory / file).exists():
            shutil.copyfile(source, directory / file)
    if tokenizer is None and name and (Path(name) / _TEMPLATES).is_dir():
        logger.warning("export: %s of %s does not travel; give the tokenizer with tokenizer=", _TEMPLATES, name)
    return any((directory / file).is_file() for file in _TOKENIZER)


def _found(name: str, file: str) -> Path | None:
    """A file of the model of this name, in its directory or in the Hub's cache; the network is not asked."""
    if Path(name).is_dir():
        return Path(name, file) if Path(name, file).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, file)
    except ValueError:  # no name of the Hub
        return None
    return Path(cached) if isinstance(cached, str) else None
