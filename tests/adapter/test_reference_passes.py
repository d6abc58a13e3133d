"""A model computes something else between a checkpointed forward and its backward, and comes back: the gradients are the forward's."""

import contextlib

import pytest
import torch
from checkpointing import CARRIERS, CHANGED, REENTRANT, inputs
from families import FAMILIES, adapted
from small_adapter import make
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from apt_ext import adapter_parameters, adapters


@contextlib.contextmanager
def disabled(adapter):
    adapter.set_disabled(True)
    yield
    adapter.set_disabled(False)


@contextlib.contextmanager
def other_masks(adapter):
    before = adapter.get_masks()
    adapter.set_masks(torch.zeros(10), torch.rand(7))
    yield
    adapter.set_masks(*before)


@contextlib.contextmanager
def merged(adapter):
    adapter.eval().merge_weights()
    yield
    adapter.unmerge_weights()
    adapter.train()


@contextlib.contextmanager
def merged_under_other_masks(adapter):
    with other_masks(adapter), merged(adapter):
        yield


DETOURS = {function.__name__: function for function in (disabled, other_masks, merged, merged_under_other_masks)}


@REENTRANT
@pytest.mark.parametrize("passes", ["none", "without gradients", "with gradients"])
@pytest.mark.parametrize("detour", DETOURS)
def test_a_change_that_was_taken_back_is_none(detour, passes, reentrant):
    adapter, x = make(), inputs()
    adapter.set_masks(torch.rand(10), torch.rand(7))
    leaves = (x, adapter.lora_A, adapter.lora_B)
    want = torch.autograd.grad(adapter(x).tanh().sum(), leaves)
    y = checkpoint(lambda x: adapter(x.clone()).tanh(), x, use_reentrant=reentrant)
    for _ in range(3):
        with DETOURS[detour](adapter):
            if passes != "none":
                with torch.set_grad_enabled(passes == "with gradients"):
                    adapter(x.sin())
    y.sum().backward()
    torch.testing.assert_close(tuple(leaf.grad for leaf in leaves), want)


@REENTRANT
@pytest.mark.parametrize("detour", ["disabled", "other_masks"])
def test_what_was_computed_on_the_way_is_refused_after_the_return(detour, reentrant):
    adapter, x = make(), inputs()
    adapter.set_masks(torch.rand(10))
    first = checkpoint(adapter, x, use_reentrant=reentrant)
    with DETOURS[detour](adapter):
        between = checkpoint(adapter, x, use_reentrant=reentrant)
        with CHANGED:
            first.sum().backward()
    again = checkpoint(adapter, x, use_reentrant=reentrant)
    with CHANGED:
        between.sum().backward()
    again.sum().backward()


def test_masks_that_are_set_to_what_they_are():
    adapter, x = make(), inputs()
    adapter.set_masks(torch.rand(10))
    y = checkpoint(adapter, x, use_reentrant=False)
    adapter.set_masks(*adapter.get_masks())
    y.sum().backward()


@REENTRANT
def test_other_factors_between_two_merges_are_another_function(reentrant):
    adapter, x = make(), inputs()
    adapter.eval().merge_weights()
    same, other = (checkpoint(lambda x: adapter(x) * x[:, :7], x, use_reentrant=reentrant) for _ in range(2))
    adapter.unmerge_weights()
    adapter.merge_weights()
    same.sum().backward()
    adapter.unmerge_weights()
    with torch.no_grad():
        adapter.lora_B.mul_(2)
    adapter.merge_weights()
    with CHANGED:
        other.sum().backward()


@REENTRANT
def test_what_is_remembered_does_not_grow(reentrant):
    adapter, x = make(), inputs()
    mask = torch.rand(10)
    adapter.set_masks(mask)
    old = checkpoint(adapter, x, use_reentrant=reentrant)
    for step in range(100):
        adapter.set_masks(torch.full((10,), step / 100))
        checkpoint(adapter, x, use_reentrant=reentrant)
    assert len(adapter.history._history) < 50
    adapter.set_masks(mask)
    recent = checkpoint(adapter, x, use_reentrant=reentrant)
    with disabled(adapter):
        adapter(x)
    recent.sum().backward()
    with CHANGED:  # equal masks, but so long ago that it is not known
        old.sum().backward()


@REENTRANT
@pytest.mark.parametrize("kind", CARRIERS)
def test_carriers_of_masks_as_well(kind, reentrant):
    carrier, x = CARRIERS[kind](), inputs()
    mask = (torch.arange(10) % 2).float()
    carrier.set_masks(mask_out=mask)

    def run(x):
        return (carrier(torch.arange(4)) if kind == "embedding" else carrier(x)) * x

    (want,) = torch.autograd.grad(run(x).sum(), x)
    y = checkpoint(run, x, use_reentrant=reentrant)
    with disabled(carrier):
        run(x)
    carrier.set_masks(mask_out=torch.ones(10))
    run(x)
    carrier.set_masks(mask_out=mask)
    y.sum().backward()
    torch.testing.assert_close(x.grad, want)


