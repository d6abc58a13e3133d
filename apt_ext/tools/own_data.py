"""Rows of the user's own files: a text, perhaps a second one, and a label. Everything is checked, in words, before a model is loaded."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import math
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import nearest
from .data import Missing, joined
from .messages import logger

TABLES = (".csv", ".tsv", ".jsonl", ".json")
TEXTS = (".txt", ".md")
_FEWEST = 8  # rows that are trained on
_UNUSABLE = 0.1  # share of rows without a text or label beyond which the file is not what the user thinks
_IDS = 50  # classes of which most have one row are names of the rows
_NO_LABEL = ("", "nan", "none", "null", "na", "n/a", "<na>")


@dataclass(frozen=True)
class Row:
    """One example; `label` as it is written in the file, stripped."""

    text: str
    pair: str | None
    label: str


@dataclass(frozen=True)
class Task:
    """What is learned from the rows.

    labels  the classes in the order of their numbers; none: a regression
    """

    train: list[Row]
    validation: list[Row]
    labels: list[str]

    @property
    def regression(self) -> bool:
        return not self.labels

    def number(self, row: Row) -> float | int:
        """The label as the model wants it."""
        return float(row.label) if self.regression else self.labels.index(row.label)

    def fingerprint(self) -> str:
        """The same for the same rows in the same parts."""
        parts = [[(row.text, row.pair, row.label) for row in rows] for rows in (self.train, self.validation)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def is_text(paths: Sequence[str]) -> bool:
    """Whether these are files or directories of plain text, for a language model; Missing for a mixture, and for no files."""
    kinds = {}
    for given in paths:
        path = Path(given)
        if not path.exists():
            raise Missing(f"data: expected a file or a directory of .txt files, found none at {given}")
        suffix = path.suffix.lower()
        if not (path.is_dir() or suffix in TABLES + TEXTS):
            raise Missing(f"data: expected {', '.join(TABLES)}, or {TEXTS[0]} for a language model, got {given}")
        kinds[given] = path.is_dir() or suffix in TEXTS
    if len(set(kinds.values())) > 1:
        raise Missing(f"data: expected tables or plain text, got both: {', '.join(kinds)}")
    return any(kinds.values())


def decoded(path: Path, encoding: str) -> str:
    """The text of a file; Missing, with the line, where it is not of that encoding."""
    try:
        content = path.read_bytes()
        kind = codecs.lookup(encoding).name
    except OSError as error:
        raise Missing(f"data: expected a file to read, got {str(path)!r}: {error.strerror}") from error
    except LookupError as error:
        raise Missing(f"encoding: expected one that Python knows (utf-8, cp1252, utf-16), got {encoding!r}") from error
    try:
        text = content.decode("utf-8-sig" if kind == "utf-8" else kind)
    except UnicodeError as error:
        start = getattr(error, "start", 0)
        line = content.count(b"\n", 0, start) + 1
        likely = "utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "cp1252"
        raise Missing(
            f"data: expected {encoding} text, got byte 0x{content[start : start + 1].hex()} in line {line} of {path}; give its encoding, "
            f"as in --encoding {likely}"
        ) from error
    if "\0" in text:
        raise Missing(f"data: expected {encoding} text, got zero bytes in {path}; give its encoding, as in --encoding utf-16")
    return text


def load_task(
    data: Sequence[str],
    validation: Sequence[str] | None,
    *,
    text: str,
    label: str,
    pair: str | None = None,
    problem: str | None = None,
    share: float = 0.1,
    seed: int = 0,
    encoding: str = "utf-8",
    known: Collection[str] = (),
) -> Task:
    """The rows of these files, split where no files to evaluate on are given: the same for the same seed, every class in both parts.

    text, label, pair  columns
    problem            "classification", "regression", or None: what the labels look like, which is said
    known              names of the classes of the model, in the order of its head; kept where they are those of the data

    Missing in words for whatever is wrong with the files.
    """
    columns = [text, label, *([pair] if pair is not None else [])]

    def rows_of(files: Sequence[str]) -> list[Row]:
        return _usable([row for file in files for row in _rows(Path(file), columns, encoding)], text, label, pair)

    rows = rows_of(data)
    held = rows_of(validation) if validation else []
    regression = _is_regression(rows, problem, label)
    labels = [] if regression else _labels(rows, label, known)
    if held and not regression:
        unseen = sorted({row.label for row in held} - set(labels))
        if unseen:
            raise Missing(f"validation-data: expected the labels of --data ({_shown(labels)}), got {_shown(unseen)}")
    if held and regression:
        _is_regression(held, "regression", label)
    if not held:
        rows, held = _split(rows, share, seed, stratified=not regression)
    if len(rows) < _FEWEST:
        raise Missing(f"data: expected at least {_FEWEST} rows to train on, got {len(rows)}")
    both = {(row.text, row.pair) for row in rows} & {(row.text, row.pair) for row in held}
    if both:
        logger.warning("%d texts are in both the training and the validation part, so the validation score flatters", len(both))
    return Task(rows, held, labels)


def _rows(path: Path, columns: Sequence[str], encoding: str) -> Iterator[dict[str, str]]:
    """{column: value} of each row, of these columns, with "line". Missing, with what is there, for a column that is not."""
    content = decoded(path, encoding)
    kind = path.suffix.lower()
    found = _json_rows(path, content, columns) if kind in (".jsonl", ".json") else _table_rows(path, content, columns)
    for line, row in found:
        yield {**row, "line": f"{path.name}:{line}"}


def _check_columns(path: Path, there: Sequence[str], columns: Sequence[str]) -> None:
    for column in columns:
        if column not in there:
            close = nearest(column, there) if there else ""
            raise Missing(f"data: expected a column {column!r} in {path}, got the columns {', '.join(map(repr, there)) or 'none'}{close}")
        if there.count(column) > 1:
            raise Missing(f"data: expected one column {column!r} in {path}, got {there.count(column)}")


def _table_rows(path: Path, content: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    if not content.strip():
        raise Missing(f"data: expected rows in {path}, got an empty file")
    first = content.lstrip("\n").partition("\n")[0]
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    if delimiter not in first:
        delimiter = next((one for one in (",", "\t", ";", "|") if one in first), delimiter)
        if delimiter in first:
            logger.warning("%s: columns are taken to be separated by %r", path, delimiter)
    csv.field_size_limit(sys.maxsize)
    # A quotation mark is a character like others where a .tsv has one that nothing closes.
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE):
        reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True, quoting=quoting)
        try:
            rows = [(reader.line_num, row) for row in reader if row]
            break
        except csv.Error as error:
            if delimiter != "\t" or quoting == csv.QUOTE_NONE:
                raise Missing(
                    f"data: expected a table, got line {reader.line_num} of {path}: {error}; is a quotation mark open?"
                ) from error
    header = [name.strip() for name in rows[0][1]]
    _check_columns(path, header, columns)
    places = {column: header.index(column) for column in columns}
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise Missing(
                f"data: expected the {len(header)} columns of the header in line {line} of {path}, got {len(row)}; a text that holds "
                f"{delimiter!r} or a line break stands in quotation marks"
            )
        yield line, {column: row[place] for column, place in places.items()}


def _json_rows(path: Path, content: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        if path.suffix.lower() == ".json":
            whole = json.loads(content)
            found = list(enumerate(whole if isinstance(whole, list) else [whole], 1))
        else:
            lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
            number = 0
            found = []
            for number, line in lines:  # noqa: B007  # the error names it
                found.append((number, json.loads(line)))
    except json.JSONDecodeError as error:
        where = f"line {number} of " if path.suffix.lower() == ".jsonl" else ""
        raise Missing(f"data: expected JSON, got {where}{path}: {error}") from error
    if not found:
        raise Missing(f"data: expected rows in {path}, got an empty file")
    for number, row in found:
        if not isinstance(row, dict):
            raise Missing(f"data: expected an object with columns in row {number} of {path}, got {str(row)[:40]!r}")
        _check_columns(path, list(row), columns)
        for column in columns:
            if isinstance(row[column], list | dict):
                raise Missing(f"data: expected a text or a number as {column!r} in row {number} of {path}, got {str(row[column])[:40]!r}")
        yield number, {column: _plain(row[column]) for column in columns}


def _plain(value: Any) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _usable(rows: Sequence[Mapping[str, str]], text: str, label: str, pair: str | None) -> list[Row]:
    """The rows that have texts and a label; what is left out is said, and too many are refused."""
    if not rows:
        raise Missing("data: expected rows below the header, got none")
    bare = [row["line"] for row in rows if not row[text].strip() or (pair is not None and not row[pair].strip())]
    unlabelled = [row["line"] for row in rows if row[label].strip().lower() in _NO_LABEL]
    for what, column, lines in (("text", text, bare), ("label", label, unlabelled)):
        if len(lines) > _UNUSABLE * len(rows):
            raise Missing(f"data: expected a {what} in every row, got {len(lines)} of {len(rows)} without in {column!r} ({joined(lines)})")
        if lines:
            logger.warning("%d rows without a %s are left out (%s)", len(lines), what, joined(lines))
    out = {*bare, *unlabelled}
    return [
        Row(row[text].strip(), row[pair].strip() if pair is not None else None, row[label].strip())
        for row in rows
        if row["line"] not in out
    ]


def _is_regression(rows: Sequence[Row], problem: str | None, label: str) -> bool:
    numbers = [_number(row.label) for row in rows]
    if problem == "regression":
        odd = next((row.label for row, number in zip(rows, numbers, strict=True) if number is None), None)
        if odd is not None:
            raise Missing(f"data: expected finite numbers in {label!r} for a regression, got {odd!r}")
        if len(set(numbers)) == 1:
            raise Missing(f"data: expected different numbers in {label!r}, got {numbers[0]:g} in every row")
        return True
    if problem == "classification" or any(number is None for number in numbers):
        return False
    if any(number is not None and not number.is_integer() for number in numbers):
        logger.warning("the labels in %r are numbers that are not whole: a regression (--problem classification says otherwise)", label)
        return True
    return False


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _labels(rows: Sequence[Row], label: str, known: Collection[str]) -> list[str]:
    """The classes in order: whole numbers by value, others by name."""
    counts = Counter(row.label for row in rows)
    if len(counts) == 1:
        raise Missing(f"data: expected at least 2 classes in {label!r}, got {next(iter(counts))!r} in every row")
    if len(counts) > _IDS and len(counts) > len(rows) / 2:
        raise Missing(
            f"data: expected classes in {label!r}, got {len(counts)} different values in {len(rows)} rows, which look like names of the "
            f"rows ({_shown(list(counts))})"
        )
    folded: dict[str, list[str]] = defaultdict(list)
    for name in counts:
        folded[name.casefold()].append(name)
    alike = [names for names in folded.values() if len(names) > 1]
    if alike:
        logger.warning("classes that differ only in capitals are different classes: %s", joined([" and ".join(names) for names in alike]))
    rare = [name for name, count in counts.items() if count == 1]
    if rare:
        logger.warning("%d classes have one row, which is trained on and not evaluated: %s", len(rare), _shown(rare))
    if set(known) == set(counts):
        return list(known)
    numeric = all(_number(name) is not None for name in counts)
    return sorted(counts, key=lambda name: (_number(name) or 0.0, name) if numeric else (0.0, name))


def _split(rows: list[Row], share: float, seed: int, stratified: bool) -> tuple[list[Row], list[Row]]:
    """(training part, held-out part), both in the order of the files; of each class its share, and one at least where it has two."""
    classes: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        classes[row.label if stratified else ""].append(place)
    draw = random.Random(seed)  # noqa: S311  # a split, no secret
    held: set[int] = set()
    for name in sorted(classes):
        places = classes[name]
        count = min(max(round(share * len(places)), 1), len(places) - 1)
        held.update(draw.sample(places, count))
    if not held:
        raise Missing(f"data: expected rows to evaluate on, got {len(rows)} of which none can be spared; give --validation-data")
    return [row for i, row in enumerate(rows) if i not in held], [row for i, row in enumerate(rows) if i in held]


def _shown(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(repr(name[:40]) for name in names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def texts(paths: Sequence[str], encoding: str) -> dict[str, str]:
    """{file: its text} of files and of the .txt files below directories, in order; Missing where there are none, or nothing in them."""
    files: list[Path] = []
    for given in paths:
        path = Path(given)
        below = sorted(one for one in path.rglob("*") if one.is_file() and one.suffix.lower() in TEXTS) if path.is_dir() else [path]
        if not below:
            raise Missing(f"data: expected .txt files in {path}, found none")
        files += below
    found = {str(file): decoded(file, encoding) for file in files}
    empty = [name for name, text in found.items() if not text.strip()]
    if len(empty) == len(found):
        raise Missing(f"data: expected text, got {len(empty)} empty files ({joined(empty)})")
    if empty:
        logger.warning("%d empty files are left out: %s", len(empty), joined(empty))
    return {name: text for name, text in found.items() if text.strip()}
