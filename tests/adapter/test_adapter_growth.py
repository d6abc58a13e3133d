"""APTAdapter.increase_rank (seed 4, 5, 9, 10, 11, 16), re-allocating and within max_rank."""

import copy

import pytest
import torch
from low_rank_pair import OPTIMIZERS, bits
from problems import assert_accurate
from small_adapter import expected, make, masks
from torch.optim import ASGD, LBFGS, Adafactor
from torch.utils.checkpoint import checkpoint

STORAGE = pytest.mark.parametrize("max_rank", [None, 6])
# Their state cannot be resized, so they grow within max_rank only.
RESERVED_ONLY = {
    "adafactor": lambda p: Adafactor(p, lr=0.01),
    "asgd": lambda p: ASGD(p, lr=0.1),
    "lbfgs": lambda p: LBFGS(p, lr=0.1, max_iter=3),
}


def learning(max_rank):
    """An adapter that every optimizer can train, the same for both kinds of storage."""
    torch.manual_seed(0)
    adapter = make(max_rank=max_rank, scaling=0.5)
    with torch.no_grad():
        adapter.Wb.copy_(torch.linspace(-1, 1, 21, dtype=torch.float64).view(7, 3).sin())
    return adapter


def batch(seed=0):
    return torch.randn(8, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def factors(adapter):
    return [adapter.lora_A, adapter.lora_B]


def loss(adapter, seed=0):
    return (adapter(batch(seed)) - 0.3).square().mean()


def train(adapter, optimizer, count=3):
    def closure():
        optimizer.zero_grad()
        value = loss(adapter)
        value.backward()
        return value

    for _ in range(count):
        optimizer.step(closure)


@STORAGE
@pytest.mark.parametrize("change", ["grow", "load"])
def test_a_change_within_autocast_is_seen_by_the_next_forward(max_rank, change):
    """torch keeps its casts of Parameters until the context ends."""
    adapter, other = (make(dtype=torch.float32, rank=rank, max_rank=max_rank) for rank in (3, 5))
    x = torch.randn(8, 10)
    with torch.autocast("cpu", torch.bfloat16):
        adapter(x).sum().backward()
        adapter.zero_grad()
        adapter.increase_rank(5) if change == "grow" else adapter.load_state_dict(other.state_dict())
        inside = adapter(x)
        inside.sum().backward()
    gradient = adapter.lora_B.grad.clone()
    adapter.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        outside = adapter(x)
        outside.sum().backward()
    assert torch.equal(inside, outside) and torch.equal(gradient, adapter.lora_B.grad) and bool(gradient[:, 3:5].any())


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


@STORAGE
def test_the_output_stays_in_every_dtype(device, dtype, max_rank):
    adapter = make(device, dtype, max_rank=max_rank)
    adapter.set_masks(*masks(device))
    x = batch().to(device, dtype)
    y = adapter(x)
    adapter.increase_rank(6)
    if max_rank:
        assert torch.equal(adapter(x), y)
    assert_accurate(adapter(x), y.detach().double(), y.detach().double().abs() + 1, dtype)


@STORAGE
@pytest.mark.parametrize("trains", ["lora_A", "lora_B", "neither"])
def test_growth_leaves_requires_grad_as_it_is(max_rank, trains):
    adapter = make(max_rank=max_rank)
    for name in ("lora_A", "lora_B"):
        getattr(adapter, name).requires_grad_(name == trains)
    adapter.increase_rank(5)
    assert [name for name, p in adapter.named_parameters() if p.requires_grad] == ([] if trains == "neither" else [trains])


@STORAGE
def test_an_equal_rank_changes_nothing(max_rank):
    adapter, generator = make(max_rank=max_rank), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(factors(adapter))
    train(adapter, optimizer)

    def held():
        parts = [
            adapter.state_dict(),
            optimizer.state_dict(),
            [p.grad for p in factors(adapter)],
            torch.get_rng_state(),
            generator.get_state(),
        ]
        return bits(parts), [(id(p), id(p.grad), p._version) for p in factors(adapter)]

    before = held()
    for given in (None, generator):
        adapter.increase_rank(3, optimizer=optimizer, generator=given)
    assert held() == before


@pytest.mark.parametrize("max_rank, name", [*((None, n) for n in OPTIMIZERS), *((6, n) for n in (*OPTIMIZERS, *RESERVED_ONLY))])
def test_every_optimizer_goes_on_over_growth(max_rank, name):
    """The output stays; old state stays; reserved rows are zero at all times; the new ones learn."""
    adapter = learning(max_rank)
    optimizer = RESERVED_ONLY[name](factors(adapter)) if name in RESERVED_ONLY else OPTIMIZERS[name][0](factors(adapter))
    train(adapter, optimizer)
    for rank in (4, 6):
        old, y, before = adapter.rank, adapter(batch()).detach(), bits(optimizer.state_dict())
        values = adapter.Wa.detach().clone(), adapter.Wb.detach().clone()
        grads = [p.grad.clone() for p in factors(adapter)]
        adapter.increase_rank(rank, optimizer=optimizer if max_rank is None else None)
        torch.testing.assert_close(adapter(batch()), y, rtol=1e-12, atol=1e-12)
        assert torch.equal(adapter.Wa[:old], values[0]) and torch.equal(adapter.Wb[:, :old], values[1])
        assert torch.equal(adapter.lora_A.grad[: len(grads[0])], grads[0])
        if max_rank:
            assert torch.equal(adapter(batch()), y) and bits(optimizer.state_dict()) == before
        train(adapter, optimizer)
        assert adapter.Wa[old:].all() and adapter.Wb[:, old:].any(dim=0).all()
        assert not adapter.lora_A[rank:].any() and not adapter.lora_B[:, rank:].any()
        assert not adapter.lora_A.grad[rank:].any() and not adapter.lora_B.grad[:, rank:].any()
        assert all(p.isfinite().all() for p in factors(adapter))


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "muon"])  # its step depends on all rows that are stored
def test_reserved_storage_trains_as_reallocated_storage_does(name):
    trained = []
    for max_rank in (None, 6):
        adapter = learning(max_rank)
        optimizer = OPTIMIZERS[name][0](factors(adapter))
        for rank in (3, 5, 6):
            adapter.increase_rank(rank, optimizer=optimizer, generator=torch.Generator().manual_seed(rank))
            train(adapter, optimizer)
        trained.append((adapter.Wa.detach(), adapter.Wb.detach()))
    torch.testing.assert_close(trained[0], trained[1], rtol=1e-9, atol=1e-12)


