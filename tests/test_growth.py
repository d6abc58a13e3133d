"""apt_ext.growth: Parameters that change size, the optimizers that hold them, and the guard."""

import copy
import gc
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adadelta, Adafactor, Adagrad, Adam, Adamax, AdamW, Muon, NAdam, RAdam, RMSprop, Rprop

from apt_ext import growth
from apt_ext.growth import Resize, draw_rows, guard, optimizers_of, resizable_state, resize_parameters

# name: (make the optimizer, {state key: start value})
ADAM = {"exp_avg": 0.0, "exp_avg_sq": 0.0}
OPTIMIZERS = {
    "sgd": (lambda p: SGD(p, lr=0.1), {}),
    "sgd_momentum": (lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01), {"momentum_buffer": 0.0}),
    "sgd_nesterov_foreach": (lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True), {"momentum_buffer": 0.0}),
    "sgd_fused": (lambda p: SGD(p, lr=0.1, momentum=0.9, fused=True), {"momentum_buffer": 0.0}),
    "adam": (lambda p: Adam(p, lr=0.01), ADAM),
    "adam_fused": (lambda p: Adam(p, lr=0.01, fused=True), ADAM),
    "adam_tensor_lr": (lambda p: Adam(p, lr=torch.tensor(0.01)), ADAM),
    "adamw": (lambda p: AdamW(p, lr=0.01), ADAM),
    "adamw_foreach": (lambda p: AdamW(p, lr=0.01, foreach=True), ADAM),
    "adamw_fused": (lambda p: AdamW(p, lr=0.01, fused=True), ADAM),
    "adamw_amsgrad": (lambda p: AdamW(p, lr=0.01, amsgrad=True), ADAM | {"max_exp_avg_sq": 0.0}),
    "adamw_fused_amsgrad": (lambda p: AdamW(p, lr=0.01, amsgrad=True, fused=True), ADAM | {"max_exp_avg_sq": 0.0}),
    "nadam": (lambda p: NAdam(p, lr=0.01), ADAM),
    "radam": (lambda p: RAdam(p, lr=0.01), ADAM),
    "adamax": (lambda p: Adamax(p, lr=0.01), {"exp_avg": 0.0, "exp_inf": 0.0}),
    "rmsprop": (
        lambda p: RMSprop(p, lr=0.01, centered=True, momentum=0.9),
        {"square_avg": 0.0, "momentum_buffer": 0.0, "grad_avg": 0.0},
    ),
    "adagrad": (lambda p: Adagrad(p, lr=0.1, initial_accumulator_value=0.1), {"sum": 0.1}),
    "adagrad_fused": (lambda p: Adagrad(p, lr=0.1, initial_accumulator_value=0.1, fused=True), {"sum": 0.1}),
    "adadelta": (lambda p: Adadelta(p), {"square_avg": 0.0, "acc_delta": 0.0}),
    "rprop": (lambda p: Rprop(p, lr=0.02), {"prev": 0.0, "step_size": 0.02}),
    "muon": (lambda p: Muon(p, lr=0.02), {"momentum_buffer": 0.0}),
}


class Pair(nn.Module):
    """The two factors of a low-rank path: lora_A [R, 6], lora_B [5, R]."""

    def __init__(self, rank=4, dtype=torch.float32, seed=0):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.lora_A = nn.Parameter(0.3 * torch.randn(rank, 6, generator=draw, dtype=dtype))
        self.lora_B = nn.Parameter(0.3 * torch.randn(5, rank, generator=draw, dtype=dtype))

    def loss(self):
        x = torch.linspace(-1, 1, 18, dtype=self.lora_A.dtype).view(3, 6).sin()
        return ((x @ self.lora_A.T @ self.lora_B.T - 0.3) ** 2).sum()

    def train_steps(self, optimizer, count=3):
        for _ in range(count):
            optimizer.zero_grad()
            self.loss().backward()
            optimizer.step()

    def grow(self, optimizer=None, rank=7):
        A, B, more = self.lora_A.detach(), self.lora_B.detach(), rank - self.lora_A.shape[0]
        rows = draw_rows(more, 6, 0.5, torch.Generator().manual_seed(1), A.device, A.dtype)
        changes = [
            Resize(self.lora_A, torch.cat([A, rows]), 0),
            Resize(self.lora_B, torch.cat([B, B.new_zeros(5, more)], 1), 1),
        ]
        resize_parameters(changes, optimizer)


