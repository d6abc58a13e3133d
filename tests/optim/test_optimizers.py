"""apt_ext.growth and optimizers: state that grows with its Parameter, state that is refused."""

import pytest
import torch
from low_rank_pair import OPTIMIZERS, Pair, bits, refused
from torch import nn
from torch.optim import LBFGS, SGD, Adafactor, Adagrad, AdamW, Rprop

from apt_ext.optim.initial_state import optimizers_of
from apt_ext.optim.resize import Resize, draw_rows, resizable_state, resize_parameters


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


# -- how a training loop drives them -------------------------------------------------------------------------------------------------------


def test_several_groups_and_a_list_of_optimizers():
    pair = Pair()
    bias = nn.Parameter(torch.ones(3))
    groups = Rprop([{"params": [pair.lora_A, bias], "lr": 0.02}, {"params": [pair.lora_B], "lr": 0.5}])
    (pair.loss() + bias.sum()).backward()
    groups.step()
    pair.grow(groups)
    assert (groups.state[pair.lora_A]["step_size"][4:] == 0.02).all() and (groups.state[pair.lora_B]["step_size"][:, 4:] == 0.5).all()
    assert [len(group["params"]) for group in groups.param_groups] == [2, 1] and groups.state[bias]["step_size"].shape == (3,)
    pair.train_steps(groups)

    pair = Pair()
    optimizers = [AdamW([pair.lora_A], fused=True), [SGD([pair.lora_B], lr=0.1, momentum=0.9)]]
    for _ in range(2):
        pair.zero_grad()
        pair.loss().backward()
        optimizers[0].step()
        optimizers[1][0].step()
        pair.grow(optimizers, rank=pair.lora_A.shape[0] + 1)
    assert optimizers[0].state[pair.lora_A]["exp_avg"].shape == (6, 6)
    assert optimizers[1][0].state[pair.lora_B]["momentum_buffer"].shape == (5, 6)


def test_adagrad_starts_with_what_it_was_made_with():
    """It reads no group's own value, so neither does growth."""
    pair = Pair()
    optimizer = Adagrad([{"params": list(pair.parameters()), "initial_accumulator_value": 9.0}], initial_accumulator_value=0.5)
    pair.grow(optimizer)
    pair.train_steps(optimizer, 1)
    fresh = optimizer.state[pair.lora_A]["sum"] - pair.lora_A.grad.square()
    torch.testing.assert_close(fresh, torch.full_like(fresh, 0.5))
    pair.grow(optimizer, 8)
    assert (optimizer.state[pair.lora_A]["sum"][7:] == 0.5).all()


def test_capturable_state_keeps_its_step_tensor():
    """On a CPU such an optimizer cannot step; what a captured graph reads must stay the same tensor."""
    pair = Pair()
    optimizer = AdamW(pair.parameters(), capturable=True)
    step = torch.tensor(5.0)
    optimizer.state[pair.lora_A] = {"step": step, "exp_avg": torch.ones(4, 6), "exp_avg_sq": torch.ones(4, 6)}
    pair.grow(optimizer)
    state = optimizer.state[pair.lora_A]
    assert state["step"] is step and step == 5.0
    assert torch.equal(state["exp_avg"], torch.cat([torch.ones(4, 6), torch.zeros(3, 6)]))


@pytest.mark.parametrize("fused", [False, True])
def test_accelerates_wrapper_grows_its_optimizer(fused, fused_is_guarded):
    accelerate = pytest.importorskip("accelerate")
    pair = Pair()
    optimizer = accelerate.Accelerator(cpu=True).prepare(AdamW(pair.parameters(), lr=0.01, fused=fused))
    assert type(optimizer).__name__ == "AcceleratedOptimizer"
    pair.train_steps(optimizer)
    moment = optimizer.state[pair.lora_A]["exp_avg"].clone()
    pair.grow(optimizer)
    assert torch.equal(optimizer.optimizer.state[pair.lora_A]["exp_avg"][:4], moment)
    pair.train_steps(optimizer)
    assert pair.lora_B[:, 4:].all()
    pair.grow(None, 9)
    pair.zero_grad()
    pair.loss().backward()
    with pytest.raises(RuntimeError, match="AdamW: state 'exp_avg' has shape"):
        optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_grad_scaler_skips_moves_nothing(fused):
    pair = Pair()
    optimizer = AdamW([{"params": [pair.lora_A]}, {"params": [pair.lora_B], "lr": 0.02}], fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10)
    for rank in (4, 6, 7):
        pair.grow(optimizer, rank)
        for skipped in (False, True, False):
            optimizer.zero_grad()
            scaler.scale(pair.loss()).backward()
            if skipped:
                pair.lora_B.grad[0, -1] = float("inf")
            before = bits([list(pair.parameters()), *(optimizer.state[p] for p in pair.parameters())])
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            assert (bits([list(pair.parameters()), *(optimizer.state[p] for p in pair.parameters())]) == before) == skipped
            assert scaler.get_scale() == (scale / 2 if skipped else scale)
    assert optimizer.state[pair.lora_B]["exp_avg"].shape == (5, 7) and optimizer.param_groups[1]["lr"] == 0.02


def test_a_skipped_step_after_growth_without_the_optimizer_is_still_refused_later(fused_is_guarded):
    pair = Pair()
    optimizer = AdamW(pair.parameters(), fused=True)
    pair.train_steps(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    pair.grow()
    for bad in (True, False):
        optimizer.zero_grad()
        scaler.scale(pair.loss()).backward()
        if bad:
            pair.lora_B.grad[0, 0] = float("nan")
        before = bits(list(pair.parameters()))
        with pytest.raises(RuntimeError, match="AdamW: state 'exp_avg' has shape"):
            scaler.step(optimizer)
        assert bits(list(pair.parameters())) == before
        scaler.update()


SCHEDULERS = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "one_cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_on_driving_the_live_optimizer(name):
    rates = []
    for grows in (False, True):
        pair = Pair()
        optimizer = SGD(pair.parameters(), lr=0.1, momentum=0.9)
        scheduler = SCHEDULERS[name](optimizer)
        seen = []
        for step in range(8):
            if grows and step in (3, 5):
                pair.grow(optimizer, pair.lora_A.shape[0] + 1)
            before = pair.lora_A.detach().clone()
            pair.train_steps(optimizer, 1)
            moved = scheduler.get_last_lr()[0] * optimizer.state[pair.lora_A]["momentum_buffer"]
            torch.testing.assert_close(before - pair.lora_A.detach(), moved, rtol=1e-3, atol=1e-6)
            seen.append((scheduler.get_last_lr(), optimizer.param_groups[0]["momentum"]))
            scheduler.step()
        assert scheduler.optimizer is optimizer
        rates.append(seen)
    assert rates[0] == rates[1]


def test_closures():
    pair = Pair()
    optimizer = AdamW(pair.parameters(), lr=0.01)

    def closure():
        optimizer.zero_grad()
        loss = pair.loss()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    for rank in (5, 7):
        pair.grow(optimizer, rank)
        last = optimizer.step(closure=closure)
    assert last < first and pair.lora_B[:, 4:].all()
