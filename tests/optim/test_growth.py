"""apt_ext.growth: Parameters that change size, with their gradients, graphs and hooks; new rows."""

import pytest
import torch
from low_rank_pair import Pair, refused
from torch import nn
from torch.optim import SGD, Adagrad, AdamW

from apt_ext.optim import resize
from apt_ext.optim.resize import Resize, draw_rows, resize_parameters


def test_frozen_half_and_stateless_parameters():
    pair = Pair(dtype=torch.bfloat16).requires_grad_(False)
    pair.grow(AdamW(pair.parameters()))
    assert pair.lora_A.shape == (7, 6) and pair.lora_A.dtype == torch.bfloat16
    assert not pair.lora_A.requires_grad and pair.lora_A.grad is None


def test_bfloat16_state_of_a_float32_value():
    pair = Pair(dtype=torch.bfloat16)
    optimizer = AdamW(pair.parameters())
    pair.train_steps(optimizer, 1)
    value = torch.zeros(5, 6, dtype=torch.float64)
    resize_parameters([Resize(pair.lora_A, value, 0)], optimizer)
    assert pair.lora_A.dtype == optimizer.state[pair.lora_A]["exp_avg"].dtype == pair.lora_A.grad.dtype == torch.bfloat16
    value.fill_(9.0)
    assert not pair.lora_A.any()  # the value was copied


def test_keep_cuts_value_gradient_and_state():
    pair = Pair()
    optimizer = Adagrad(pair.parameters(), initial_accumulator_value=0.1)
    pair.train_steps(optimizer)
    A, keep = pair.lora_A, torch.tensor([5, 0, 3])
    value, grad, sums = A.detach().clone(), A.grad.clone(), optimizer.state[A]["sum"].clone()
    resize_parameters([Resize(A, value[:, keep], 1, keep)], optimizer)
    assert torch.equal(A, value[:, keep]) and torch.equal(A.grad, grad[:, keep]) and torch.equal(optimizer.state[A]["sum"], sums[:, keep])
    resize_parameters([Resize(A, torch.ones(4, 5), 1, torch.tensor([2]))], optimizer)  # survivors first, new entries behind
    assert torch.equal(optimizer.state[A]["sum"][:, 0], sums[:, 3]) and (optimizer.state[A]["sum"][:, 1:] == torch.tensor(0.1)).all()
    resize_parameters([Resize(A, torch.ones(4, 0), 1, torch.tensor([], dtype=torch.int64))], optimizer)
    assert optimizer.state[A]["sum"].shape == (4, 0) == A.grad.shape


@pytest.mark.parametrize("fresh", [False, True])
def test_a_value_is_copied_unless_it_is_fresh(fresh):
    """What others hold stays theirs; what nobody holds is taken as it is."""
    parameter, value = nn.Parameter(torch.zeros(3, 2)), torch.ones(2, 2)
    resize_parameters([Resize(parameter, value, 0, torch.tensor([0, 2]), fresh=fresh)])
    assert (parameter.data_ptr() == value.data_ptr()) == fresh
    other = nn.Parameter(torch.zeros(3, 2, dtype=torch.bfloat16))
    resize_parameters([Resize(other, value, 0, torch.tensor([0, 2]), fresh=fresh)])
    assert other.dtype == torch.bfloat16 and torch.equal(other.float(), value)


def test_two_dimensions_of_one_parameter_at_once():
    p = nn.Parameter(torch.arange(12.0).view(3, 4))
    optimizer = SGD([p], lr=0.1, momentum=0.9)
    p.grad = torch.arange(12.0).view(3, 4)
    optimizer.step()
    rows, columns, grad = torch.tensor([2, 0]), torch.tensor([1, 3]), p.grad.clone()
    value = p.detach()[rows][:, columns]
    resize_parameters([Resize(p, value, 0, rows), Resize(p, value, 1, columns)], optimizer)
    assert torch.equal(p, value) and torch.equal(p.grad, grad[rows][:, columns])
    assert torch.equal(optimizer.state[p]["momentum_buffer"], grad[rows][:, columns])


def test_growth_in_inference_mode_stays_trainable():
    pair = Pair()
    optimizer = AdamW(pair.parameters())
    pair.train_steps(optimizer, 1)
    with torch.inference_mode():
        pair.grow(optimizer)
    pair.train_steps(optimizer)


