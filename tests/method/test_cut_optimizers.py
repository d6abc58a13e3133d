"""A run that cuts is the run that masks, under each optimizer whose state can follow; others are refused."""

import logging

import pytest
import torch
from families import FAMILIES
from low_rank_pair import OPTIMIZERS
from torch.optim import ASGD, LBFGS, SGD, Adafactor, AdamW, Muon, Optimizer
from training import SCHEDULE, assert_equal, batch_for, built, hooks, state_of, train

from apt_ext import Controller, adapter_parameters, adapters
from apt_ext.optim.initial_state import optimizers_of

CONFIG = {"prune": ["heads", "neurons", "hidden"], "density": 0.5, "round_to": 1, "uniform": False}
FAMILY = FAMILIES["bert"]
ONCE = {"step", "mu_product"}  # state that a Parameter has one of


def two(parameters):
    return [AdamW(parameters[::2], lr=0.01, fused=True), SGD(parameters[1::2], lr=0.1, momentum=0.9)]


def grouped(parameters):
    """Two groups, with weight decay and other rates."""
    groups = [{"params": parameters[:9], "weight_decay": 0.3}, {"params": parameters[9:], "lr": 0.003}]
    return AdamW(groups, lr=0.01)


def accelerated(parameters):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(AdamW(parameters, lr=0.01))


ELEMENTWISE = {name: make for name, (make, _) in OPTIMIZERS.items() if name != "muon"}
ELEMENTWISE |= {"a list of two": two, "groups": grouped, "accelerate": accelerated}


def begin(make, **options):
    """(model, optimizer, Controller) before the first step; pooling and the classifier do not train."""
    apt, _ = built(FAMILY, **CONFIG, modules_to_save=[])
    optimizer = make(adapter_parameters(apt))
    return apt, optimizer, Controller(apt, optimizer, 16, log=lambda _: None, **{**SCHEDULE, **options})


def step(apt, optimizer, controller, seed):
    """One step; returns the loss."""
    loss = apt(**batch_for(FAMILY, seed)).loss
    loss.backward()
    controller.observe()
    for one in optimizer if isinstance(optimizer, list) else [optimizer]:
        one.step()
        one.zero_grad()
    controller.step()
    return loss.item()


def assert_state_fits(optimizer):
    for one in optimizers_of(optimizer):
        for parameter, state in one.state.items():
            own = {key: value for key, value in state.items() if key not in ONCE and value is not None}
            assert {key: value.shape for key, value in own.items()} == dict.fromkeys(own, parameter.shape)


def events(controller):
    """Without the threshold, which is compared within rounding."""
    return [{key: value for key, value in one.items() if key != "threshold"} for one in controller.history]


