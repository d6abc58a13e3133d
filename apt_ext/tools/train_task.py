"""What `apt-ext train` learns: rows with labels, or blocks of text; datasets, collator, metrics, and what the model's head must be."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..pruning.on_meta import positions
from .data import Batch, Missing
from .messages import logger
from .models import transformers_offline
from .own_data import Task, load_task, texts

_LENGTH, _BLOCK = 128, 256  # tokens of a row, of a block
_LENGTHS = 8  # of batches on a GPU: an APTTrainer keeps so many CUDA graphs
_LEAST_BLOCKS = 8


class Rows:
    """A text, or two, and a class or number: a head over an encoder or decoder.

    labels  the classes by number; none: a regression
    """

    has_head = True

    def __init__(self, task: Task) -> None:
        self.task, self.fingerprint = task, task.fingerprint()
        self.measure = "rmse" if task.regression else "accuracy"
        self.better = "lower" if task.regression else "higher"

    def config(self) -> dict[str, Any]:
        """What the model's config has to say of the labels."""
        if self.task.regression:
            return {"num_labels": 1, "problem_type": "regression"}
        names = dict(enumerate(self.task.labels))
        return {"id2label": names, "label2id": {name: i for i, name in names.items()}, "problem_type": "single_label_classification"}

    def words(self) -> str:
        """What is trained on, in words."""
        what = "a regression" if self.task.regression else f"{len(self.task.labels)} classes ({', '.join(self.task.labels[:6])})"
        return f"{len(self.task.train):,} rows to train on, {len(self.task.validation):,} to evaluate on, {what}"

    def encode(self, tokenizer: Any, model: Any, length: int | None) -> None:
        """Make the datasets `train` and `validation`, of rows cut at `length` tokens, and the collators.

        `collator` pads to the longest row of a batch, `few_lengths` to one of a few lengths, so that few CUDA graphs serve all batches.
        """
        most = min(length or _LENGTH, positions(model) or length or _LENGTH)
        self.train = self._encoded(tokenizer, "train", most)
        self.validation = self._encoded(tokenizer, "validation", most)
        self.collator = transformers_offline().DataCollatorWithPadding(tokenizer)
        self.few_lengths = self.collator
        multiple = 8 * math.ceil(most / (8 * _LENGTHS))
        if multiple * math.ceil(most / multiple) <= (positions(model) or math.inf):
            self.few_lengths = transformers_offline().DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple)

    def _encoded(self, tokenizer: Any, part: str, most: int) -> list[dict[str, Any]]:
        rows = getattr(self.task, part)
        pairs = [row.pair for row in rows] if rows[0].pair is not None else None
        found = tokenizer([row.text for row in rows], pairs, truncation=True, max_length=most)
        cut = sum(len(ids) >= most for ids in found["input_ids"])
        if cut > 0.05 * len(rows):
            logger.warning("%.0f %% of the %s rows have %d tokens or more and are cut there (--length)", 100 * cut / len(rows), part, most)
        return [{**{name: values[i] for name, values in found.items()}, "labels": self.task.number(row)} for i, row in enumerate(rows)]

    def metrics(self, prediction: Any) -> dict[str, float]:
        """Of a Trainer's predictions: accuracy and macro F1, or root mean square error and correlation."""
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        labels = torch.as_tensor(prediction.label_ids)
        if self.task.regression:
            found, wanted = torch.as_tensor(logits).double().flatten(), labels.double().flatten()
            together = torch.corrcoef(torch.stack([found, wanted]))[0, 1]
            return {"rmse": float((found - wanted).square().mean().sqrt()), "pearson": float(together.nan_to_num())}
        chosen = torch.as_tensor(logits).argmax(-1)
        scores = []
        for label in set(labels.tolist()):
            right = int(((chosen == label) & (labels == label)).sum())
            scores.append(2 * right / max(int((chosen == label).sum() + (labels == label).sum()), 1))
        return {"accuracy": float((chosen == labels).double().mean()), "f1": sum(scores) / len(scores)}


