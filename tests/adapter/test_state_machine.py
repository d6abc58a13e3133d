"""Any order of set, grow, merge, train, save, load, copy, move and autocast against a plain float64 model of the same layer.

HYPOTHESIS_PROFILE=nightly runs some 10,000 steps instead of some 300. What fails is kept in .hypothesis and tried first the next time.
"""

import copy
import io
import os
import pickle

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from problems import EPS, assert_accurate
from torch import nn
from torch.utils.checkpoint import checkpoint

from apt_ext import APTAdapter

N, K, SCALING = 5, 6, 1.5
LIMIT = min(N, K)
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"

VALUE = st.sampled_from([0.0, 0.0, 0.25, 1 / 3, 1.0, 1.0])
RANK = st.integers(0, LIMIT)
SEED = st.integers(0, 2**20)
OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.05),
    "AdamW amsgrad": lambda params: torch.optim.AdamW(params, lr=0.05, amsgrad=True, foreach=True),
    "AdamW fused": lambda params: torch.optim.AdamW(params, lr=0.05, fused=True),
}


def mask(size):
    return st.none() | st.lists(VALUE, min_size=size, max_size=size).map(torch.tensor)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Plain:
    """The oracle: five float64 tensors, two masks, and an optimizer of its own over A and B."""

    def __init__(self, W, b, A, B):
        self.W, self.b, self.A, self.B = W, b, A.requires_grad_(), B.requires_grad_()
        self.m_in, self.m_out = torch.ones(K).double(), torch.ones(N).double()
        self.optimizer = None

    def __call__(self, x):
        x = torch.where(self.m_in == 0, 0, x * self.m_in)
        y = x @ self.W.T + SCALING * (x @ self.A.T) @ self.B.T + self.b
        return torch.where(self.m_out == 0, 0, self.m_out * y)

    def magnitudes(self, x, grad=None):
        """The sums of magnitudes that bound the errors of (y, dx, dA, dB)."""
        other = Plain(self.W.abs(), self.b.abs(), self.A.detach().abs(), self.B.detach().abs())
        other.m_in, other.m_out = self.m_in, self.m_out
        x = x.detach().double().abs().requires_grad_()
        y = other(x)
        return y.detach(), *torch.autograd.grad(y, (x, other.A, other.B), torch.ones_like(y) if grad is None else grad.double().abs())

    def replace(self, A, B):
        """Factors of another rank; the optimizer's state of what was there stays, of what is new it is zero."""
        for name, new, dim in (("A", A, 0), ("B", B, 1)):
            old = getattr(self, name)
            new = new.detach().clone().requires_grad_()
            setattr(self, name, new)
            if self.optimizer is None:
                continue
            for group in self.optimizer.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]
            state = self.optimizer.state.pop(old, None)
            if state is not None:
                self.optimizer.state[new] = {key: self._padded(value, new, old, dim) for key, value in state.items()}

    @staticmethod
    def _padded(value, new, old, dim):
        if not isinstance(value, torch.Tensor) or value.shape != old.shape or value.dim() < 2:
            return value
        out = torch.zeros_like(new, requires_grad=False)
        out.narrow(dim, 0, old.shape[dim]).copy_(value)
        return out

    def round_to(self, dtype):
        """What a module that holds this in `dtype` has left of it."""
        self.W, self.b = (t.to(dtype).double() for t in (self.W, self.b))
        for t in (self.A, self.B):
            t.data = t.detach().to(dtype).double()


