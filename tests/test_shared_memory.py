"""Which weights share memory: a merge into one is refused while another that overlaps it is merged, in whatever order they lie."""

import pytest
import torch
from torch import nn

from apt_ext import APTAdapter

ROWS = {
    "the second reaches over the end": ((0, 7), (3, 10)),
    "the second begins before": ((3, 10), (0, 7)),
    "the second is inside": ((0, 10), (4, 6)),
    "the second is around it": ((4, 6), (0, 10)),
    "the same beginning": ((2, 4), (2, 9)),
    "the same end": ((2, 9), (7, 9)),
    "the last row is the first": ((0, 6), (5, 10)),
    "the first row is the last": ((5, 10), (0, 6)),
}
APART = {"behind": ((0, 5), (5, 10)), "before": ((5, 10), (0, 5))}


def over(memory, rows):
    """An adapter whose weight is these rows of `memory` [10, 6]."""
    linear = nn.Linear(6, rows[1] - rows[0], bias=False)
    linear.weight = nn.Parameter(memory[slice(*rows)])
    adapter = APTAdapter.from_linear(linear, 2)
    with torch.no_grad():
        adapter.lora_B.normal_()
    return adapter


@pytest.mark.parametrize(("first", "second"), ROWS.values(), ids=ROWS)
def test_rows_that_overlap(first, second):
    memory = torch.randn(10, 6)
    before = memory.clone()
    one, other = over(memory, first), over(memory, second)
    one.merge_weights()
    merged = memory.clone()
    assert not torch.equal(merged, before)
    with pytest.raises(RuntimeError, match="this weight already carries the merge of another adapter"):
        other.merge_weights()
    assert torch.equal(memory, merged)
    one.unmerge_weights()
    assert torch.equal(memory, before)
    other.merge_weights()


@pytest.mark.parametrize(("first", "second"), APART.values(), ids=APART)
def test_rows_that_only_touch(first, second):
    memory = torch.randn(10, 6)
    before = memory.clone()
    one, other = over(memory, first), over(memory, second)
    one.merge_weights()
    other.merge_weights()
    one.unmerge_weights()
    other.unmerge_weights()
    assert torch.equal(memory, before)
