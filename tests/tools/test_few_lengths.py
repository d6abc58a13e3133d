"""The batches of `apt-ext train` on a GPU have few lengths, so that few CUDA graphs serve all of them."""

import pytest
import torch
from own_source import classifier
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from apt_ext.tools.own_data import Row, Task
from apt_ext.tools.train_task import Rows


@pytest.mark.parametrize(
    ("positions", "length", "lengths"),
    [
        (128, None, [16, 32, 48, 64, 80, 96, 112, 128]),
        (128, 40, [8, 16, 24, 32, 40]),
        (128, 100, [16, 32, 48, 64, 80, 96, 112]),
        (100, None, None),  # 112 would be beyond its positions
    ],
    ids=str,
)
def test_batches_have_at_most_eight_lengths(tmp_path, positions, length, lengths):
    source = classifier(tmp_path, max_position_embeddings=positions)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.eos_token
    rows = [Row("ab" * n, None, "xy"[n % 2]) for n in range(1, 70)]
    learned = Rows(Task(rows, rows[:4], ["x", "y"]))
    learned.encode(tokenizer, model, length)
    found = set()
    for row in learned.train:
        usual, padded = learned.collator([row]), learned.few_lengths([row])
        width = usual["input_ids"].shape[1]
        assert torch.equal(padded["input_ids"][:, :width], usual["input_ids"]) and not padded["attention_mask"][:, width:].any()
        found.add(padded["input_ids"].shape[1])
    apart = {len(row["input_ids"]) for row in learned.train}
    assert sorted(found) == (lengths or sorted(apart)) and len(apart) > len(lengths or ())
    with torch.no_grad():
        logits = [model(**{k: v for k, v in one.items() if k != "labels"}).logits for one in (usual, padded)]
    torch.testing.assert_close(*logits)