def bits(thing):
    """`thing` with every tensor replaced by what identifies it and its bytes: compares bitwise, NaN included."""
    if isinstance(thing, torch.Tensor):
        data = thing.detach().contiguous().flatten().view(torch.uint8) if thing.dim() else thing.detach().reshape(1).view(torch.uint8)
        return (tuple(thing.shape), str(thing.dtype), bytes(data.tolist()))
    if isinstance(thing, dict):
        return {key: bits(value) for key, value in thing.items()}
    return [bits(item) for item in thing] if isinstance(thing, list | tuple) else thing


def snapshot(pair, *optimizers):
    """Everything that a refusal must leave alone."""
    params = {name: (id(p), p._version, id(p.grad), bits(p), bits(p.grad)) for name, p in pair.named_parameters()}
    return params, [bits(o.state_dict()) for o in optimizers]


def refused(pair, optimizers, error, match, call):
    before = snapshot(pair, *optimizers)
    with pytest.raises(error, match=match):
        call()
    assert snapshot(pair, *optimizers) == before


# -- growth -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_growth_keeps_old_entries_and_starts_new_ones(name):
    make, starts = OPTIMIZERS[name]
    pair, calls = Pair(), []
    A, B = pair.lora_A, pair.lora_B
    A.register_hook(lambda grad: calls.append(tuple(grad.shape)))
    B.register_post_accumulate_grad_hook(lambda p: calls.append(tuple(p.grad.shape)))
    optimizer = make([A, B])
    pair.train_steps(optimizer)
    old = {p: (p.detach().clone(), p.grad.clone(), {k: torch.as_tensor(v).clone() for k, v in optimizer.state[p].items()}) for p in (A, B)}
    output = pair.loss()

    pair.grow(optimizer)

    assert pair.lora_A is A and pair.lora_B is B and A.requires_grad and B.requires_grad
    assert A.shape == (7, 6) and B.shape == (5, 7) and A.is_contiguous() and A.is_leaf
    torch.testing.assert_close(pair.loss(), output)
    for p, dim in ((A, 0), (B, 1)):
        value, grad, state = old[p]
        assert torch.equal(p.narrow(dim, 0, 4), value)
        assert torch.equal(p.grad.narrow(dim, 0, 4), grad) and not p.grad.narrow(dim, 4, 3).any()
        assert set(optimizer.state[p]) == set(state) and set(starts) <= set(state)
        for key, tensor in optimizer.state[p].items():
            tensor = torch.as_tensor(tensor)
            assert tensor.dtype == state[key].dtype and tensor.device == state[key].device
            if key in starts:
                assert torch.equal(tensor.narrow(dim, 0, 4), state[key])
                assert torch.equal(tensor.narrow(dim, 4, 3), torch.full_like(tensor.narrow(dim, 4, 3), starts[key]))
            else:
                assert torch.equal(tensor, state[key])
    assert A[4:].all() and not B[:, 4:].any()

    calls.clear()
    grown = B.detach()[:, 4:].clone()
    pair.train_steps(optimizer)
    assert calls.count((7, 6)) == 3 and calls.count((5, 7)) == 3 and len(calls) == 6
    assert torch.isfinite(A).all() and torch.isfinite(B).all()
    assert not torch.equal(B.detach()[:, 4:], grown) and B.detach()[:, 4:].all()


def hand_sgd(p, g, s, step):
    s["m"] = g if step == 1 else 0.9 * s["m"] + g
    return p - 0.1 * s["m"]


def hand_adamw(p, g, s, step):
    p = p * (1 - 0.01 * 0.01)
    s["m"], s["v"] = 0.9 * s["m"] + 0.1 * g, 0.999 * s["v"] + 0.001 * g * g
    return p - 0.01 * (s["m"] / (1 - 0.9**step)) / ((s["v"] / (1 - 0.999**step)).sqrt() + 1e-8)


