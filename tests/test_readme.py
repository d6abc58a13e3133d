"""The README's lines of use and its formula run as they stand there."""

import pathlib
import re

import pytest
import torch
from torch.nn import functional as F

from apt_ext import ops

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block(having):
    (found,) = [code for code in CODE if having in code]
    return found


def test_the_formula():
    x, W, b, A, B = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 5), (6, 5), (6,), (3, 5), (6, 3)))
    names = {"F": F, "x": x, "W": W, "b": b, "A": A, "B": B, "s": 2.0}
    names |= {"mask_in": torch.rand(5).round().double(), "mask_out": torch.rand(6).double()}
    exec(block("mask_out * ("), names)  # noqa: S102
    got = ops.apt_linear(x, W, b, A, B, names["mask_in"], names["mask_out"], 2.0)
    torch.testing.assert_close(got, names["y"], rtol=1e-12, atol=1e-12)


def test_the_lines_of_use(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    config = transformers.BertConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=48, vocab_size=50, max_position_embeddings=16
    )
    batch = {"input_ids": torch.randint(0, 50, (2, 8)), "labels": torch.tensor([0, 1])}
    names = {"model": transformers.BertForSequenceClassification(config), "batch": batch}
    exec(block("import torch, apt_ext"), names)  # noqa: S102
    assert names["layer"].rank == 16
    small = transformers.BertForSequenceClassification.from_pretrained("smaller-model").eval()
    assert small.config.intermediate_size == 24
    expected = names["model"].eval()(**batch).logits
    torch.testing.assert_close(small(**batch).logits, expected, rtol=1e-5, atol=1e-5)