def test_a_module_that_was_never_masked_comes_back_too():
    """Its first function is known, and not only that it was changed since."""
    carrier, x = CARRIERS["norm"](), inputs()
    y = checkpoint(carrier, x, use_reentrant=False)
    carrier.set_masks(mask_out=torch.arange(10.0) / 10)
    carrier.set_masks(mask_out=torch.ones(10))
    y.sum().backward()
    adapter = make()
    y = checkpoint(adapter, x, use_reentrant=False)
    with disabled(adapter), merged(adapter):
        pass
    y.sum().backward()


MODELS = ("llama", "bert", "t5")


def log_probability(apt, batch):
    return apt(**batch).logits.log_softmax(-1)[..., 0].sum()


@torch.no_grad()
def reference(apt, batch, detour):
    """With the adapters disabled, or under other masks of the layers: what is outside them lies outside the checkpoints, too."""
    if detour == "disable_adapter":
        with apt.disable_adapter():
            return log_probability(apt, batch)
    before = {name: apt.get_block_mask(name) for name, block in apt.blocks.items() if block.kind != "hidden"}
    for name in before:
        apt.set_block_mask(name, (torch.arange(apt.blocks[name].count) != 1).float())
    found = log_probability(apt, batch)
    for name, mask in before.items():
        apt.set_block_mask(name, mask)
    return found


def preference_gradients(apt, batch, detour, reentrant=None):
    """Of a loss against a reference, as DPO has it. Under checkpointing its pass comes between forward and backward, else before them."""
    apt.train()
    if reentrant is None:
        against = reference(apt, batch, detour)
        policy = log_probability(apt, batch)
    else:
        apt.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        apt.enable_input_require_grads()
        policy = log_probability(apt, batch)
        against = reference(apt, batch, detour)
    (-F.logsigmoid(0.1 * (policy - against))).backward()
    return {name: p.grad for name, p in apt.named_parameters() if p.grad is not None and p.numel()}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@REENTRANT
@pytest.mark.parametrize("detour", ["disable_adapter", "set_block_mask"])
@pytest.mark.parametrize("name", MODELS)
def test_a_reference_pass_under_checkpointing(name, detour, reentrant):
    family = FAMILIES[name]
    no_dropout = (
        {}
        if name == "llama"
        else {"dropout_rate": 0.0}
        if name == "t5"
        else dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    )

    def gradients(reentrant):
        apt = adapted(family, **no_dropout)
        apt.set_block_mask("hidden", (torch.arange(24) != 3).float())
        first = next(name for name in apt.blocks if name.endswith("neurons"))
        apt.set_block_mask(first, (torch.arange(20) % 3 != 0).float() * 0.5)
        batch = {**family.inputs(), **({"use_cache": False} if family.decoder else {})}
        return preference_gradients(apt, batch, detour, reentrant)

    want, got = gradients(None), gradients(reentrant)
    assert got.keys() == want.keys() and len(got) > 10
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, msg=key)
    assert any((value != 0).any() for value in got.values())


class Disabled(nn.Module):
    """The model with its adapters disabled while this one's forward runs, in whatever way a trainer patches that."""

    def __init__(self, apt):
        super().__init__()
        self.__dict__.update(apt=apt, config=apt.config)
        self.register_forward_pre_hook(self.enter)
        self.register_forward_hook(self.leave, always_call=True)

    def __getattr__(self, name):
        return getattr(self.__dict__["apt"], name)

    def enter(self, *_):
        self.__dict__["context"] = self.apt.disable_adapter()
        self.context.__enter__()

    def leave(self, *_):
        self.context.__exit__(None, None, None)

    def forward(self, **batch):
        return self.apt(**batch)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_dpo_trainer_under_checkpointing(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    import tokenizers
    import transformers

    special = {name: f"w{i}" for i, name in enumerate(("pad_token", "eos_token", "unk_token"))}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(50)}, "w2"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    rows = [{"prompt": "w5 w6", "chosen": " w7 w8 w9", "rejected": " w10 w11"}] * 2

    def trained(**checkpointing):
        apt = adapted(FAMILIES["llama"], dtype=torch.float32)
        steps = {"max_steps": 1, "logging_steps": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 2}
        quiet = {"report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}
        arguments = trl.DPOConfig(str(tmp_path), **steps, **quiet, **checkpointing)
        trainer = trl.DPOTrainer(
            apt, Disabled(apt), args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
        )
        trainer.train()
        return trainer.state.log_history[0], [parameter.detach().clone() for parameter in adapter_parameters(apt)]

    (log, want), (checkpointed, got) = (
        trained(gradient_checkpointing=False),
        trained(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
    )
    assert log["loss"] == checkpointed["loss"] and abs(log["rewards/margins"]) > 0.01
    torch.testing.assert_close(got, want)


def test_disable_adapter_keeps_where_a_merge_keeps_its_originals():
    apt = adapted(FAMILIES["bert"])
    first, second, third = [adapter for _, adapter in adapters(apt)][:3]
    first.merge_weights("cpu")
    second.merge_weights("device")
    with apt.disable_adapter():
        assert not first.merged and not second.merged
    assert (first.merged, first.merge.keep) == (True, "cpu") and (second.merged, second.merge.keep) == (True, "device")
    assert not third.merged
    assert all(kept.device.type == "cpu" for kept in first.merge.originals.values())
