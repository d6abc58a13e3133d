"""apt_ext.hold.hold_pruned: steps that leave pruned entries, and their optimizer state, alone."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adafactor, Adagrad, Adam, AdamW, Muon, NAdam, RMSprop, Rprop

from apt_ext.optim.hold_pruned import hold_pruned
from apt_ext.optim.resize import Resize, resize_parameters

OPTIMIZERS = {
    "sgd": lambda p: SGD(p, lr=0.1, weight_decay=0.5),
    "sgd_momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5),
    "adam": lambda p: Adam(p, lr=0.1, weight_decay=0.5),
    "adamw": lambda p: AdamW(p, lr=0.1, weight_decay=0.5),
    "adamw_foreach": lambda p: AdamW(p, lr=0.1, weight_decay=0.5, foreach=True),
    "adamw_fused_amsgrad": lambda p: AdamW(p, lr=0.1, weight_decay=0.5, fused=True, amsgrad=True),
    "nadam": lambda p: NAdam(p, lr=0.1, weight_decay=0.5),
    "rmsprop": lambda p: RMSprop(p, lr=0.1, centered=True, momentum=0.9, weight_decay=0.5),
    "adagrad": lambda p: Adagrad(p, lr=0.1, initial_accumulator_value=0.1, weight_decay=0.5),
    "rprop": lambda p: Rprop(p, lr=0.1),
    "muon": lambda p: Muon(p, lr=0.1, weight_decay=0.5),
    "adafactor": lambda p: Adafactor(p, lr=0.1, weight_decay=0.5),
}
STARTS = {"adagrad": {"sum": 0.1}, "rprop": {"step_size": 0.1}}


class Adapter(nn.Module):
    """What hold_pruned asks of an adapter: two factors and two masks."""

    def __init__(self, rank=3, K=6, N=5, seed=0):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.lora_A = nn.Parameter(torch.randn(rank, K, generator=draw))
        self.lora_B = nn.Parameter(torch.randn(N, rank, generator=draw))
        self.register_buffer("mask_in", torch.ones(K))
        self.register_buffer("mask_out", torch.ones(N))

    def give_gradients(self):
        for p in self.parameters():
            p.grad = torch.full_like(p, 0.5)

    def prune(self):
        self.mask_in.copy_(torch.tensor([1, 0, 0.3, 1, 0, 1]))
        self.mask_out.copy_(torch.tensor([0.0, 1, 1, 0, 0.2]))

    def pruned(self):
        return [
            (self.lora_A, (self.mask_in == 0).expand_as(self.lora_A)),
            (self.lora_B, (self.mask_out == 0)[:, None].expand_as(self.lora_B)),
        ]


def held(adapter, optimizer, values, starts=None):
    """Whether the pruned entries are `values`' bitwise with fresh state, and the kept ones have moved."""
    for (p, where), value in zip(adapter.pruned(), values, strict=True):
        if not torch.equal(p[where].view(torch.int32), value[where].view(torch.int32)) or (p == value)[~where].any():
            return False
        for key, tensor in optimizer.state[p].items():
            start = torch.tensor((starts or {}).get(key, 0.0))
            if torch.is_tensor(tensor) and tensor.shape == p.shape and not (tensor[where] == start).all():
                return False
    return True


