"""APTAdapter.increase_rank (seed 4, 5, 9, 10, 11, 16)."""

import pytest
import torch
from small_adapter import make


@pytest.mark.parametrize("max_rank", [None, 6])
def test_growth_keeps_output_identity_and_optimizer(device, max_rank):
    adapter = make(device, max_rank=max_rank)
    adapter.lora_A.requires_grad_(False)
    optimizer = torch.optim.AdamW([adapter.lora_A, adapter.lora_B], lr=0.01)
    x = torch.randn(8, 10, dtype=torch.float64, device=device)
    adapter.lora_A.requires_grad_(True)
    adapter(x).square().sum().backward()
    optimizer.step()
    A, B = adapter.lora_A, adapter.lora_B
    old_A, old_B, y = adapter.Wa.detach().clone(), adapter.Wb.detach().clone(), adapter(x).detach()
    adapter.increase_rank(5, optimizer=optimizer)
    assert adapter.lora_A is A and adapter.lora_B is B and adapter.rank == 5 and adapter.scaling == 2.0
    assert torch.equal(adapter.Wa[:3], old_A) and torch.equal(adapter.Wb[:, :3], old_B)
    assert (adapter.Wb[:, 3:] == 0).all() and (adapter.Wa[3:] != 0).all()
    if max_rank:
        assert torch.equal(adapter(x), y) and A.shape == (6, 10)
    torch.testing.assert_close(adapter(x), y, rtol=1e-12, atol=1e-12)
    optimizer.zero_grad()
    adapter(x).square().sum().backward()
    optimizer.step()
    assert (adapter.Wb[:, 3:] != 0).any() and optimizer.state[B]["exp_avg"].shape == B.shape
    if max_rank:
        assert (adapter.lora_A[5:] == 0).all() and (adapter.lora_B[:, 5:] == 0).all()


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adagrad", "RMSprop", "Muon"])
def test_reserved_rows_stay_zero_under_any_optimizer(name):
    adapter = make(max_rank=6)
    optimizer = getattr(torch.optim, name)([adapter.lora_A, adapter.lora_B], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        adapter(torch.randn(8, 10, dtype=torch.float64)).square().sum().backward()
        assert (adapter.lora_A.grad[3:] == 0).all() and (adapter.lora_B.grad[:, 3:] == 0).all()
        optimizer.step()
    assert (adapter.lora_A[3:] == 0).all() and (adapter.lora_B[:, 3:] == 0).all()


def test_growth_refusals_leave_everything():
    adapter = make(max_rank=5)
    for rank, error, match in (
        (2, ValueError, "new_rank must lie between rank = 3 and 5"),
        (6, ValueError, "got 6"),
        (True, TypeError, "int"),
    ):
        with pytest.raises(error, match=match):
            adapter.increase_rank(rank)
    with pytest.raises(ValueError, match="between rank = 3 and 7, got 8"):
        make().increase_rank(8)
    with pytest.raises(ValueError, match="init_type must be 'lora' or 'zero'"):
        adapter.increase_rank(4, init_type="random")
    with pytest.raises(TypeError):
        adapter.increase_rank(4, optimizer="adam")
    assert adapter.rank == 3
    adapter.increase_rank(3)
    with pytest.warns(UserWarning, match="cannot learn"):
        adapter.increase_rank(4, init_type="zero")


def test_growth_with_a_generator_is_reproducible():
    rows = []
    for _ in range(2):
        adapter = make()
        adapter.increase_rank(5, generator=torch.Generator().manual_seed(7))
        rows.append(adapter.Wa[3:].detach().clone())
    assert torch.equal(*rows)


def test_a_forgotten_optimizer_raises_and_changes_nothing():
    adapter = make()
    optimizer = torch.optim.AdamW([adapter.lora_A, adapter.lora_B], fused=True)
    x = torch.randn(2, 10, dtype=torch.float64)
    adapter(x).sum().backward()
    optimizer.step()
    adapter.increase_rank(5)
    adapter(x).sum().backward()
    before = adapter.lora_A.detach().clone()
    with pytest.raises(RuntimeError, match="lora_A|exp_avg|shape"):
        optimizer.step()
    assert torch.equal(adapter.lora_A, before)