def test_growth_with_graphs_alive():
    """A kept graph is no obstacle; a backward through one that saved the old value is refused by torch."""
    pair = Pair()
    optimizer = AdamW(pair.parameters(), fused=True)
    pair.train_steps(optimizer, 1)
    kept = pair.loss()
    alias = pair.lora_A.detach()
    pair.grow(optimizer)
    pair.train_steps(optimizer)
    assert alias.shape == (4, 6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_backward_of_a_graph_that_saved_nothing_is_stopped_at_the_step(fused_is_guarded):
    """Torch accepts the old gradient's shape where the graph did not save the Parameter, so the guard is the last line."""
    p = nn.Parameter(torch.ones(4, 6))
    optimizer = AdamW([p], fused=True)
    accumulated = (p * 3.0).sum()
    loss = (p * 3.0).sum()
    resize_parameters([Resize(p, torch.ones(7, 6), 0)], optimizer)
    loss.backward()
    assert p.grad.shape == (4, 6)
    with pytest.raises(RuntimeError, match=r"AdamW: the gradient has shape \(4, 6\), expected the Parameter's \(7, 6\).*zero_grad"):
        optimizer.step()
    assert torch.equal(p, torch.ones(7, 6)) and not optimizer.state
    p.grad = torch.zeros(7, 6)
    with pytest.raises(RuntimeError, match="size of tensor"):  # torch's own
        accumulated.backward()
    optimizer.zero_grad()
    (p * 3.0).sum().backward()
    optimizer.step()


def test_wrong_arguments_change_nothing():
    pair = Pair()
    optimizer = AdamW(pair.parameters())
    pair.train_steps(optimizer)
    A, B, ones = pair.lora_A, pair.lora_B, torch.ones
    good = Resize(A, ones(7, 6), 0)
    index = torch.tensor
    for bad, error, match in [
        (Resize(B, ones(6, 7), 1), ValueError, r"value: expected shape \(5, 7\), got \(6, 7\)"),
        (Resize(B, ones(5, 3), 1), ValueError, "at least the 4 kept entries along dimension 1, got 3"),
        (Resize(B, ones(5, 7), 2), ValueError, "dim: expected a dimension"),
        (Resize(B, ones(5), 0), ValueError, "dim: expected a dimension"),
        (Resize(B, ones(5, 7, dtype=torch.int64), 1), TypeError, "value: expected a dense floating tensor, got torch.int64"),
        (Resize(B, [1.0], 1), TypeError, "value: expected a dense floating tensor, got list"),
        (Resize(B, ones(5, 2), 1, index([0, 4])), ValueError, "keep: expected indices of 4 old entries, got 0 to 4"),
        (Resize(B, ones(5, 2), 1, index([-1, 0])), ValueError, "keep: expected indices of 4"),
        (Resize(B, ones(5, 2), 1, index([True, False])), TypeError, "keep: expected an integer tensor"),
        (Resize(B, ones(5, 2), 1, [0, 1]), TypeError, "keep: expected an integer tensor"),
        (Resize(A, ones(9, 6), 0), ValueError, "one value for each Parameter"),
        (Resize(torch.ones(5, 4), ones(5, 7), 1), TypeError, "expected a dense nn.Parameter, got Tensor"),
        ("lora_B", TypeError, "changes: expected Resize, got str"),
    ]:
        refused(pair, [optimizer], error, match, lambda bad=bad: resize_parameters([good, bad], optimizer))
    for bad in ("adam", 3, [optimizer, None, object()]):
        refused(pair, [optimizer], TypeError, "optimizer: expected", lambda bad=bad: resize_parameters([good], bad))
    with torch.inference_mode():
        frozen = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(RuntimeError, match="inference mode"):
        resize_parameters([Resize(frozen, ones(3, 2), 0)])


def test_out_of_memory_changes_nothing(monkeypatch):
    pair = Pair()
    optimizer = AdamW(pair.parameters())
    pair.train_steps(optimizer)
    real, left = resize._carried, 4

    def failing(*args):
        nonlocal left
        left -= 1
        if left < 0:
            raise MemoryError("none left")
        return real(*args)

    monkeypatch.setattr(resize, "_carried", failing)
    for allowed in range(6):  # two gradients, four state tensors
        left = allowed
        refused(pair, [optimizer], MemoryError, "none left", lambda: pair.grow(optimizer))
    left = 6
    pair.grow(optimizer)


# -- new rows -----------------------------------------------------------------------------------------------------------------------------


def test_draw_rows():
    make = torch.Generator().manual_seed
    rows = draw_rows(400, 300, 0.25, make(3), "cpu", torch.float32)
    assert rows.shape == (400, 300) and abs(rows.std().item() - 0.25) < 2e-3 and abs(rows.mean().item()) < 2e-3
    assert torch.equal(draw_rows(400, 300, 0.25, make(3), "cpu", torch.float32), rows)
    half = draw_rows(400, 300, 0.25, make(3), torch.device("cpu"), torch.bfloat16)
    assert half.dtype == torch.bfloat16 and torch.equal(half, rows.to(torch.bfloat16))
    assert draw_rows(2, 3, 1.0, make(3), "cpu", torch.float64).dtype == torch.float64
    assert draw_rows(2, 3, 1.0, None, "meta", torch.float16).is_meta
    assert draw_rows(0, 3, 1.0, None, "cpu", torch.float32).shape == (0, 3)
    torch.manual_seed(5)
    first = draw_rows(2, 3, 1.0, None, "cpu", torch.float32)
    torch.manual_seed(5)
    assert torch.equal(draw_rows(2, 3, 1.0, None, "cpu", torch.float32), first)