class Text:
    """Plain text in blocks of so many tokens: a causal language model."""

    has_head = False
    measure, better = "perplexity", "lower"

    def __init__(self, found: Mapping[str, str], held: Mapping[str, str], share: float) -> None:
        self._found, self._held, self._share = found, held, share
        parts = [*found.values(), "", *held.values(), str(share)]
        self.fingerprint = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def config(self) -> dict[str, Any]:
        return {}

    def words(self) -> str:
        return f"{sum(map(len, self._found.values())):,} characters of {len(self._found)} files"

    def encode(self, tokenizer: Any, model: Any, length: int | None) -> None:
        """Make the datasets: the files one after another, each ended by the end-of-text token, in blocks. The last ones are held out."""
        most = min(length or _BLOCK, positions(model) or length or _BLOCK)
        blocks = self._blocks(tokenizer, self._found, most)
        if self._held:
            held = self._blocks(tokenizer, self._held, most)
        else:
            count = max(round(self._share * len(blocks)), 1)
            blocks, held = blocks[: len(blocks) - count], blocks[len(blocks) - count :]
        if len(blocks) < _LEAST_BLOCKS or not held:
            raise Missing(
                f"data: expected text for at least {_LEAST_BLOCKS} blocks of {most} tokens to train on and 1 to evaluate on, got "
                f"{len(blocks)} and {len(held)}; give more text, or a smaller --length"
            )
        self.train, self.validation = ([{"input_ids": ids, "labels": ids} for ids in part] for part in (blocks, held))
        self.collator = self.few_lengths = transformers_offline().default_data_collator
        logger.info("%d blocks of %d tokens to train on, %d to evaluate on", len(blocks), most, len(held))

    @staticmethod
    def _blocks(tokenizer: Any, found: Mapping[str, str], most: int) -> list[list[int]]:
        ids: list[int] = []
        for text in found.values():
            ids += tokenizer(text, verbose=False)["input_ids"]
            if tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
                ids.append(tokenizer.eos_token_id)
        return [ids[i : i + most] for i in range(0, len(ids) - most + 1, most)]

    metrics = None


Learned = Rows | Text


def learned_from(options: Any, known: Sequence[str], texts_only: bool) -> Learned:
    """What the options' files say is to be learned; Missing for what is wrong with them."""
    if texts_only:
        held = texts(options.validation_data, options.encoding) if options.validation_data else {}
        return Text(texts(options.data, options.encoding), held, options.validation_share)
    return Rows(
        load_task(
            options.data,
            options.validation_data,
            text=options.text_column,
            label=options.label_column,
            pair=options.text_pair_column,
            problem=options.problem,
            share=options.validation_share,
            seed=options.seed,
            encoding=options.encoding,
            known=known,
        )
    )


def scores_of(found: Mapping[str, float], task: Learned, prefix: str = "eval") -> dict[str, float]:
    """{metric: value} of a Trainer's evaluation, with the perplexity of a language model."""
    scores = {
        name.removeprefix(f"{prefix}_"): value
        for name, value in found.items()
        if name.startswith(f"{prefix}_") and not name.endswith(("_runtime", "_per_second", "_preparation_time"))
    }
    if task.measure == "perplexity":
        loss = scores["loss"]
        scores["perplexity"] = math.exp(loss) if loss < 700 else math.inf
    return scores


def timed_batches(task: Learned, size: int, most: int = 4) -> list[Batch]:
    """Batches of the validation part, of every length, without labels."""
    rows = sorted(task.validation, key=lambda row: len(row["input_ids"]))
    step = max(len(rows) // (size * most), 1)
    chosen = rows[::step][: size * most]
    parts = [chosen[i : i + size] for i in range(0, len(chosen), size)]
    return [{name: value for name, value in task.collator(part).items() if name != "labels"} for part in parts]