class Life(RuleBasedStateMachine):
    steps = 0

    @initialize(rank=RANK, max_rank=st.none() | st.just(LIMIT), seed=SEED)
    def start(self, rank, max_rank, seed):
        W, b, A, B = normal(seed, N, K), normal(seed + 1, N), normal(seed + 2, rank, K), normal(seed + 3, N, rank)
        linear = nn.Linear(K, N, dtype=torch.float64)
        with torch.no_grad():
            linear.weight.copy_(W)
            linear.bias.copy_(b)
        self.adapter = APTAdapter.from_linear(linear, rank, SCALING, max_rank=max_rank)
        with torch.no_grad():
            self.adapter.lora_A[:rank] = A
            self.adapter.lora_B[:, :rank] = B
        self.plain = Plain(W, b, A, B)
        self.optimizer, self.dtype, self.others = None, torch.float64, []
        self.merged_in = self.dtype
        Life.steps += 1

    # -- what may be refused -----------------------------------------------------------------------------------------

    def refused(self, call, error=RuntimeError, match="merged"):
        with pytest.raises(error, match=match):
            call()

    @rule(m_in=mask(K), m_out=mask(N))
    def set_masks(self, m_in, m_out):
        if self.adapter.merged:
            return self.refused(lambda: self.adapter.set_masks(m_in, m_out))
        self.adapter.set_masks(m_in, m_out)
        self.plain.m_in = self.plain.m_in if m_in is None else m_in.double()
        self.plain.m_out = self.plain.m_out if m_out is None else m_out.double()

    @precondition(lambda self: not self.adapter.merged)
    @rule(bad=st.sampled_from([-0.5, 1.5, float("nan"), None]))
    def set_a_bad_mask(self, bad):
        m_out = torch.ones(N + 1) if bad is None else torch.full((N,), bad)
        self.refused(lambda: self.adapter.set_masks(torch.zeros(K), m_out), ValueError, "mask_out must")

    @rule(rank=RANK, seed=SEED, given=st.booleans())
    def grow(self, rank, seed, given):
        adapter, old = self.adapter, self.adapter.rank

        def grow():
            adapter.increase_rank(rank, optimizer=self.optimizer if given else None, generator=torch.Generator().manual_seed(seed))

        if adapter.merged:
            return self.refused(grow)
        if rank < old:
            return self.refused(grow, ValueError, "new_rank must lie between")
        given = given or adapter.max_rank is not None
        grow()
        assert torch.equal(adapter.Wa[:old].double(), self.plain.A) and torch.equal(adapter.Wb[:, :old].double(), self.plain.B)
        assert (adapter.Wb[:, old:] == 0).all() and (adapter.Wa[old:] != 0).all()
        if rank > old and not given and self.optimizer is not None and self.optimizer.state:
            adapter(torch.ones(1, K, dtype=self.dtype)).sum().backward()
            before = adapter.lora_A.detach().clone()
            self.refused(self.optimizer.step, RuntimeError, "shape")
            assert torch.equal(adapter.lora_A, before)
            self.forget()
        self.plain.replace(adapter.Wa.double(), adapter.Wb.double())

    @rule(on=st.booleans(), dense=st.sampled_from(["keep", "cpu"]))
    def compact(self, on, dense):
        if self.adapter.merged:
            return self.refused(lambda: self.adapter.compact(on, dense), RuntimeError, "merged")
        self.adapter.compact(on, dense)
        assert self.adapter.compacted == on

    # -- merge ---------------------------------------------------------------------------------------------------------

    @rule(keep=st.sampled_from(["device", "cpu"]))
    def merge(self, keep):
        self.adapter.eval().merge_weights(keep)
        assert self.adapter.merged

    @rule()
    def unmerge(self):
        self.adapter.unmerge_weights()
        assert not self.adapter.merged
        self.merged_in = self.dtype

    # -- training ------------------------------------------------------------------------------------------------------

    def forget(self):
        self.optimizer = self.plain.optimizer = None
        self.adapter.zero_grad()

    @rule(name=st.sampled_from(sorted(OPTIMIZERS)))
    def take_an_optimizer(self, name):
        self.forget()
        self.optimizer = OPTIMIZERS[name]([self.adapter.lora_A, self.adapter.lora_B])
        plain = "AdamW amsgrad" if "amsgrad" in name else name.split()[0]
        self.plain.optimizer = OPTIMIZERS[plain]([self.plain.A, self.plain.B])

    @precondition(lambda self: self.optimizer is not None and not self.adapter.merged)
    @rule(seed=SEED, tokens=st.integers(0, 3), way=st.sampled_from(["plain", "checkpoint", "reentrant"]))
    def train(self, seed, tokens, way):
        adapter, plain = self.adapter.train(), self.plain
        x, grad = normal(seed, tokens, K).to(self.dtype), normal(seed + 1, tokens, N).to(self.dtype)
        self.optimizer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = adapter(leaf) if way == "plain" else checkpoint(adapter, leaf, use_reentrant=way == "reentrant")
        y.backward(grad)
        plain_x = x.double().requires_grad_()
        inputs = (plain_x, plain.A, plain.B)
        want = torch.autograd.grad(plain(plain_x), inputs, grad.double())
        bound = plain.magnitudes(x, grad)[1:]
        rank = adapter.rank
        got = (leaf.grad, adapter.lora_A.grad[:rank], adapter.lora_B.grad[:, :rank])
        for g, w, b in zip(got, want, bound, strict=True):
            assert_accurate(g, w, b, self.dtype)
        assert (adapter.lora_A.grad[rank:] == 0).all() and (adapter.lora_B.grad[:, rank:] == 0).all()
        # One optimizer step from the same gradients: what differs now is the optimizer's state, or the step.
        plain.A.grad, plain.B.grad = got[1].double().clone(), got[2].double().clone()
        self.optimizer.step()
        plain.optimizer.step()
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2}[self.dtype]
        for g, w in ((adapter.Wa, plain.A), (adapter.Wb, plain.B)):
            torch.testing.assert_close(g.double(), w, rtol=tolerance, atol=tolerance)
        with torch.no_grad():
            plain.A.copy_(adapter.Wa)
            plain.B.copy_(adapter.Wb)

    @precondition(lambda self: not self.adapter.merged and self.adapter.rank < LIMIT)
    @rule(name=st.sampled_from(sorted(OPTIMIZERS)), seed=SEED)
    def train_through_growth(self, name, seed):
        """What chance seldom puts in a row."""
        self.take_an_optimizer(name)
        self.train(seed, 3, "plain")
        self.grow(self.adapter.rank + 1, seed, given=True)
        self.train(seed + 1, 2, "plain")

    # -- copies --------------------------------------------------------------------------------------------------------

    def go_on_with(self, adapter):
        """The one before must stay as it is, whatever happens to the one after."""
        self.others = [*self.others[-2:], (self.adapter, {name: value.clone() for name, value in self.adapter.state_dict().items()})]
        self.adapter = adapter
        self.forget()

    @rule(way=st.sampled_from(["deepcopy", "pickle", "torch.save"]))
    def copy(self, way):
        if way == "deepcopy":
            return self.go_on_with(copy.deepcopy(self.adapter))
        if way == "pickle":
            return self.go_on_with(pickle.loads(pickle.dumps(self.adapter)))  # noqa: S301
        file = io.BytesIO()
        torch.save(self.adapter, file)
        file.seek(0)
        self.go_on_with(torch.load(file, weights_only=False))  # noqa: S614

    @rule(rank=RANK, max_rank=st.none() | st.just(LIMIT), merged=st.booleans())
    def save_and_load(self, rank, max_rank, merged):
        file = io.BytesIO()
        torch.save(self.adapter.state_dict(), file)
        file.seek(0)
        fresh = APTAdapter.from_linear(nn.Linear(K, N, dtype=self.dtype), rank, SCALING, max_rank=max_rank)
        if merged:
            fresh.merge_weights()
        fresh.load_state_dict(torch.load(file, weights_only=True))
        self.merged_in = self.dtype
        self.go_on_with(fresh.eval())

    @rule(damage=st.sampled_from(["lora_A", "mask_in", "rank"]))
    def load_what_does_not_fit(self, damage):
        state = dict(self.adapter.state_dict())
        state[damage] = {"lora_A": torch.ones(2, K + 1), "mask_in": torch.full((K,), 2.0), "rank": torch.tensor(99)}[damage]
        self.refused(lambda: self.adapter.load_state_dict(state), ValueError, "must")

    @rule(dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    def move(self, dtype):
        if not self.adapter.merged:
            self.merged_in = dtype
        else:
            self.merged_in = max(dtype, self.merged_in, key=EPS.get)  # a merged weight moves as it is: rounded once more, or already
        self.adapter.to(dtype)
        self.dtype = dtype
        self.plain.round_to(dtype)
        self.forget()

    # -- what always holds ---------------------------------------------------------------------------------------------

    @rule(seed=SEED)
    def autocast(self, seed):
        x = normal(seed, 3, K).to(self.dtype)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            y = self.adapter.eval()(x)
        if self.dtype != torch.float64:
            assert y.dtype == torch.bfloat16
            assert_accurate(y, self.plain(x.double()), self.plain.magnitudes(x)[0], torch.bfloat16)

    @invariant()
    def equals_the_plain_model(self):
        if not hasattr(self, "adapter"):
            return
        Life.steps += 1
        adapter, plain = self.adapter, self.plain
        assert adapter.mask_in.dtype == adapter.mask_out.dtype == torch.float32
        assert torch.equal(adapter.mask_in.double(), plain.m_in) and torch.equal(adapter.mask_out.double(), plain.m_out)
        assert adapter.rank == len(plain.A) and torch.equal(adapter.Wa.double(), plain.A) and torch.equal(adapter.Wb.double(), plain.B)
        assert (adapter.lora_A[adapter.rank :] == 0).all() and (adapter.lora_B[:, adapter.rank :] == 0).all()
        state = adapter.state_dict()
        assert torch.equal(state["base_layer.weight"].double(), plain.W) and torch.equal(state["base_layer.bias"].double(), plain.b)
        if not adapter.merged:
            assert (
                adapter.packing.store.is_offloaded
                or torch.equal(adapter.weight.double(), plain.W)
                and torch.equal(adapter.bias.double(), plain.b)
            )
        x = normal(1, 4, K).to(self.dtype)
        with torch.no_grad():
            got, want = adapter(x), plain(x.double())
        # Merged, the weight is rounded once more and multiplied by stock torch.
        assert_accurate(got, want, (4 if adapter.merged else 1) * plain.magnitudes(x)[0], self.merged_in if adapter.merged else self.dtype)
        assert (got[:, plain.m_out == 0] == 0).all()
        for other, before in self.others:
            after = other.state_dict()
            assert all(torch.equal(value, after[name]) for name, value in before.items())


Life.TestCase.settings = settings(
    max_examples=500 if NIGHTLY else 40, stateful_step_count=30, deadline=None, print_blob=True, report_multiple_bugs=False
)


class TestLife(Life.TestCase):
    pass


def test_the_machine_ran_its_steps():
    """Runs after it, as pytest keeps the order of a file."""
    assert Life.steps == 0 or Life.steps >= (10_000 if NIGHTLY else 300)
