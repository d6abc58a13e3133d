"""An adapter's dropout: one op call, drawn anew in training, and the same again where torch repeats a forward."""

import copy

import pytest
import torch
from checkpointing import REENTRANT
from small_adapter import expected, make, masks
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from apt_ext import APTAdapter, ops, reference


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def inputs(device, rows=64, requires_grad=True):
    return torch.randn(rows, 10, dtype=torch.float64, device=device, requires_grad=requires_grad)


@pytest.mark.parametrize("compact", [False, True])
def test_one_call_of_the_op_and_one_draw(device, compact):
    adapter, x = make(device, dropout=0.4), inputs(device, requires_grad=False)
    adapter.set_masks(*masks(device))
    adapter.compact(compact)
    names = {}
    for training in (True, False):
        with Calls() as calls, torch.no_grad():
            adapter.train(training)(x)
        names[training] = calls.names
    assert [name for name in names[False] if "apt_ext" in name] == [f"apt_ext::{'compact' if compact else 'apt'}_linear"]
    more = ["aten::randint"] if device == "cuda" else ["aten::randint", "aten::constant_pad_nd"]
    assert names[True] == more + names[False]


@pytest.mark.parametrize("compact", [False, True])
def test_training_alone_drops(device, compact):
    adapter, x = make(device, dropout=0.4), inputs(device)
    adapter.set_masks(*masks(device))
    adapter.compact(compact)
    torch.manual_seed(3)
    got = adapter(x)
    torch.manual_seed(3)
    keep = ops.dropout_mask(x.shape, 0.4, ops.drawn_rng(x))
    factors = adapter.lora_A, adapter.lora_B
    want = reference.apt_linear(x, adapter.weight, adapter.bias, *factors, *masks(device), adapter.scaling, 0.4, keep=keep)
    torch.testing.assert_close(got, want)
    assert not torch.allclose(adapter(x), got)
    torch.testing.assert_close(adapter.eval()(x), expected(adapter, x))


@REENTRANT
@pytest.mark.parametrize("compact", [False, True])
def test_a_checkpoint_draws_the_same_again(device, reentrant, compact):
    adapter, x = make(device, dropout=0.4), inputs(device)
    adapter.set_masks(*masks(device))
    adapter.compact(compact)
    leaves = (x, adapter.lora_A, adapter.lora_B)
    torch.manual_seed(3)
    want = torch.autograd.grad(adapter(adapter(x).tanh().repeat(1, 2)[:, :10]).square().sum(), leaves)
    torch.manual_seed(3)
    y = checkpoint(lambda x: adapter(x).tanh(), x, use_reentrant=reentrant, preserve_rng_state=True)
    y = checkpoint(lambda y: adapter(y.repeat(1, 2)[:, :10]).square(), y, use_reentrant=reentrant, preserve_rng_state=True)
    torch.rand(5, device=device)  # the recomputation is not simply the next draw
    y.sum().backward()
    torch.testing.assert_close(tuple(leaf.grad for leaf in leaves), want)


def test_without_a_base_layer(device):
    adapter = APTAdapter(10, 7, 3, dropout=0.4, device=device, dtype=torch.float64)
    nn.init.normal_(adapter.lora_B)
    x, none = inputs(device), torch.zeros(7, 10, dtype=torch.float64, device=device)
    torch.manual_seed(3)
    got = adapter(x)
    torch.manual_seed(3)
    rng = ops.drawn_rng(x)
    torch.testing.assert_close(got, ops.apt_linear(x, none, None, adapter.lora_A, adapter.lora_B, None, None, 2.0, 0.4, rng))


def test_two_adapters_of_one_model_draw_apart(device):
    adapter, x = make(device, dropout=0.5), inputs(device)
    twin = copy.deepcopy(adapter)
    torch.manual_seed(3)
    assert not torch.allclose(adapter(x), twin(x))


def test_compiled_training_steps_draw_anew(device):
    adapter, x = make(device, dropout=0.4), inputs(device)
    compiled = torch.compile(adapter, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.manual_seed(3)
        one, two = compiled(x), compiled(x)
        torch.manual_seed(3)
        again = compiled(x)
    assert torch.equal(one, again) and not torch.allclose(one, two)
    torch.manual_seed(3)
    want = torch.autograd.grad(compiled(x).square().sum(), adapter.lora_A)
    torch.manual_seed(3)
    torch.testing.assert_close(torch.autograd.grad(adapter(x).square().sum(), adapter.lora_A), want)


@pytest.mark.parametrize("x", [None, [[1.0]], 3], ids=str)
@pytest.mark.parametrize("compact", [False, True])
def test_an_x_that_is_no_tensor(compact, x):
    adapter = make(dropout=0.4)
    adapter.compact(compact)
    with pytest.raises(TypeError, match="x must be a Tensor, got "):
        adapter(x)