def values_of(adapter):
    return [p.detach().clone() for p in adapter.parameters()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_entries_and_their_state_stand_still(name):
    """Pruned late, so momentum is there; with gradients in the pruned entries too, as nothing else may rely on their being zero."""
    adapter = Adapter()
    optimizer = OPTIMIZERS[name](adapter.parameters())
    handle = hold_pruned(optimizer, adapter)
    for _ in range(3):
        adapter.give_gradients()
        optimizer.step()
    adapter.prune()
    for _ in range(3):
        values = values_of(adapter)
        adapter.give_gradients()
        optimizer.step()
        assert held(adapter, optimizer, values, STARTS.get(name))
    adapter.mask_in.fill_(1)  # the masks of that moment
    values = values_of(adapter)
    adapter.give_gradients()
    optimizer.step()
    assert held(adapter, optimizer, values, STARTS.get(name))
    handle.remove()
    handle.remove()
    adapter.prune()
    adapter.give_gradients()
    optimizer.step()
    assert not (adapter.lora_A == values[0]).any()


def test_kept_entries_move_as_without_holding():
    plain, pruned = Adapter(), Adapter()
    pruned.prune()
    optimizers = [AdamW(m.parameters(), lr=0.1) for m in (plain, pruned)]
    hold_pruned(optimizers[1], pruned)
    for _ in range(3):
        for m, optimizer in zip((plain, pruned), optimizers, strict=True):
            m.give_gradients()
            optimizer.step()
    for (p, where), q in zip(pruned.pruned(), plain.parameters(), strict=True):
        assert torch.equal(p[~where], q[~where])


def test_not_finite_pruned_entries_keep_their_bits():
    adapter = Adapter()
    adapter.prune()
    with torch.no_grad():
        adapter.lora_A[:, 1] = torch.tensor([float("nan"), float("inf"), -0.0])
    optimizer = AdamW(adapter.parameters(), lr=0.1)
    hold_pruned(optimizer, adapter)
    values = values_of(adapter)
    adapter.give_gradients()
    adapter.lora_A.grad[:, 1] = float("nan")
    optimizer.step()
    assert held(adapter, optimizer, values)


def test_growth_between_steps():
    adapter = Adapter()
    adapter.prune()
    optimizer = AdamW(adapter.parameters(), lr=0.1, fused=True)
    hold_pruned(optimizer, adapter)
    for rank in (3, 5):
        A, B = torch.ones(rank, 6), torch.ones(5, rank)
        resize_parameters([Resize(adapter.lora_A, A, 0), Resize(adapter.lora_B, B, 1)], optimizer)
        adapter.give_gradients()
        values = values_of(adapter)
        optimizer.step()
        assert held(adapter, optimizer, values)


def test_no_gradient_closure_and_a_step_that_raises():
    class Fails(AdamW):
        fail = False

        def step(self, closure=None):
            super().step(closure)
            if self.fail:
                raise ArithmeticError

    adapter = Adapter()
    adapter.prune()
    optimizer = Fails(adapter.parameters(), lr=0.1)
    hold_pruned(optimizer, adapter)
    values = values_of(adapter)
    optimizer.step()
    assert all(torch.equal(p, v) for p, v in zip(adapter.parameters(), values, strict=True))

    optimizer.step(lambda: adapter.give_gradients())
    assert held(adapter, optimizer, values)

    optimizer.fail = True
    with pytest.raises(ArithmeticError):
        optimizer.step()
    optimizer.fail = False
    values = values_of(adapter)  # what a failed step left is where the next one starts
    adapter.give_gradients()
    optimizer.step()
    assert held(adapter, optimizer, values)


def test_registered_once(monkeypatch):
    copies = []
    real = torch.Tensor.clone
    adapter, other = Adapter(), Adapter(seed=1)
    optimizer = AdamW([*adapter.parameters(), *other.parameters()], lr=0.1)
    first = hold_pruned(optimizer, adapter)
    second = hold_pruned(optimizer, [adapter, other])
    monkeypatch.setattr(torch.Tensor, "clone", lambda self, **kw: copies.append(self.shape) or real(self, **kw))
    adapter.prune()
    other.prune()
    values = [values_of(adapter), values_of(other)]
    copies.clear()
    adapter.give_gradients()
    other.give_gradients()
    optimizer.step()
    assert len(copies) == 4
    assert held(adapter, optimizer, values[0]) and held(other, optimizer, values[1])
    first.remove()  # ends the pair for the second handle too, and for nothing else
    copies.clear()
    optimizer.step()
    assert len(copies) == 2
    second.remove()
    copies.clear()
    optimizer.step()
    assert not copies
    hold_pruned(optimizer, adapter)
    optimizer.step()
    assert len(copies) == 2


def test_lists_wrappers_and_pairs():
    class Accelerated(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

        state = property(lambda self: self.optimizer.state)
        param_groups = property(lambda self: self.optimizer.param_groups)

    adapter, empty = Adapter(), Adapter(rank=0)
    adapter.prune()
    a, b = SGD([adapter.lora_A], lr=0.1, weight_decay=1.0), AdamW([adapter.lora_B], lr=0.1)
    hold_pruned([Accelerated(a), b], ((name, m) for name, m in (("x", adapter), ("carrier", empty))))
    values = values_of(adapter)
    adapter.give_gradients()
    a.step()
    assert torch.equal(adapter.lora_B, values[1])
    b.step()
    for (p, where), value in zip(adapter.pruned(), values, strict=True):
        assert torch.equal(p[where], value[where]) and not (p == value)[~where].any()
    hold_pruned(a, nn.ModuleList([adapter]))


def test_integer_state_of_an_unknown_optimizer_is_left_alone():
    """Codes of a quantised state are not numbers: zero could be the most negative value."""

    class Coded(torch.optim.Optimizer):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                self.state[p] = {
                    "code": torch.full(p.shape, 7, dtype=torch.uint8),
                    "mean": torch.ones(p.shape[0]),
                    "full": torch.ones_like(p),
                }
                p.data.mul_(0.5)

    adapter = Adapter()
    adapter.prune()
    optimizer = Coded(adapter.parameters(), {})
    hold_pruned(optimizer, adapter)
    values = values_of(adapter)
    optimizer.step()
    for (p, where), value in zip(adapter.pruned(), values, strict=True):
        state = optimizer.state[p]
        assert torch.equal(p[where], value[where]) and torch.equal(p[~where], value[~where] * 0.5)
        assert (state["code"] == 7).all() and state["mean"].all() and not state["full"][where].any() and state["full"][~where].all()


def test_wrong_types_register_nothing():
    adapter = Adapter()
    optimizer = AdamW(adapter.parameters())
    for bad, match in [
        (3, "adapters: expected an adapter .* got int"),
        ("lora", "got str"),
        (nn.Linear(2, 2), "got Linear"),
        ([adapter, nn.Linear(2, 2)], "got Linear"),
        ([("name", 3)], "got int"),
    ]:
        with pytest.raises(TypeError, match=match):
            hold_pruned(optimizer, bad)
    for bad in (None, [], "adam", adapter):
        with pytest.raises(TypeError, match="optimizer: expected"):
            hold_pruned(bad, adapter)
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_optimizer_dies_and_copies_as_before():
    adapter = Adapter()
    optimizer = AdamW(adapter.parameters())
    handle = hold_pruned(optimizer, adapter)
    copy.deepcopy(optimizer)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    handle.remove()


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["sgd_momentum", "adamw_fused_amsgrad", "adagrad", "muon"])
def test_cuda_waits_for_nothing(name):
    adapter = Adapter().cuda()
    adapter.prune()
    optimizer = OPTIMIZERS[name](adapter.parameters())
    hold_pruned(optimizer, adapter)
    for _ in range(2):  # state is made in the first step
        adapter.give_gradients()
        values = values_of(adapter)
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        values = [v.cpu() for v in values]
        for (p, where), value in zip(adapter.pruned(), values, strict=True):
            where = where.cpu()
            assert torch.equal(p.detach().cpu()[where], value[where]) and not (p.detach().cpu() == value)[~where].any()
