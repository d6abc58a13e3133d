"""APTModel.cut: smaller in place, adapters, gradients and optimizer state with it, and training goes on."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from cases import crossed
from families import DECODERS, EVERY, FAMILIES, ONE_EACH, adapted, close, generated, keep_first, mask_all, outputs, some, tolerance
from torch import nn

from apt_ext import APTConfig, adapter_parameters, adapters, get_apt_model, hold_pruned, shrink
from apt_ext.method.select.groups import groups_of
from apt_ext.pruning import cut

ALL = ("heads", "neurons", "hidden")


@pytest.mark.parametrize(
    ("name", "how"),
    crossed(
        FAMILIES,
        ("hard", "soft", "empty", "one"),
        daily=lambda name, how: how in ("soft", "empty") or name in ONE_EACH,
    ),
)
def test_cut_is_masked_and_smaller(name, how):
    family = FAMILIES[name]
    apt = adapted(family)
    masks = some(family, apt.blocks, ALL, how)
    if how == "empty":
        masks["hidden"] = torch.arange(24).clamp(max=1).float()
    expected = outputs(mask_all(apt, masks), family.inputs())
    identities = {name: id(p) for name, p in apt.named_parameters()}
    before = sum(p.numel() for p in apt.parameters())
    assert apt.cut() is apt
    close(outputs(apt, family.inputs()), expected)
    assert {name: id(p) for name, p in apt.named_parameters()} == identities
    assert sum(p.numel() for p in apt.parameters()) < before
    for name, block in apt.blocks.items():
        left = masks[name][masks[name] != 0]
        assert block.count == len(left) or (len(left) == 0 and block.count == 1)
        assert torch.equal(apt.get_block_mask(name), left if len(left) else torch.zeros(block.count))
    close(outputs(shrink(apt), family.inputs()), expected, tolerance(family, ALL))
    close(outputs(copy.deepcopy(apt), family.inputs()), expected)


@EVERY
def test_where_attention_needs_heads_one_stays_in_every_layer(family, monkeypatch):
    """torch 2.11: nothing of ours may then cut or search a layer down to none."""
    monkeypatch.setattr(cut, "_ATTENTION_NEEDS_HEADS", True)
    apt = adapted(family)
    heads = [name for name, block in apt.blocks.items() if block.kind == "heads"]
    expected = outputs(mask_all(apt, {name: torch.zeros(apt.blocks[name].count) for name in heads}), family.inputs())
    assert all(group.floor >= 1 for group in groups_of(apt, apt.blocks, 8, False, 0) if group.kind == "heads")
    apt.cut()
    assert [apt.blocks[name].count for name in heads] == [1] * len(heads)
    close(outputs(apt, family.inputs()), expected)


def step_of(apt, inputs):
    """(bytes that a forward keeps for its backward, floating-point operations of the products of both)"""
    own, kept = {p.untyped_storage().data_ptr() for p in apt.parameters()}, {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True) as profile:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = apt(**inputs).logits.square().mean()
        loss.backward()
    return sum(kept.values()), sum(event.flops for event in profile.key_averages())


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_step_keeps_and_computes_less_after_a_cut_and_not_under_masks(name):
    family = FAMILIES[name]
    apt = adapted(family, dtype=torch.float32, hidden_size=96, intermediate_size=256).train()
    inputs = family.inputs(length=32)
    dense = step_of(apt, inputs)
    keep_first(apt, heads=1, neurons=64, hidden=48)
    masked, (kept, operations) = step_of(apt, inputs), step_of(apt.cut(), inputs)
    assert masked[0] > 0.95 * dense[0] and masked[1] > 0.95 * dense[1]
    assert kept < 0.6 * dense[0] and operations < 0.35 * dense[1]


@EVERY
def test_the_config_of_another_model_is_left_alone(family):
    apt = adapted(family)
    shared, before, holders = apt.config, copy.deepcopy(apt.config), [m for m in apt.model.modules() if hasattr(m, "config")]
    groups = [id(module.config) for module in holders]
    mask_all(apt, some(family, apt.blocks, ALL, "hard")).cut()
    assert shared.to_dict() == before.to_dict() != apt.config.to_dict()
    now = [id(module.config) for module in holders]
    assert len(set(zip(groups, now, strict=True))) == len(set(groups)) == len(set(now))  # what was one config is one


@DECODERS
def test_generation_goes_on(family):
    apt = adapted(family)
    mask_all(apt, some(family, apt.blocks, ("heads", "neurons"), "empty"))
    expected = generated(apt.model, family.inputs(), use_cache=False)
    apt.cut()
    for use_cache in (True, False):
        close(generated(apt.model, family.inputs(), use_cache), expected)


@EVERY
def test_cutting_first_and_shrinking_is_shrinking(family):
    apt = adapted(family)
    mask_all(apt, some(family, apt.blocks, ALL, "hard"))
    small = shrink(apt)
    again = shrink(apt.cut())
    assert type(small) is type(again) and small.config.to_dict() == again.config.to_dict()
    for (name, ours), theirs in zip(again.named_parameters(), small.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12), name


@EVERY
def test_a_second_cut_goes_on_from_the_first(family):
    apt = adapted(family)
    mask_all(apt, some(family, apt.blocks, ALL, "hard")).cut()
    expected = outputs(mask_all(apt, some(family, apt.blocks, ALL, "one")), family.inputs())
    close(outputs(apt.cut(), family.inputs()), expected)
    assert apt.blocks["hidden"].count == 1


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


def step(apt, family, optimizer, seed):
    optimizer.zero_grad()
    apt(**family.inputs(seed)).logits.square().mean().backward()
    optimizer.step()


TRAINED = ["bert", "llama", "gpt2", "t5-gated"]


@pytest.mark.parametrize(
    ("max_rank", "name", "kind"),
    crossed(
        (None, 4),
        TRAINED,
        OPTIMIZERS,
        daily=lambda rank, name, kind: (TRAINED.index(name) + list(OPTIMIZERS).index(kind)) % 2 == (rank == 4),
    ),
)
def test_training_goes_on_as_if_it_had_only_been_masked(max_rank, name, kind):
    """Masked training with held entries and cut training are the same, step for step (without dropout, which draws other shapes)."""
    family, make = FAMILIES[name], OPTIMIZERS[kind]
    masked = adapted(family, APTConfig(r=2, max_rank=max_rank))
    optimizer = make(adapter_parameters(masked))
    hold_pruned(optimizer, adapters(masked))
    step(masked, family, optimizer, 3)
    mask_all(masked, some(family, masked.blocks, ALL, "soft"))
    step(masked, family, optimizer, 4)

    twin, other = copy.deepcopy((masked, optimizer))
    twin.cut(other)
    close(outputs(twin, family.inputs()), outputs(masked, family.inputs()))
    for apt, one in ((masked, optimizer), (twin, other)):
        for seed in (5, 6, 7):
            step(apt, family, one, seed)
    # The norms and softmax of LLaMA and T5 work in float32, and Adam makes more of their rounding: up to 1.5e-5 was seen.
    # One state tensor in another order is 4e-2 at the least.
    close(outputs(twin, family.inputs()), outputs(masked, family.inputs()), 1e-9 if name in ("bert", "gpt2") else 1e-4)


def test_gradients_and_state_are_cut_to_the_same_entries():
    family = FAMILIES["bert"]
    apt = adapted(family)
    optimizer = torch.optim.AdamW(adapter_parameters(apt), lr=1e-2)
    step(apt, family, optimizer, 3)
    apt(**family.inputs()).logits.square().mean().backward()
    up = dict(adapters(apt))["bert.encoder.layer.0.intermediate.dense"]
    head = apt.model.classifier
    before = {p: (p.detach().clone(), p.grad.clone(), optimizer.state[p]["exp_avg"].clone()) for p in (up.lora_A, up.lora_B, head.weight)}
    masks = some(family, apt.blocks, ("neurons", "hidden"), "hard")
    mask_all(apt, masks).cut(optimizer)
    neurons, hidden = masks["0.neurons"].nonzero().flatten(), masks["hidden"].nonzero().flatten()
    for p, dims in ((up.lora_A, {1: hidden}), (up.lora_B, {0: neurons}), (head.weight, {1: hidden})):
        for now, old in zip((p.detach(), p.grad, optimizer.state[p]["exp_avg"]), before[p], strict=True):
            for dim, kept in dims.items():
                old = old.index_select(dim, kept)
            assert torch.equal(now, old)
    assert optimizer.state[up.lora_A]["step"] == 1


def test_an_optimizer_that_was_not_given_refuses_its_next_step():
    family = FAMILIES["llama"]
    apt = adapted(family)
    optimizer = torch.optim.AdamW(adapter_parameters(apt), lr=1e-2, fused=True)
    step(apt, family, optimizer, 3)
    mask_all(apt, some(family, apt.blocks, ALL, "hard")).cut()
    optimizer.zero_grad()
    apt(**family.inputs()).logits.square().mean().backward()
    with pytest.raises(RuntimeError, match="pass the optimizer to the call that changes the size"):
        optimizer.step()


def state_of(apt):
    return (
        {name: (id(p), p.detach().clone()) for name, p in apt.named_parameters()},
        {name: buffer.clone() for name, buffer in apt.named_buffers()},
        dict(apt.blocks),
        apt.config.to_dict(),
    )


def same(before, after):
    assert before[2:] == after[2:] and before[0].keys() == after[0].keys() and before[1].keys() == after[1].keys()
    assert all(before[0][n][0] == after[0][n][0] and torch.equal(before[0][n][1], after[0][n][1]) for n in before[0])
    assert all(torch.equal(before[1][n], after[1][n]) for n in before[1])


@pytest.mark.parametrize("why", ["adafactor", "merged", "alike"])
def test_a_refusal_changes_nothing(why):
    family = FAMILIES["t5"]
    apt = adapted(family)
    optimizer = torch.optim.AdamW(adapter_parameters(apt), lr=1e-2)
    if why == "adafactor":
        optimizer = torch.optim.Adafactor(adapter_parameters(apt), lr=1e-2)
    step(apt, family, optimizer, 3)
    mask_all(apt, some(family, apt.blocks, ALL, "hard"))
    if why == "merged":
        dict(adapters(apt))["encoder.block.0.layer.1.DenseReluDense.wi"].merge_weights()
    if why == "alike":
        apt.set_block_mask("encoder.0.heads", torch.ones(3))
    before = state_of(apt)
    error, words = {
        "adafactor": (RuntimeError, "state of Adafactor cannot be resized"),
        "merged": (RuntimeError, "cut: encoder.block.0.layer.1.DenseReluDense.wi is merged"),
        "alike": (ValueError, "expected the same heads of encoder.0.heads"),
    }[why]
    with pytest.raises(error, match=words):
        apt.cut(optimizer)
    same(before, state_of(apt))


def test_it_is_refused_under_ddp(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        family = FAMILIES["bert"]
        apt = adapted(family)
        wrapped = nn.parallel.DistributedDataParallel(apt)
        mask_all(apt, some(family, apt.blocks, ("neurons",), "hard"))
        before = state_of(apt)
        with pytest.raises(RuntimeError, match="DistributedDataParallel"):
            apt.cut()
        same(before, state_of(apt))
        del wrapped
        apt.cut()
        assert apt.blocks["0.neurons"].count < 20
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("version", ["FSDP", "FSDP2"])
def test_it_is_refused_under_fsdp(tmp_path, version):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        apt = adapted(FAMILIES["bert"])
        mask_all(apt, some(FAMILIES["bert"], apt.blocks, ("neurons",), "hard"))
        if version == "FSDP2":
            wrapped = fully_shard(apt, mesh=init_device_mesh("cpu", (1,)))
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # its own deprecations
                wrapped = FullyShardedDataParallel(apt, use_orig_params=True, device_id=torch.device("cpu"))
        shapes = {name: (id(p), p.shape) for name, p in apt.named_parameters()}
        with pytest.raises(RuntimeError, match="FullyShardedDataParallel|FSDP"):
            apt.cut()
        assert {name: (id(p), p.shape) for name, p in apt.named_parameters()} == shapes
        assert apt.blocks["0.neurons"].count == 20
        del wrapped
    finally:
        dist.destroy_process_group()


def test_ranks_grow_after_a_cut():
    family = FAMILIES["gpt2"]
    apt = adapted(family)
    mask_all(apt, some(family, apt.blocks, ALL, "hard")).cut()
    expected = outputs(apt, family.inputs())
    for _, adapter in adapters(apt):
        if 0 < adapter.rank < min(adapter.in_features, adapter.out_features):
            adapter.increase_rank(adapter.rank + 1)
    close(outputs(apt, family.inputs()), expected, 1e-12)


def test_a_model_without_masks_is_left_alone():
    apt = get_apt_model(FAMILIES["qwen3"].model(), APTConfig(r=2))
    before = state_of(apt)
    apt.cut(torch.optim.AdamW(adapter_parameters(apt)))
    same(before, state_of(apt))


@pytest.mark.parametrize("max_rank", [None, 4])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
def test_a_rank_above_what_is_left_works_on(name, max_rank):
    """One survivor of each block: linears of one row, under adapters of rank 2."""
    family = FAMILIES[name]

    def cut(seed):
        apt = adapted(family, APTConfig(r=2, max_rank=max_rank))
        optimizer = torch.optim.AdamW(adapter_parameters(apt), lr=1e-2)
        hold_pruned(optimizer, adapters(apt))
        step(apt, family, optimizer, seed)
        return mask_all(apt, some(family, apt.blocks, ("heads", "neurons"), "one")).cut(optimizer), optimizer

    apt, optimizer = cut(3)
    wide = [adapter for _, adapter in adapters(apt) if adapter.rank > min(adapter.in_features, adapter.out_features)]
    assert wide
    before = [adapter.lora_B.detach().clone() for adapter in wide]
    step(apt, family, optimizer, 4)
    assert all(not torch.equal(adapter.lora_B, old) for adapter, old in zip(wide, before, strict=True))
    expected = outputs(apt, family.inputs())
    for adapter in wide:
        adapter.increase_rank(adapter.rank, optimizer=optimizer)  # nothing to do
        with pytest.raises(ValueError, match="new_rank must lie between rank = 2 and 2, got 3"):
            adapter.increase_rank(3, optimizer=optimizer)
        assert adapter.get_sparsity_stats()["rank"] == 2
    other, _ = cut(5)
    other.load_state_dict(apt.state_dict())  # into a model that was cut alike
    for same in (apt, other, copy.deepcopy(apt), shrink(apt)):
        close(outputs(same, family.inputs()), expected)
    for _, adapter in adapters(other):
        adapter.merge_weights()
    close(outputs(other, family.inputs()), expected)
    for adapter in wide:
        fresh = type(adapter)(adapter.in_features, adapter.out_features, 0, max_rank=max_rank)
        with pytest.raises(ValueError, match="rank must be at most"):
            fresh.load_state_dict({k: v for k, v in adapter.state_dict().items() if "base_layer" not in k})
