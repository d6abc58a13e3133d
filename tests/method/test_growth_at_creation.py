"""Ranks that could not grow at an event: refused when the Controller is made, naming max_rank, and not in the middle of a run."""

import pytest
import torch
from families import FAMILIES
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from training import SHORT, built, train

from apt_ext import Controller, Growth, adapter_parameters, adapters

transformers = pytest.importorskip("transformers")
WORDS = r"optimizer: expected one whose state can follow ranks that grow, got {}; .* APTConfig\(max_rank=\.\.\.\), or .*growth=1"


class Lion(torch.optim.Optimizer):
    """An optimizer of another package: nothing is known of its state."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    moment = self.state[parameter].setdefault("m", torch.zeros_like(parameter))
                    moment.lerp_(parameter.grad, 0.1)
                    parameter.sub_(moment.sign(), alpha=group["lr"])


def adafactor(parameters):
    return transformers.optimization.Adafactor(parameters, lr=1e-3, relative_step=False, scale_parameter=False)


OPTIMIZERS = {
    "adafactor": ("Adafactor", adafactor),
    "torch's adafactor": ("Adafactor", torch.optim.Adafactor),
    "asgd": ("ASGD", torch.optim.ASGD),
    "another package's": ("Lion", Lion),
}


def hooks(apt, optimizer):
    return sum(len(module._forward_pre_hooks) for module in apt.modules()), len(optimizer._optimizer_step_post_hooks)


@pytest.mark.parametrize(("name", "made"), [("bert", "adafactor"), *(("llama", made) for made in OPTIMIZERS)])
def test_state_that_cannot_follow_is_refused(name, made):
    apt, _ = built(FAMILIES[name])
    words, make = OPTIMIZERS[made]
    optimizer = make(adapter_parameters(apt))
    with pytest.raises(ValueError, match=WORDS.format(words)):
        Controller(apt, optimizer, 16, **SHORT)
    assert hooks(apt, optimizer) == (0, 0)
    Controller(apt, optimizer, 16, growth=1.0, **SHORT).remove()
    Controller(apt, optimizer, 16, growth=Growth(limit=2), **SHORT)  # where every rank is already


@pytest.mark.parametrize("made", ["adafactor", "another package's"])
def test_within_max_rank_the_run_runs(made):
    family = FAMILIES["llama"]
    apt, _ = built(family, max_rank=8)
    optimizer = OPTIMIZERS[made][1](adapter_parameters(apt))
    controller = Controller(apt, optimizer, 4, schedule={"start": 0, "end": 3, "events": 1})
    train(apt, optimizer, controller, family, 3)
    assert controller.done and max(adapter.rank for _, adapter in adapters(apt)) > 2
    for _, adapter in adapters(apt):
        assert not bool(adapter.lora_A[adapter.rank :].any()) and not bool(adapter.lora_B[:, adapter.rank :].any())


def test_it_is_the_optimizer_of_the_factors_that_counts():
    """In a list, in accelerate's wrapper, and in a group of its own."""
    accelerate = pytest.importorskip("accelerate")
    apt, _ = built(FAMILIES["bert"])
    factors = [factor for _, adapter in adapters(apt) for factor in (adapter.lora_A, adapter.lora_B) if factor.numel()]
    rest = [parameter for parameter in adapter_parameters(apt) if all(parameter is not factor for factor in factors)]
    wrapper = accelerate.optimizer.AcceleratedOptimizer.__new__(accelerate.optimizer.AcceleratedOptimizer)
    wrapper.optimizer = adafactor([{"params": rest}, {"params": factors}])
    for wrong in (wrapper, [torch.optim.SGD(rest), adafactor(factors)], [torch.optim.SGD(factors[1:]), adafactor(factors[:1])]):
        with pytest.raises(ValueError, match=WORDS.format("Adafactor")):
            Controller(apt, wrong, 16, **SHORT)
    Controller(apt, [adafactor(rest), torch.optim.AdamW(factors)], 16, **SHORT)  # of the head it may keep what it likes


def test_some_reserved_ranks_are_not_enough():
    apt, _ = built(FAMILIES["bert"], max_rank=8)
    name, adapter = next((name, adapter) for name, adapter in adapters(apt) if adapter.rank)
    apt.model.set_submodule(name, type(adapter).from_linear(adapter.base_layer, 2))
    with pytest.raises(ValueError, match="max_rank"):
        Controller(apt, adafactor([p for p in apt.parameters() if p.requires_grad]), 16, **SHORT)


def test_what_ddp_holds_cannot_grow(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        apt, optimizer = built(FAMILIES["bert"])
        model = DistributedDataParallel(apt)
        with pytest.raises(RuntimeError, match=r"growth: expected at most 1, or APTConfig\(max_rank=.*, got 4: .* held by DistributedData"):
            Controller(model, optimizer, 16, **SHORT)
        assert hooks(apt, optimizer)[1] == 0
        Controller(model, optimizer, 16, growth=1.0, **SHORT).remove()
        apt, optimizer = built(FAMILIES["bert"], max_rank=8)
        Controller(DistributedDataParallel(apt), optimizer, 16, **SHORT)
    finally:
        dist.destroy_process_group()