def hand_adagrad(p, g, s, step):
    s["v"] = s["v"] + g * g
    return p - 0.1 * g / (s["v"].sqrt() + 1e-10)


@pytest.mark.parametrize(
    "make, rule, start",
    [
        (lambda p: SGD(p, lr=0.1, momentum=0.9), hand_sgd, 0.0),
        (lambda p: AdamW(p, lr=0.01), hand_adamw, 0.0),
        (lambda p: AdamW(p, lr=0.01, fused=True), hand_adamw, 0.0),
        (OPTIMIZERS["adagrad"][0], hand_adagrad, 0.1),
    ],
    ids=["sgd", "adamw", "adamw_fused", "adagrad"],
)
def test_growth_follows_the_float64_model(make, rule, start):
    pair = Pair(dtype=torch.float64)
    A, B = pair.lora_A.detach().clone(), pair.lora_B.detach().clone()
    optimizer = make(pair.parameters())
    state = [{key: torch.full_like(p, start) for key in "mv"} for p in (A, B)]
    x = torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6).sin()
    for step in range(1, 9):
        if step == 4:
            pair.grow(optimizer)
            A = torch.cat([A, pair.lora_A.detach()[4:]])
            B = torch.cat([B, B.new_zeros(5, 3)], 1)
            for s, dim in zip(state, (0, 1), strict=True):
                for key, t in s.items():
                    shape = (3, 6) if dim == 0 else (5, 3)
                    s[key] = torch.cat([t, torch.full(shape, start, dtype=t.dtype)], dim)
        residual = 2 * (x @ A.T @ B.T - 0.3)
        grads = (B.T @ residual.T @ x, residual.T @ x @ A.T)
        A, B = (rule(p, g, s, step) for p, g, s in zip((A, B), grads, state, strict=True))
        pair.train_steps(optimizer, 1)
    torch.testing.assert_close(pair.lora_A.detach(), A, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(pair.lora_B.detach(), B, rtol=1e-11, atol=1e-13)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", [{"fused": True}, {"capturable": True}, {"capturable": True, "foreach": True, "amsgrad": True}])
def test_growth_on_cuda(options):
    pair = Pair().cuda()
    pair.loss = lambda: ((torch.ones(3, 6, device="cuda") @ pair.lora_A.T @ pair.lora_B.T - 0.3) ** 2).sum()
    optimizer = AdamW(pair.parameters(), lr=0.01, **options)
    pair.train_steps(optimizer)
    step, moment = optimizer.state[pair.lora_A]["step"], optimizer.state[pair.lora_A]["exp_avg"].clone()
    A, B = pair.lora_A.detach(), pair.lora_B.detach()
    rows = draw_rows(3, 6, 0.5, torch.Generator().manual_seed(1), "cuda", A.dtype)  # a CPU generator serves any device
    changes = [Resize(pair.lora_A, torch.cat([A, rows]), 0), Resize(pair.lora_B, torch.cat([B, B.new_zeros(5, 3)], 1), 1)]
    resize_parameters(changes, optimizer)
    state = optimizer.state[pair.lora_A]
    assert state["step"] is step and state["exp_avg"].is_cuda
    assert torch.equal(state["exp_avg"][:4], moment) and not state["exp_avg"][4:].any()
    pair.train_steps(optimizer)
    assert pair.lora_B[:, 4:].all() and torch.isfinite(pair.lora_A).all()
    resize_parameters([Resize(pair.lora_A, torch.ones(4096, 6), 0)])
    pair.lora_A.grad = torch.ones(4096, 6, device="cuda")
    with pytest.raises(RuntimeError, match=r"expected the Parameter's \(4096, 6\)"):
        optimizer.step()
    assert (pair.lora_A == 1).all()


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


def test_backward_of_a_graph_that_saved_nothing_is_stopped_at_the_step():
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


# -- refusals -----------------------------------------------------------------------------------------------------------------------------


class OwnState(AdamW):
    """A subclass that keeps a tensor of its own."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("slow", p.detach().clone())


class Renamed(AdamW):
    pass


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda p: Adafactor(p), "Adafactor cannot be resized"),
        (lambda p: OwnState(p), "OwnState keeps the state 'slow'"),
        (lambda p: torch.optim.ASGD(p), "ASGD cannot be resized"),
    ],
    ids=["adafactor", "own_state", "asgd"],
)
def test_unknown_state_is_refused(make, match):
    pair = Pair()
    plain, unknown = AdamW([pair.lora_A]), make([pair.lora_B])
    for _ in range(2):
        pair.loss().backward()
        plain.step()
        unknown.step()
    refused(pair, [plain, unknown], RuntimeError, match, lambda: pair.grow([plain, unknown]))
    refused(pair, [plain, unknown], RuntimeError, match, lambda: resizable_state([pair.lora_A, pair.lora_B], [plain, unknown]))


def test_lbfgs_is_refused():
    """It keeps everything under its first Parameter, so the second one has no state that could be looked at."""
    pair = Pair()
    optimizer = LBFGS(pair.parameters(), lr=1e-3, max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = pair.loss()
        loss.backward()
        return loss

    optimizer.step(closure)
    change = Resize(pair.lora_B, torch.zeros(5, 7), 1)
    refused(pair, [optimizer], RuntimeError, "LBFGS cannot be resized", lambda: resize_parameters([change], optimizer))


def test_unknown_optimizer_without_state_and_known_subclass_are_accepted():
    pair = Pair()
    pair.grow(Adafactor(pair.parameters()))
    optimizer = Renamed(pair.parameters())
    pair.train_steps(optimizer)
    pair.grow(optimizer, 8)
    assert optimizer.state[pair.lora_B]["exp_avg"].shape == (5, 8)


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
    real, left = growth._carried, 4

    def failing(*args):
        nonlocal left
        left -= 1
        if left < 0:
            raise MemoryError("none left")
        return real(*args)

    monkeypatch.setattr(growth, "_carried", failing)
    for allowed in range(6):  # two gradients, four state tensors
        left = allowed
        refused(pair, [optimizer], MemoryError, "none left", lambda: pair.grow(optimizer))
    left = 6
    pair.grow(optimizer)


# -- optimizers_of ------------------------------------------------------------------------------------------------------------------------


class Wrapper(torch.optim.Optimizer):
    """As accelerate's: a subclass of Optimizer that never ran its constructor and passes everything on."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def state(self):
        return self.optimizer.state

    @property
    def param_groups(self):
        return self.optimizer.param_groups


class Lookahead(torch.optim.Optimizer):
    """A wrapper with slow weights of its own."""

    def __init__(self, optimizer):
        super().__init__([p for g in optimizer.param_groups for p in g["params"]], {})
        self.optimizer = optimizer

    def step(self, closure=None):
        self.optimizer.step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("slow", p.detach().clone())


def test_optimizers_of():
    pair = Pair()
    a, b = SGD([pair.lora_A], lr=0.1), AdamW([pair.lora_B])
    assert optimizers_of(None) == [] == optimizers_of([])
    assert optimizers_of(Wrapper(a)) == [a]
    assert optimizers_of([a, Wrapper(b), (a, [b, None])]) == [a, b]
    ahead = Lookahead(b)
    assert optimizers_of(ahead) == [b, ahead]
    with pytest.raises(TypeError, match="optimizer: expected .* got dict"):
        optimizers_of({})


def test_wrappers_grow_or_are_refused():
    pair = Pair()
    optimizer = AdamW(pair.parameters(), fused=True)
    pair.train_steps(optimizer)
    pair.grow(Wrapper(optimizer))
    ahead = Lookahead(optimizer)
    pair.train_steps(ahead)
    refused(pair, [optimizer, ahead], RuntimeError, "Lookahead cannot be resized", lambda: pair.grow(ahead, 8))


# -- the guard ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "sgd"])
def test_stale_state_is_refused_by_every_optimizer(name):
    """In a child process for the fused ones, see below; here too, as the guard comes before the step."""
    pair = Pair()
    first = nn.Parameter(torch.ones(3, 3))  # stepped before the stale one, were there no guard
    optimizer = OPTIMIZERS[name][0]([first, *pair.parameters()])
    first.grad = torch.ones(3, 3)
    pair.loss().backward()
    optimizer.step()
    pair.grow()
    optimizer.zero_grad()
    first.grad = torch.ones(3, 3)
    pair.loss().backward()
    before = first.detach().clone()
    refused(pair, [optimizer], RuntimeError, rf"{type(optimizer).__name__}: state '\w+' has shape .*increase_rank", optimizer.step)
    assert torch.equal(first, before)


def test_stale_adafactor_is_refused_before_it_moves_anything():
    pair = Pair()
    optimizer = Adafactor(pair.parameters())
    pair.train_steps(optimizer)
    pair.grow()
    optimizer.zero_grad()
    pair.loss().backward()
    refused(pair, [optimizer], RuntimeError, r"Adafactor: state 'row_var' has shape \(4, 1\)", optimizer.step)


def test_unknown_optimizer_may_keep_tensors_of_any_shape():
    class Projected(torch.optim.Optimizer):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                self.state[p]["projection"] = torch.ones(2, 6)

    pair = Pair()
    pair.grow()
    optimizer = Projected(pair.parameters(), {})
    for _ in range(2):
        optimizer.step()


FUSED_CHILD = """
import torch, sys
from torch import nn
from apt_ext.growth import Resize, guard, resize_parameters
P = torch.optim
for make in (
    lambda p: P.AdamW(p, fused=True), lambda p: P.Adam(p, fused=True, amsgrad=True),
    lambda p: P.SGD(p, lr=0.1, momentum=0.9, fused=True), lambda p: P.Adagrad(p, fused=True),
):
    for how in ("growth", "load", "grad"):
        p = nn.Parameter(torch.ones(64, 64))
        optimizer = make([p])
        p.grad = torch.ones(64, 64)
        optimizer.step()
        guard(p)
        if how == "growth":
            resize_parameters([Resize(p, torch.ones(4096, 64), 0)])
        elif how == "load":
            saved = optimizer.state_dict()
            p = nn.Parameter(torch.ones(4096, 64))
            guard(p)
            optimizer = make([p])
            optimizer.load_state_dict(saved)
        else:
            resize_parameters([Resize(p, torch.ones(4096, 64), 0)], optimizer)
            with torch.no_grad():  # another size behind our back, the gradient stays
                p.set_(torch.ones(64, 64))
                p.grad = torch.ones(64, 64)
                p.set_(torch.ones(4096, 64))
        if how != "grad":
            p.grad = torch.ones(4096, 64)
        value, state = p.detach().clone(), {k: torch.as_tensor(v).clone() for k, v in optimizer.state.get(p, {}).items()}
        try:
            optimizer.step()
        except RuntimeError as error:
            assert "expected the Parameter's (4096, 64)" in str(error), error
        else:
            raise SystemExit(f"{type(optimizer).__name__} stepped after {how}")
        assert torch.equal(p, value)
        assert all(torch.equal(torch.as_tensor(v), state[k]) for k, v in optimizer.state.get(p, {}).items())
print("fine")
"""


def child(code):
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)