@STORAGE
def test_growth_between_accumulated_batches(max_rank):
    adapter = make(max_rank=max_rank)
    optimizer = torch.optim.SGD(factors(adapter), lr=0.1, momentum=0.9)
    train(adapter, optimizer, 1)
    optimizer.zero_grad()
    loss(adapter, 1).backward()
    first = [p.grad.clone() for p in factors(adapter)]
    adapter.increase_rank(5, optimizer=optimizer)
    loss(adapter, 2).backward()
    sums = [p.grad.clone() for p in factors(adapter)]
    optimizer.zero_grad()
    loss(adapter, 2).backward()
    for total, part, p, dim in zip(sums, first, factors(adapter), (0, 1), strict=True):
        want = p.grad.clone()
        want.narrow(dim, 0, part.shape[dim]).add_(part)
        torch.testing.assert_close(total, want, rtol=1e-12, atol=1e-14)


@STORAGE
def test_growth_between_forward_and_backward_is_an_error(max_rank):
    adapter = make(max_rank=max_rank)
    optimizer = torch.optim.AdamW(factors(adapter), fused=True)
    train(adapter, optimizer)
    optimizer.zero_grad()
    x = batch().requires_grad_()
    y = adapter(x)
    adapter.increase_rank(5, optimizer=optimizer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert all(p.grad is None for p in (x, *factors(adapter)))
    train(adapter, optimizer)
    assert adapter.Wb[:, 3:].any()


@STORAGE
def test_growth_with_a_kept_loss(max_rank):
    """A graph that is kept and never run, as a log of losses keeps it, is no obstacle."""
    adapter = make(max_rank=max_rank)
    optimizer = torch.optim.AdamW(factors(adapter))
    kept = []
    for rank in (3, 4, 5, 6):
        adapter.increase_rank(rank, optimizer=optimizer)
        optimizer.zero_grad()
        kept.append(loss(adapter))
        kept[-1].backward(retain_graph=True)
        optimizer.step()
    assert all(map(torch.isfinite, kept)) and adapter.Wb.all()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept[0].backward()


@STORAGE
def test_hooks_live_on(max_rank):
    adapter, calls = make(max_rank=max_rank), []
    A, B = factors(adapter)
    A.register_hook(lambda grad: calls.append(("A", tuple(grad.shape))))
    B.register_post_accumulate_grad_hook(lambda p: calls.append(("B", tuple(p.grad.shape))))
    adapter.register_forward_hook(lambda *_: calls.append("forward"))
    adapter.register_full_backward_hook(lambda *_: calls.append("backward"))
    adapter(batch().requires_grad_()).sum().backward()
    adapter.increase_rank(5)
    del calls[:]
    x = batch().requires_grad_()
    adapter(x).sum().backward()
    stored = max_rank or 5
    assert sorted(map(str, calls)) == sorted(map(str, ["forward", "backward", ("A", (stored, 10)), ("B", (7, stored))]))


@STORAGE
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)])
def test_growth_under_any_mode_leaves_a_trainable_adapter(max_rank, mode):
    adapter = make(max_rank=max_rank)
    optimizer = torch.optim.AdamW(factors(adapter), amsgrad=True)
    train(adapter, optimizer)
    with mode():
        adapter.increase_rank(5, optimizer=optimizer)
        adapter.set_masks(*masks())
    tensors = [*factors(adapter), *adapter.get_masks(), *(v for p in factors(adapter) for v in (p.grad, *optimizer.state[p].values()))]
    assert not any(t.is_inference() for t in tensors) and all(p.requires_grad and p.is_leaf for p in factors(adapter))
    train(adapter, optimizer)
    assert adapter.Wb[1:5, 3:].all()
    torch.testing.assert_close(adapter(batch()), expected(adapter, batch()))
    copy.deepcopy(adapter.state_dict())


