"""Adapters that read one x together: the same values and gradients as one by one, whoever is called and whatever comes between."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from attentions import WIDTHS, an_x, attention
from torch import nn
from torch.utils.checkpoint import checkpoint

from apt_ext.adapter import shared_inputs
from apt_ext.adapter.shared_inputs import SharedInput, sharing

REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])


pytestmark = pytest.mark.usefixtures("shared")


def loss_of(group, x, names="qkv"):
    return sum((group[name](x) ** 2).sum() * (i + 1) for i, name in enumerate(names))


def gradients(group, x):
    return [x.grad, *(parameter.grad for parameter in group.parameters() if parameter.requires_grad)]


def both(run, group):
    """What `run(group, x)` leaves in gradients, shared and one by one."""
    found = []
    for mode in ("always", "never"):
        other, x = copy.deepcopy(group), an_x(requires_grad=True)
        SharedInput([other[name] for name in WIDTHS])
        with sharing(mode):
            run(other, x)
        found.append(gradients(other, x))
    return found


def assert_alike(found):
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ranks", [(3, 3, 3), (1, 4, 5), (0, 2, 2), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_outputs_and_gradients(calls, ranks, bias):
    group = attention(ranks, bias)
    group["k"].set_masks(mask_out=torch.tensor([1.0, 0, 0.5, 1, 0, 1]))
    x = an_x()
    with sharing("never"):
        alone = {name: group[name](x) for name in WIDTHS}
    for order in ("qkv", "vkq", "kqv"):
        together = {name: group[name](x) for name in order}
        assert all(torch.equal(together[name], alone[name]) for name in WIDTHS)
        assert len({y.grad_fn for y in together.values()}) == 1
        assert {y.grad_fn for y in together.values()} != {None} or not any(ranks)
    assert calls == [3, 3, 3]
    assert_alike(both(lambda group, x: loss_of(group, x).backward(), group))


@pytest.mark.parametrize("frozen", ["x", "lora_A", "lora_B"])
def test_only_what_is_asked_for_gets_a_gradient(frozen):
    def run(group, x):
        if frozen == "x":
            x.requires_grad_(False)
        else:
            getattr(group["k"], frozen).requires_grad_(False)
        loss_of(group, x).backward()

    found = both(run, attention())
    assert_alike(found)
    assert sum(gradient is None for gradient in found[0]) == (1 if frozen == "x" else 0)


def test_trained_biases_and_autocast(calls):
    def run(group, x):
        for adapter in group.values():
            adapter.base_layer.bias.requires_grad_(True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss_of(group, x).backward()

    group = attention(dtype=torch.float32)
    found = []
    for mode in ("always", "never"):
        other, x = copy.deepcopy(group), an_x().float().requires_grad_()
        SharedInput(list(other.values()))
        with sharing(mode):
            run(other, x)
        found.append(gradients(other, x))
    assert calls == [3]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[0][1:], found[1][1:], strict=True))  # dx is added in bfloat16


def test_a_node_has_no_part_of_who_is_never_called():
    """As if it had not been computed: no gradient, no hook of a Parameter, and a backward of its own is not asked for."""
    group, seen = attention(), []
    group["v"].lora_A.register_hook(seen.append)
    x = an_x(requires_grad=True)
    (group["q"](x).sum() + group["k"](x).sum()).backward()
    assert group["v"].lora_A.grad is None and group["v"].lora_B.grad is None and not seen
    assert_alike(both(lambda group, x: loss_of(group, x, "qk").backward(), group))
    assert_alike(both(lambda group, x: loss_of(group, x, "k").backward(), group))


def test_second_derivatives():
    found = []
    for mode in ("always", "never"):
        group, x = attention(), an_x(requires_grad=True)
        with sharing(mode):
            (dx,) = torch.autograd.grad(loss_of(group, x), x, create_graph=True)
            (dx**2).sum().backward()
        found.append(gradients(group, x))
    assert_alike(found)


def test_batched_gradients():
    group, x = attention(), an_x(requires_grad=True)
    outputs = torch.cat([group[name](x) for name in WIDTHS], -1)
    directions = torch.randn(5, *outputs.shape, dtype=torch.float64)
    together = torch.autograd.grad(outputs, x, directions, retain_graph=True, is_grads_batched=True)[0]
    one_by_one = torch.stack([torch.autograd.grad(outputs, x, one, retain_graph=True)[0] for one in directions])
    torch.testing.assert_close(together, one_by_one)


def test_twice_and_through_copies_of_what_is_saved():
    group = attention()
    first, second, third = [], [], []
    for found in (first, second, third):
        x = an_x(requires_grad=True)
        clone = torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.clone(), lambda saved: saved)
        if found is third:
            with clone:
                loss = loss_of(group, x)
        else:
            loss = loss_of(group, x)
        inputs = [x, *(parameter for parameter in group.parameters() if parameter.requires_grad)]
        found.extend(torch.autograd.grad(loss, inputs))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, third, strict=True))


# -- what is computed alone ------------------------------------------------------------------------------------------


def test_another_x_of_the_same_values(calls):
    """Cross-attention reads two tensors."""
    group, x, other = attention(), an_x(requires_grad=True), an_x(seed=1, requires_grad=True)
    for _ in range(4):
        y = group["q"](x), group["k"](other), group["v"](other)
        with sharing("never"):
            assert torch.equal(y[0], group["q"](x)) and torch.equal(y[1], group["k"](other)) and torch.equal(y[2], group["v"](other))
        assert y[1].grad_fn is y[2].grad_fn and y[0].grad_fn is not y[1].grad_fn
    assert calls == [3, 3, 3, 3, 2, 2]  # after the second time q is computed alone, and k with v


def test_an_x_that_was_written_meanwhile():
    group, x = attention(), an_x()
    group["q"](x)
    x.mul_(2)
    y = group["k"](x)
    with sharing("never"):
        assert torch.equal(y, group["k"](x))


def changes():
    def hook(group):
        group["k"].register_forward_pre_hook(lambda module, args: (args[0] * 2,))

    def masks(group):
        group["k"].set_masks(mask_out=torch.tensor([0.0, 1, 1, 1, 1, 1]))

    def grow(group):
        group["k"].increase_rank(5, generator=torch.Generator().manual_seed(0))

    def write(group):
        with torch.no_grad():
            group["k"].lora_A.mul_(2)

    return {
        "a hook that changes x": hook,
        "masks": masks,
        "a mask on the input": lambda group: group["k"].set_masks(mask_in=torch.arange(10) / 10),
        "a step": write,
        "growth": grow,
        "merged": lambda group: group["k"].merge_weights(),
        "disabled": lambda group: group["k"].set_disabled(True),
        "compacted": lambda group: group["k"].compact(),
        "another weight": lambda group: group["k"].base_layer.register_parameter("weight", nn.Parameter(torch.ones(6, 10).double(), False)),
        "a frozen factor": lambda group: group["k"].lora_B.requires_grad_(False),
        "a moved mask": lambda group: group["k"].get_buffer("mask_out").data.mul_(0.5),
        "parametrized": lambda group: nn.utils.parametrizations.weight_norm(group["k"].base_layer),
    }


ALONE = ("a mask on the input", "merged", "disabled", "compacted", "parametrized", "a moved mask")


@pytest.mark.parametrize("when", ["before", "between"])
@pytest.mark.parametrize("name", changes())
@pytest.mark.filterwarnings("ignore:this APTAdapter is merged")
def test_a_member_in_another_state(calls, name, when):
    """Before the first call, where nothing is computed in vain for it, or after that computed what is not right any more."""
    change = changes()[name]

    def run(group, x):
        if when == "before":
            change(group)
        y = group["q"](x)
        if when == "between":
            change(group)
        ((y**2).sum() + loss_of(group, x, "kv")).backward()

    assert_alike(both(run, attention()))
    assert calls[0] == (2 if name in ALONE and when == "before" else 3)


@pytest.mark.parametrize("mask", ["mask_in", "mask_out"])
def test_a_mask_of_this_call_alone(calls, mask):
    group, x = attention(), an_x()
    group["q"](x)
    values = torch.rand(10 if mask == "mask_in" else 6)
    y = group["k"](x, **{mask: values})
    with sharing("never"):
        assert torch.equal(y, group["k"](x, **{mask: values}))
    assert calls == [3]


def test_dropout(calls):
    """Called in their order, all of them, a seed drops what it drops without sharing; the backward draws it again."""
    group = attention(dropout=0.5)

    def run(group, x):
        torch.manual_seed(0)
        loss_of(group, x).backward()

    assert_alike(both(run, group))
    assert calls == [3]
    x = an_x()
    torch.manual_seed(0)
    y = [group[name](x) for name in WIDTHS]
    assert not torch.equal(y[0], group["q"](x))
    with sharing("never"):
        torch.manual_seed(0)
        assert all(torch.equal(ours, group[name](x)) for ours, name in zip(y, WIDTHS, strict=True))


def test_dropout_that_changes_between_two_calls(calls):
    group, x = attention(dropout=0.5), an_x()
    group["q"](x)
    group["k"].eval()
    k = group["k"](x)
    group["v"].dropout = 0.1
    group["v"](x)
    assert calls[0] == 3
    with sharing("never"):
        assert torch.equal(k, group["k"](x))


def test_modes_that_change_between_two_calls():
    group, x = attention(), an_x(requires_grad=True)
    with torch.no_grad():
        assert group["q"](x).grad_fn is None
    assert group["k"](x).grad_fn is not None
    with torch.no_grad():
        assert group["v"](x).grad_fn is None
    group, x = attention(dtype=torch.float32), an_x().float()
    assert group["q"](x).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert group["k"](x).dtype == torch.bfloat16
    with torch.inference_mode():
        assert group["q"](x).is_inference() and group["k"](x).is_inference()
        assert group["q"](x * 1).is_inference()


def test_functional_transforms(calls):
    group, x = attention(), an_x()

    def loss(x, factors=None):
        return loss_of(group, x)

    with sharing("never"):
        expected = torch.func.grad(loss)(x), torch.func.vmap(loss)(x), torch.func.jvp(loss, (x,), (x,))[1]
    calls.clear()
    found = torch.func.grad(loss)(x), torch.func.vmap(loss)(x), torch.func.jvp(loss, (x,), (x,))[1]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    state = {name: value.detach() for name, value in group.named_parameters() if "lora" in name}

    def of_factors(state):
        class Loss(nn.Module):
            def __init__(self):
                super().__init__()
                self.group = group

            def forward(self, x):
                return loss_of(self.group, x)

        return torch.func.functional_call(Loss(), {f"group.{name}": value for name, value in state.items()}, (x,))

    together = torch.func.grad(of_factors)(state)
    with sharing("never"):
        alone = torch.func.grad(of_factors)(state)
    assert all(torch.equal(together[name], alone[name]) for name in state)


def test_dispatch_modes_see_each_layers_op():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            found.append(op.name())
            return op(*args, **kwargs or {})

    group, found = attention(), []
    with Names():
        loss_of(group, an_x())
    assert sum("apt_linear" in name for name in found) == 3


def test_wrong_arguments_are_said_by_the_layer_that_gets_them():
    group = attention()
    for wrong, error in ((an_x()[..., :9], ValueError), ([1.0], TypeError), (an_x().float(), TypeError)):
        for name in WIDTHS:
            with pytest.raises(error, match="^x must"):
                group[name](wrong)
    with torch.no_grad():
        group["k"].lora_B.set_(torch.zeros(5, 2, dtype=torch.float64))
    x = an_x()
    y = group["q"](x), group["v"](x)
    with pytest.raises(ValueError, match="lora_B must have shape"):
        group["k"](x)
    with sharing("never"):
        assert torch.equal(y[0], group["q"](x)) and torch.equal(y[1], group["v"](x))


def test_compiled(calls):
    group, x = attention(), an_x()
    compiled = torch.compile(lambda x: [group[name](x) for name in WIDTHS], backend="eager", fullgraph=True)
    with torch.no_grad():
        for ours, name in zip(compiled(x), WIDTHS, strict=True):
            torch.testing.assert_close(ours, group[name](x))
    assert calls == [3]


@pytest.mark.parametrize("mode", ["auto", "never"])
def test_a_mode_that_shares_nothing_here(calls, mode):
    with sharing(mode):
        assert_alike(both(lambda group, x: loss_of(group, x).backward(), attention()))
        calls.clear()
        loss_of(attention(), an_x())
    assert not calls


# -- memory ----------------------------------------------------------------------------------------------------------


def alive(of):
    gc.collect()
    return sum(isinstance(one, torch.Tensor) and one.shape[-1:] == (of,) for one in gc.get_objects())


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_nothing_stays_of_who_is_not_called(grad):
    """Neither outputs nor the graph behind x, which outputs would hold if they held x."""
    group, x = attention(), an_x(requires_grad=True)
    with torch.set_grad_enabled(grad):
        middle = x * 2
        node = weakref.ref(middle)
        y = group["q"](middle)
        held = shared_inputs.this_thread.held
        assert held.outputs and sorted(held.waiting) == [1, 2]
        del middle, y
    gc.collect()
    assert node() is None and not held.outputs


def test_an_exception_between_two_calls():
    group, x = attention(), an_x(requires_grad=True)

    def layer(x):
        group["q"](x)
        raise ZeroDivisionError

    for _ in range(2):
        middle = x * 2
        gone = weakref.ref(middle)
        with pytest.raises(ZeroDivisionError):
            layer(middle)
        del middle
        gc.collect()
        assert gone() is None and not shared_inputs.this_thread.held.outputs
    assert_alike(both(lambda group, x: loss_of(group, x).backward(), group))


def test_a_second_group_lets_go_what_the_first_holds():
    first, second, x = attention(), attention(), an_x()
    first["q"](x)
    held = weakref.ref(shared_inputs.this_thread.held)
    second["q"](x)
    gc.collect()
    assert held() is None
    assert shared_inputs.this_thread.held.group is second["q"].shared[0]


def test_members_that_are_gone(calls):
    group, x = attention(), an_x()
    del group["v"]
    gc.collect()
    for name in "qk":
        y = group[name](x)
        with sharing("never"):
            assert torch.equal(y, group[name](x))
    assert calls == [2]


def test_copies_share_nothing(calls):
    for other in (copy.deepcopy(attention()), pickle.loads(pickle.dumps(attention()))):  # noqa: S301
        loss_of(other, an_x())
        assert all(adapter.shared is None for adapter in other.values())
    assert not calls


# -- checkpoints -----------------------------------------------------------------------------------------------------


@REENTRANT
@pytest.mark.parametrize("last", ["qkv", "q", "vq"], ids=str)
def test_recomputation(reentrant, last):
    """One that stops early, at a layer whose output others wait for, too."""

    def run(group, x):
        middle = checkpoint(lambda x: loss_of(group, x * 2, last), x, use_reentrant=reentrant)
        middle.backward()

    assert_alike(both(run, attention()))


@REENTRANT
def test_recomputation_while_a_group_parts(calls, reentrant):
    """What a forward computed together is computed together again, so that it saves as many tensors."""
    group, x, other = attention(), an_x(requires_grad=True), an_x(seed=1, requires_grad=True)

    def layer(x, other):
        return (group["q"](x) ** 2).sum() + loss_of(group, other, "kv")

    losses = [checkpoint(layer, x, other, use_reentrant=reentrant) for _ in range(5)]  # parts at the third
    forward = calls.copy()
    assert forward == [3, 3, 3, 3, 2, 2, 2]
    for loss in losses:
        loss.backward()
    with sharing("never"):
        dx, dother = torch.autograd.grad(5 * layer(x, other), (x, other))
    torch.testing.assert_close(x.grad, dx)
    torch.testing.assert_close(other.grad, dother)


def test_a_recomputation_that_stops_early_parts_nobody(calls):
    """It needs what q saved, and ends before the others are called."""
    group, x = attention(), an_x(requires_grad=True)

    def layer(x):
        return (group["q"](x) ** 2).sum() + group["k"](x).sum() + group["v"](x).sum()

    losses = [checkpoint(layer, x, use_reentrant=False) for _ in range(4)]
    for loss in losses:
        loss.backward()
    layer(x)
    assert calls == [3] * 9