def assert_kept_factors_close(cut, masked):
    """Factors of a cut model are those entries of the masked one's that its masks keep.

    Where a gradient is little more than rounding, an optimizer that divides by its size makes much of it.
    """
    for (name, ours), (_, theirs) in zip(adapters(cut), adapters(masked), strict=True):
        rows, columns = theirs.mask_out != 0, theirs.mask_in != 0
        assert (ours.out_features, ours.in_features) == (int(rows.sum()), int(columns.sum())), name
        torch.testing.assert_close(ours.Wa, theirs.Wa[:, columns], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.Wb, theirs.Wb[rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_cut_run_is_the_masked_run(name):
    """These optimizers move each entry by itself, so what is kept goes the same way."""
    cut, masked = begin(ELEMENTWISE[name], shrink="cut"), begin(ELEMENTWISE[name], shrink="none")
    parameters = list(cut[0].parameters())
    for seed in range(16):
        losses = step(*cut, seed), step(*masked, seed)
        assert losses[0] == pytest.approx(losses[1], rel=1e-8), seed
        assert_state_fits(cut[1])
        assert events(cut[2]) == events(masked[2])
        for block in masked[2].blocks:
            assert torch.equal(cut[2].original(block), masked[2].original(block)), (seed, block)
        if seed + 1 in (6, 10, 14, 16):
            assert_kept_factors_close(cut[0], masked[0])
    thresholds = [[event["threshold"] for event in run[2].history] for run in (cut, masked)]
    assert thresholds[0] == pytest.approx(thresholds[1], rel=1e-6)
    assert len(cut[2].history) == 3 and cut[2].done and cut[2].density <= 0.5
    now = list(cut[0].parameters())
    assert len(now) == len(parameters) and all(a is b for a, b in zip(now, parameters, strict=True))
    assert sum(p.numel() for p in now) < 0.8 * sum(p.numel() for p in masked[0].parameters())


def muon_and_adamw(parameters):
    """Muon takes matrices alone; the factors of the first layer."""
    return [Muon(parameters[:8], lr=0.02), AdamW(parameters[8:], lr=0.01)]


def test_muon_looks_at_a_whole_matrix_so_its_steps_differ_after_a_cut():
    """It orthogonalises the momentum of a factor as a whole, and what is pruned has momentum under a mask and
    is not there after a cut. Equality holds up to the first event; from then on its state follows, its Parameters
    stay, and the run ends as planned."""
    cut, masked = begin(muon_and_adamw, shrink="cut"), begin(muon_and_adamw, shrink="none")
    parameters = list(cut[0].parameters())
    for seed in range(16):
        losses = step(*cut, seed), step(*masked, seed)
        assert_state_fits(cut[1])
        if seed < 6:
            assert losses[0] == pytest.approx(losses[1], rel=1e-8), seed
        if seed == 5:
            assert events(cut[2]) == events(masked[2]) and len(cut[2].history) == 1
            assert_kept_factors_close(cut[0], masked[0])
        assert all(torch.isfinite(p).all() for p in adapter_parameters(cut[0]))
    assert losses[0] != pytest.approx(losses[1], rel=1e-8)  # else this test has no subject
    assert cut[2].done and cut[2].density <= 0.5
    assert [event["step"] for event in cut[2].history] == [6, 10, 14]
    assert all(a is b for a, b in zip(cut[0].parameters(), parameters, strict=True))


# -- those that cannot follow --------------------------------------------------------------------------------


class Slow(Optimizer):
    """An optimizer that nobody knows, with state of its own."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                    parameter.sub_(average.mul_(0.9).add_(parameter.grad), alpha=group["lr"])


class OwnState(AdamW):
    """A known one that keeps something more, from its first step on."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("slow", parameter.detach().clone())


CANNOT = {"Adafactor": Adafactor, "LBFGS": LBFGS, "ASGD": ASGD, "Slow": Slow}


@pytest.mark.parametrize("name", CANNOT)
def test_an_optimizer_that_cannot_follow_is_refused_before_anything_changed(name):
    apt, _ = built(FAMILY, **CONFIG)
    optimizer = CANNOT[name](adapter_parameters(apt))
    before, listened, modules = state_of(apt), hooks(apt, optimizer), list(map(type, apt.modules()))
    options = {"growth": 1.0, "log": lambda _: None, **SCHEDULE}
    with pytest.raises(ValueError, match=f"^shrink: the state of {name} cannot follow a cut; shrink='compact'"):
        Controller(apt, optimizer, 16, shrink="cut", **options)
    assert hooks(apt, optimizer) == listened and list(map(type, apt.modules())) == modules
    assert_equal(state_of(apt), before)
    other = AdamW(adapter_parameters(apt), lr=1e-3)
    controller = Controller(apt, other, 16, **options)
    train(apt, other, controller, FAMILY, 16)
    assert controller.shrink == "cut" and apt.blocks.origin is not None and controller.done


@pytest.mark.parametrize("name", CANNOT)
def test_the_default_becomes_compact_and_the_log_says_why(name, caplog):
    apt, _ = built(FAMILY, **CONFIG)
    optimizer = CANNOT[name](adapter_parameters(apt))
    with caplog.at_level(logging.WARNING, "apt_ext"):
        controller = Controller(apt, optimizer, 16, growth=1.0, log=lambda _: None, **SCHEDULE)
    said = [line for line in caplog.messages if "compacted and not cut" in line]
    assert len(said) == 1 and f"because the state of {name} cannot follow a cut." in said[0]
    assert controller.shrink == "compact"
    if name == "LBFGS":  # whose step asks for the loss itself
        return
    shapes = [parameter.shape for parameter in apt.parameters()]
    train(apt, optimizer, controller, FAMILY, 16)
    assert controller.done and controller.density <= 0.5 and apt.blocks.origin is None
    assert [parameter.shape for parameter in apt.parameters()] == shapes
    assert all(adapter.compacted for _, adapter in adapters(apt) if adapter.rank)


def test_what_no_cut_touches_may_have_any_optimizer():
    """Adafactor trains something else; a subclass of a known optimizer is known."""

    class Renamed(AdamW):
        pass

    other = torch.nn.Parameter(torch.ones(3))
    apt, optimizer, controller = begin(lambda p: [Renamed(p, lr=1e-3), Adafactor([other])])
    assert controller.shrink == "cut"
    for seed in range(16):
        step(apt, optimizer, controller, seed)
    assert apt.blocks.origin is not None and controller.done
    assert_state_fits(optimizer[0])


def test_state_that_shows_later_makes_the_default_compact_at_the_first_cut(caplog):
    apt, optimizer, controller = begin(OwnState, growth=1.0)
    assert controller.shrink == "cut"
    train(apt, optimizer, controller, FAMILY, 5)
    with caplog.at_level(logging.WARNING, "apt_ext"):
        train(apt, optimizer, controller, FAMILY, 11, first=5)
    said = [line for line in caplog.messages if "compacted and not cut" in line]
    assert len(said) == 1 and "OwnState keeps the state 'slow' of no known start value" in said[0]
    assert controller.shrink == "compact" and controller.done and apt.blocks.origin is None


def test_state_that_shows_later_refuses_the_cut_that_was_asked_for():
    apt, optimizer, controller = begin(OwnState, growth=1.0, shrink="cut")
    train(apt, optimizer, controller, FAMILY, 5)
    apt(**batch_for(FAMILY, 5)).loss.backward()
    controller.observe()
    optimizer.step()
    optimizer.zero_grad()
    before = state_of(apt)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="OwnState keeps the state 'slow' of no known start value"):
            controller.step()
        assert_equal(state_of(apt), before)
        assert controller.now == 5 and controller.history == []
    for state in optimizer.state.values():
        del state["slow"]
    controller.step()
    assert controller.now == 6 and apt.blocks.origin is not None


def test_what_trains_in_an_optimizer_that_was_not_given_is_not_cut(caplog):
    """Its next step would be refused, with the run already cut."""
    family = FAMILIES["llama"]
    config = {"prune": ["heads", "neurons", "hidden"], "modules_to_save": ["lm_head"]}
    apt, _ = built(family, **config)
    factors = [p for _, adapter in adapters(apt) if adapter.rank for p in (adapter.lora_A, adapter.lora_B)]
    head = [p for p in adapter_parameters(apt) if not any(p is factor for factor in factors)]
    ours, other = torch.optim.AdamW(factors), torch.optim.AdamW(head)
    assert head
    with pytest.raises(ValueError, match=r"^shrink: lm_head.weight trains, .* is held by none of the optimizers that were given"):
        Controller(apt, ours, 16, shrink="cut", **SCHEDULE)
    controller = Controller(apt, ours, 16, **SCHEDULE)
    assert controller.shrink == "compact" and "lm_head.weight trains" in caplog.text
    controller.remove()
    assert Controller(apt, [ours, other], 16, **SCHEDULE).shrink == "cut"
