"""Activation checkpointing: the recomputation runs under the forward's masks, or it is an error; never a wrong gradient."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from checkpointing import CARRIERS, CHANGED, REENTRANT, inputs
from small_adapter import make
from torch import nn
from torch.utils.checkpoint import checkpoint

from apt_ext import APTConfig, adapter_parameters, adapters, get_apt_model


@REENTRANT
def test_gradients_are_those_of_the_plain_forward(device, reentrant):
    adapter, x = make(device), inputs(device)
    adapter.set_masks(torch.rand(10, device=device), torch.rand(7, device=device))
    leaves = (x, adapter.lora_A, adapter.lora_B)
    want = torch.autograd.grad(adapter(x).tanh().sum(), leaves)
    checkpoint(lambda x: adapter(x).tanh(), x, use_reentrant=reentrant).sum().backward()
    torch.testing.assert_close(tuple(leaf.grad for leaf in leaves), want)


CHANGES = {
    "set_masks": lambda adapter: adapter.set_masks(torch.zeros(10)),
    "load": lambda adapter: adapter.load_state_dict(copy.deepcopy(adapter.state_dict())),
    "reset": lambda adapter: adapter.reset_parameters(),
    "merge": lambda adapter: adapter.eval().merge_weights(),
    "disable": lambda adapter: adapter.set_disabled(True),
}


@REENTRANT
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_before_the_recomputation_is_an_error(reentrant, change):
    adapter, x = make(), inputs()
    adapter.set_masks(torch.full((10,), 0.5))
    y = checkpoint(adapter, x, use_reentrant=reentrant)
    CHANGES[change](adapter)
    with CHANGED:
        y.sum().backward()
    assert adapter.lora_A.grad is None and x.grad is None


@REENTRANT
def test_a_later_forward_does_not_hide_the_change(reentrant):
    adapter, x = make(), inputs()
    first = checkpoint(adapter, x, use_reentrant=reentrant)
    adapter.set_masks(torch.zeros(10))
    second = checkpoint(adapter, x, use_reentrant=reentrant)
    plain = adapter(x)
    with CHANGED:
        first.sum().backward()
    second.sum().backward()
    assert (x.grad == 0).all()
    plain.sum().backward()


@REENTRANT
def test_a_change_before_the_forward_is_none(reentrant):
    """Also not where the graph around the checkpoint is older than the change."""
    adapter, x = make(), inputs()
    for _ in range(5):
        before = (2 * x).sin()
        adapter.set_masks(torch.rand(10))
        y = checkpoint(adapter, before, use_reentrant=reentrant).cos()
        (y * x[:, :7]).sum().backward()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, of the inner one in the first, gradless forward
@REENTRANT
def test_nested_and_in_sequence(reentrant):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = make(), make()
            self.back = nn.Linear(7, 10, dtype=torch.float64)

        def inner(self, x):
            return checkpoint(self.second, self.back(checkpoint(self.first, x, use_reentrant=reentrant)), use_reentrant=reentrant)

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    net, x = Net(), inputs()
    for layer in (net.first, net.second):
        layer.set_masks(torch.rand(10))
    net(x).sum().backward()
    want = torch.autograd.grad(net.second(net.back(net.first(x))).sum(), net.first.lora_A)[0]
    torch.testing.assert_close(net.first.lora_A.grad, want)
    y = net(x)
    net.first.set_masks(torch.rand(10))
    with CHANGED:
        y.sum().backward()


@REENTRANT
@pytest.mark.parametrize("kind", CARRIERS)
def test_carriers_of_masks_notice_as_well(reentrant, kind):
    carrier, x = CARRIERS[kind](), inputs()

    def run():
        return checkpoint(lambda x: (carrier(torch.arange(4)) if kind == "embedding" else carrier(x)) + x, x, use_reentrant=reentrant)

    carrier.set_masks(mask_out=(torch.arange(10) % 2).float())
    run().sum().backward()
    for change in (lambda: carrier.set_masks(mask_out=torch.ones(10)), lambda: carrier.set_disabled(True)):
        y = run()
        change()
        run()
        with CHANGED:
            y.sum().backward()


@REENTRANT
def test_a_copy_starts_anew(reentrant):
    adapter, x = make(), inputs()
    for _ in range(100):
        x.sin()  # the copy is made late
    adapter.set_masks(torch.rand(10))
    other = copy.deepcopy(adapter)
    checkpoint(other, x, use_reentrant=reentrant).sum().backward()
    y = checkpoint(other, x, use_reentrant=reentrant)
    adapter.set_masks(torch.rand(10))  # not the copy's
    y.sum().backward()
    y = checkpoint(other, x, use_reentrant=reentrant)
    other.set_masks(torch.rand(10))
    with CHANGED:
        y.sum().backward()


@REENTRANT
def test_forward_and_masks_in_different_threads(reentrant):
    """Nodes are numbered in each thread: a change elsewhere is noticed until the next forward, and never where there was none."""
    adapter, x = make(), inputs()
    for _ in range(100):
        x.sin()  # this thread counts further than the other
    with ThreadPoolExecutor(1) as other:
        adapter.set_masks(torch.rand(10))
        y = other.submit(checkpoint, adapter, x, use_reentrant=reentrant).result()
        y.sum().backward()
        y = other.submit(checkpoint, adapter, x, use_reentrant=reentrant).result()
        adapter.set_masks(torch.rand(10))
        with CHANGED:
            y.sum().backward()


def test_a_backward_in_another_thread():
    adapter, x = make(), inputs()
    adapter.set_masks(torch.rand(10))
    first = checkpoint(adapter, x, use_reentrant=True)
    second = checkpoint(adapter, x, use_reentrant=True)
    thread = threading.Thread(target=lambda: first.sum().backward())
    thread.start()
    thread.join()
    assert x.grad is not None
    adapter.set_masks(torch.rand(10))
    with CHANGED:
        second.sum().backward()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@REENTRANT
def test_a_frozen_transformer_with_checkpointing(reentrant):
    """Nothing before the first adapter requires a gradient; enable_input_require_grads makes the embeddings' output do so."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertForSequenceClassification(config)
    model = get_apt_model(model, APTConfig(r=2, lora_alpha=4, target_modules=["query", "value", "intermediate.dense"])).train()
    for _, adapter in adapters(model):
        with torch.no_grad():
            adapter.lora_B.normal_()
    model.set_block_mask("0.neurons", (torch.arange(24) % 3 != 0).float())
    batch = {"input_ids": torch.randint(50, (3, 7)), "labels": torch.tensor([0, 1, 1])}

    def gradients():
        model.zero_grad()
        model(**batch).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    want = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    got = gradients()
    assert got.keys() == want.keys() and len(got) > 6
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], msg=name)
    assert all((value != 0).any() for value in got.values() if value.numel())
    assert all(p.grad is not None for p in adapter_parameters(model))
    loss = model(**batch).loss
    model.set_block_mask("0.neurons", torch.ones(24))
    with CHANGED:
        loss.backward()