@STORAGE
def test_growth_of_a_copy_leaves_the_original(max_rank, fused_is_guarded):
    adapter = make(max_rank=max_rank)
    optimizer = torch.optim.AdamW(factors(adapter), fused=True)
    train(adapter, optimizer)
    other, its_own = copy.deepcopy((adapter, optimizer))
    before = bits([adapter.state_dict(), optimizer.state_dict()])
    other.increase_rank(6, optimizer=its_own)
    train(other, its_own)
    assert bits([adapter.state_dict(), optimizer.state_dict()]) == before and adapter.rank == 3 and other.Wb[:, 3:].all()
    train(adapter, optimizer)
    forgotten, its_own = copy.deepcopy((adapter, optimizer))
    forgotten.increase_rank(6)
    if max_rank is None:  # the copy is guarded as the original is
        forgotten.lora_A.grad = None
        with pytest.raises(RuntimeError, match="expected the Parameter's"):
            its_own.step()
    train(adapter, optimizer)


@STORAGE
@pytest.mark.parametrize("reentrant", [False, True])
def test_growth_before_a_recomputation_is_right_or_an_error(max_rank, reentrant):
    """The forward's value belongs to any rank, as new columns are zero; so gradients of the grown adapter are right, too."""
    adapter = make(max_rank=max_rank)
    x = batch().requires_grad_()
    y = checkpoint(adapter, x, use_reentrant=reentrant)
    adapter.increase_rank(5)
    try:
        y.sum().backward()
    except RuntimeError as error:
        assert "different metadata" in str(error) and max_rank is None and not reentrant
        adapter.zero_grad()
        return
    grads = [p.grad for p in factors(adapter)]
    want = torch.autograd.grad(adapter(batch()).sum(), factors(adapter))
    torch.testing.assert_close(grads, list(want), rtol=1e-12, atol=1e-14)


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
    optimizer = Adafactor(make().parameters())
    other = make()
    unknown = Adafactor(factors(other))
    train(other, unknown, 1)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="Adafactor cannot be resized"):
        other.increase_rank(5, optimizer=[optimizer, unknown])
    assert torch.equal(torch.get_rng_state(), state) and other.rank == 3  # refused before a row is drawn
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


def test_a_forgotten_optimizer_raises_and_changes_nothing(fused_is_guarded):
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