def test_fused_steps_never_touch_memory_behind_stale_tensors():
    done = child(FUSED_CHILD)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


def test_guard_after_optimizer_load_state_dict_of_another_rank():
    small, large = Pair(rank=4), Pair(rank=7)
    old = AdamW(small.parameters())
    small.train_steps(old)
    optimizer = AdamW(large.parameters(), fused=True)
    guard(*large.parameters())
    optimizer.load_state_dict(old.state_dict())
    large.loss().backward()
    refused(large, [optimizer], RuntimeError, r"state 'exp_avg' has shape \(4, 6\), expected the Parameter's \(7, 6\)", optimizer.step)


def test_guard_is_lost_by_deepcopy_and_taken_again():
    pair = copy.deepcopy(Pair())
    guard(*pair.parameters(), *pair.parameters())
    assert getattr(pair.lora_A, growth._FORMER) == ((4, 6),)
    twin = copy.deepcopy(pair)
    assert not hasattr(twin.lora_A, growth._FORMER)
    again = torch.load(_saved(pair.lora_A), weights_only=True)
    assert torch.equal(again, pair.lora_A)


def _saved(thing):
    import io

    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return buffer


def test_one_global_hook():
    from torch.optim.optimizer import _global_optimizer_pre_hooks as hooks

    guard(nn.Parameter(torch.ones(1)))
    guard(nn.Parameter(torch.ones(1)))
    assert list(hooks.values()).count(growth._refuse_stale) == 1


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own import of its compiler
def test_compiled_step():
    pair = Pair()
    guard(*pair.parameters())
    optimizer = AdamW(pair.parameters())
    step = torch.compile(optimizer.step, backend="eager")
    for grown in (False, True):
        if grown:
            pair.grow(optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            pair.loss().backward()
            step()
    pair.grow(rank=8)
    optimizer.zero_grad()
    pair.loss().backward()
    with pytest.raises(RuntimeError, match="has shape"):
        step()


def test_grad_scaler_and_several_groups():
    pair = Pair()
    optimizer = AdamW([{"params": [pair.lora_A]}, {"params": [pair.lora_B], "lr": 0.02}])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for rank in (4, 6, 7):
        pair.grow(optimizer, rank)
        optimizer.zero_grad()
        scaler.scale(pair.loss()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.state[pair.lora_B]["exp_avg"].shape == (5, 7) and optimizer.param_groups[1]["lr"] == 0.02


# -- process groups -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_growth_under_ddp_is_refused(process_group):
    pair, other = Pair(), Pair()
    pair.forward = pair.loss
    optimizer = AdamW(pair.parameters())
    wrapped = nn.parallel.DistributedDataParallel(pair)
    wrapped().backward()
    optimizer.step()
    refused(pair, [optimizer], RuntimeError, "held by DistributedDataParallel.*max_rank", lambda: pair.grow(optimizer))
    other.grow()
    wrapped.itself = [wrapped]  # a cycle: deleted, it waits for the collector
    del wrapped
    pair.grow(optimizer)
    pair.train_steps(optimizer)
    nn.parallel.DistributedDataParallel(pair)().backward()
    assert pair.lora_A.grad.shape == (7, 6)


def test_growth_of_a_sharded_parameter_is_refused(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    pair = Pair()
    fully_shard(pair, mesh=init_device_mesh("cpu", (1,)))
    assert type(pair.lora_A.data).__name__ == "DTensor"
    value = torch.ones(7, 6)
    with pytest.raises(RuntimeError, match="DTensor.*max_rank"):
        resize_parameters([Resize(pair.lora_A, value, 0)])
    assert pair.lora_A.shape == (4, 6)


def test_growth_under_fsdp1_is_refused(process_group):
    from torch.distributed.fsdp import FullyShardedDataParallel

    pair = Pair()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own deprecations
        wrapped = FullyShardedDataParallel(pair, use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(RuntimeError, match="held by FullyShardedDataParallel"):
        resize_parameters([Resize(pair.lora_A, torch.ones(7, *pair.lora_A.shape[1:]), 0)])
    del wrapped
    gc.collect()


def test_growth_under_deepspeed_is_refused(process_group, monkeypatch):
    import types

    class DeepSpeedEngine(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(DeepSpeedEngine=DeepSpeedEngine))
    pair = Pair()
    engine = DeepSpeedEngine(pair)
    refused(pair, [], RuntimeError, "held by DeepSpeedEngine", pair.grow)
    del engine
    pair.grow()


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


TWO_RANKS = """
import os, sys, torch
from apt_ext.growth import draw_rows
path, rank = sys.argv[1], int(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method="file://" + path, rank=rank, world_size=2)
for dtype in (torch.float32, torch.bfloat16):
    rows = draw_rows(3, 4, 1.0, torch.Generator().manual_seed(rank), "cpu", dtype)
    both = [torch.empty_like(rows) for _ in range(2)]
    torch.distributed.all_gather(both, rows)
    mine = torch.empty(3, 4).normal_(0.0, 1.0, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(both[0], both[1]) and torch.equal(rows, mine)
torch.distributed.destroy_process_group()
"""


def test_two_ranks_take_rank_zeros_rows(tmp_path):
    ranks = [
        subprocess.Popen([sys.executable, "-c", TWO_RANKS, str(tmp_path / "meet"), str(rank)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
