"""Liger-Kernel in a model with adapters: the losses and gradients of the model without it."""

import pytest
import torch
from liger_patches import keep_llama

import apt_ext
from apt_ext import APTConfig, Controller, adapters, get_apt_model

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),  # Triton's and Liger's
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
DEVICE = "cuda"
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 96}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
STEPS = 10


@pytest.fixture
def apply_liger(monkeypatch):
    """Until the test ends."""
    kernels = pytest.importorskip("liger_kernel.transformers")
    llama = keep_llama(monkeypatch)

    def apply():
        kernels.apply_liger_kernel_to_llama()
        assert "liger" in llama.LlamaMLP.__module__ and "liger" in llama.LlamaForCausalLM.forward.__module__

    return apply


def built(**config):
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **HEADS, use_cache=False))
    apt = get_apt_model(base, APTConfig(r=2, **config)).train()
    with torch.no_grad():
        for _, adapter in adapters(apt):
            adapter.Wb.normal_(std=0.1)
    return apt.to(DEVICE)


def masked(apt, *kinds):
    for name, block in apt.blocks.items():
        if block.kind in kinds:
            apt.set_block_mask(name, (torch.arange(block.count) < block.count // 2).float())
    return apt


def compacted(apt, **how):
    masked(apt, "heads", "neurons").compact(**how)
    return apt


def faded(apt):
    masked(apt, "heads")
    apt.set_block_mask("0.neurons", torch.linspace(0, 1, 128))
    return apt


def grown(apt):
    for number, (_, adapter) in enumerate(adapters(apt)):
        adapter.increase_rank(3 + number % 3, generator=torch.Generator(DEVICE).manual_seed(number))
    return apt


FORMS = {
    "dense": lambda apt: apt,
    "masked": lambda apt: masked(apt, "heads", "neurons"),
    "fractions": faded,
    "hidden": lambda apt: masked(apt, "hidden"),
    "compact": compacted,
    "chain": lambda apt: compacted(apt, chain=True),
    "cut": lambda apt: masked(apt, "heads", "neurons").cut(),
    "cut hidden": lambda apt: masked(apt, "heads", "neurons", "hidden").cut(),
    "grown": grown,
    "grown within max_rank": grown,
}


def tokens(seed):
    drawn = torch.randint(0, 96, (3, 16), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return {"input_ids": drawn, "labels": drawn}


def one_step(apt):
    """The loss and the gradients, by name."""
    loss = apt(**tokens(1)).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in apt.named_parameters() if p.grad is not None}


def close(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert ours[1].keys() == theirs[1].keys() and len(ours[1]) > 10
    for name, gradient in theirs[1].items():
        error = (ours[1][name] - gradient).norm()
        assert bool(error <= 1e-4 * gradient.norm() + 1e-7), (name, float(error), float(gradient.norm()))


def checkpointed(apt, reentrant):
    apt.enable_input_require_grads()
    enable = getattr(apt, "activation_checkpointing_enable", None) or apt.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    return apt


@pytest.mark.parametrize("form", FORMS)
def test_it_changes_no_loss_and_no_gradient(apply_liger, form):
    config = {"max_rank": 8} if form == "grown within max_rank" else {}
    stock = one_step(FORMS[form](built(**config)))
    apply_liger()
    close(one_step(FORMS[form](built(**config))), stock)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("form", ["masked", "chain", "cut"])
def test_activations_may_be_computed_again(apply_liger, form, reentrant):
    stock = one_step(FORMS[form](built()))
    apply_liger()
    close(one_step(checkpointed(FORMS[form](built()), reentrant)), stock)


def test_a_shrunk_model_computes_the_same(apply_liger):
    apply_liger()
    apt = FORMS["masked"](built()).eval()
    small = apt_ext.shrink(apt).to(DEVICE)
    with torch.no_grad():
        ids = tokens(1)["input_ids"]
        ours, theirs = apt(input_ids=ids).logits, small(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def trained(reentrant=None):
    """A run whose Controller prunes and lets ranks grow: (losses, what is kept, ranks)."""
    apt = built(prune=["heads", "neurons"], density=0.6, round_to=8)
    if reentrant is not None:
        checkpointed(apt, reentrant)
    optimizer = torch.optim.AdamW(apt_ext.adapter_parameters(apt), lr=1e-3)
    schedule = {"start": 2, "end": 8, "events": 2}
    controller, losses = Controller(apt, optimizer, STEPS, schedule=schedule, shrink="cut"), []
    for seed in range(STEPS):
        loss = apt(**tokens(seed)).loss
        loss.backward()
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
        losses.append(float(loss.detach()))
    assert controller.done and apt.density <= 0.6
    return losses, controller.history[-1]["kept"], {name: adapter.rank for name, adapter in adapters(apt)}


def test_a_controller_prunes_and_grows_as_without_it(apply_liger):
    stock = trained()
    apply_liger()
    for reentrant in (None, False, True):
        losses, kept, ranks = trained(reentrant)
        assert losses == pytest.approx(stock[0], rel=1e-4), reentrant
        assert (kept, ranks) == stock[1:], reentrant
