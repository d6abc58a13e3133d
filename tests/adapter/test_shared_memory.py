"""What shares memory with what is written is refused, in whatever order the two lie; what only touches it
is not."""

import pytest
import torch
from torch import nn

from apt_ext import APTAdapter, ops

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


# -- what an op writes and what it reads: W is entries 24 to 48 of a buffer ----------------------------------

READ = {"begins before": 18, "begins inside": 42, "begins with it": 24, "ends with it": 36}


@pytest.mark.parametrize("start", [*READ.values(), 0], ids=[*READ, "is around it"])
def test_what_is_read_may_not_lie_in_what_is_written(device, start):
    buffer = torch.randn(120, device=device)
    before, W = buffer.clone(), buffer[24:48].view(4, 6)
    size = 72 if start == 0 else 12
    A, B = buffer[start : start + size].view(-1, 6), torch.randn(4, size // 6, device=device)
    with pytest.raises(ValueError, match="lora_A must not share memory with weight"):
        ops.merge_(W, A, B, 1.0)
    with pytest.raises(ValueError, match="grads must be distinct tensors, got two that share memory"):
        ops.mask_grads_([W, A], [torch.ones(6, device=device)] * 2, [1, 1])
    with pytest.raises(ValueError, match="grads must be distinct tensors, got two that share memory"):
        ops.mask_grads_([A, W], [torch.ones(6, device=device)] * 2, [1, 1])
    assert torch.equal(buffer, before)


@pytest.mark.parametrize("start", [19, 23, 24, 30, 42, 47])
def test_a_mask_may_not_lie_in_what_is_written(device, start):
    buffer = torch.rand(120, device=device)
    before, W, mask = buffer.clone(), buffer[24:48].view(4, 6), buffer[start : start + 6]
    A, B = torch.randn(2, 6, device=device), torch.randn(4, 2, device=device)
    with pytest.raises(ValueError, match="mask_in must not share memory with weight"):
        ops.merge_(W, A, B, 1.0, mask)
    far = torch.randn(4, 6, device=device)
    for grads in ([W, far], [far, W]):
        with pytest.raises(ValueError, match="masks must not share memory with grads"):
            ops.mask_grads_(grads, [mask, mask], [1, 1])
    assert torch.equal(buffer, before)


@pytest.mark.parametrize("start", [12, 48], ids=["before", "behind"])
def test_what_touches_what_is_written_is_read(device, start):
    buffer = torch.rand(120, device=device)
    W, A, B = buffer[24:48].view(4, 6), buffer[start : start + 12].view(2, 6), torch.randn(4, 2, device=device)
    expected = W + B @ A
    torch.testing.assert_close(ops.merge_(W, A, B, 1.0), expected)
    mask = buffer[18:24] if start == 12 else buffer[48:54]
    expected = W * mask
    ops.mask_grads_([W], [mask], [1])
    torch.testing.assert_close(W, expected)
