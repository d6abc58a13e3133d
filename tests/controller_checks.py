"""Two ranks train under a Controller: the same masks and ranks on both, those of one process with the joint batch."""

import pytest
import torch
from families import FAMILIES
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import SHORT, batch_for, built
from two_adapters import check, gathered, whole

from apt_ext import Controller, adapter_parameters, adapters, agreement


def rows(batch, part):
    """The first two rows or the last two: both ranks have as many tokens, and padding."""
    return {name: value[part : part + 2] for name, value in batch.items()}


def sharded(apt):
    """FSDP2 over every layer and what is around them."""
    for value in (0.5, 1.0):  # embeddings, norms and output layers are wrapped before they are sharded
        apt.set_block_mask("hidden", torch.full((apt.blocks["hidden"].count,), value))
    mesh = init_device_mesh("cpu", (2,))
    for module in apt.modules():
        if type(module).__name__.endswith(("Layer", "Block")):
            fully_shard(module, mesh=mesh)
    return fully_shard(apt, mesh=mesh)


def run(name, rank, wrap=DistributedDataParallel, **options):
    family = FAMILIES[name]
    kinds = ["heads", "neurons", "hidden"]
    apt, optimizer = built(family, max_rank=5, prune=kinds)
    plain, its = built(family, max_rank=5, prune=kinds)
    model = wrap(apt)
    if wrap is sharded:
        optimizer = torch.optim.AdamW(adapter_parameters(apt), lr=1e-3)
    controller = Controller(model, optimizer, 16, **SHORT, **options)
    with agreement.alone():
        alone = Controller(plain, its, 16, **SHORT, **options)
    for step in range(16):
        batch = batch_for(family, step)
        model(**rows(batch, rank)).loss.backward()
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
        with agreement.alone():
            (sum(plain(**rows(batch, part)).loss for part in range(2)) / 2).backward()
            alone.observe()
            its.step()
            its.zero_grad()
            alone.step()
        for block in apt.blocks:
            mask = apt.get_block_mask(block)
            assert torch.equal(*gathered(mask)) and torch.equal(mask, plain.get_block_mask(block)), (step, block)
        ranks = torch.tensor([adapter.rank for _, adapter in adapters(apt)])
        assert torch.equal(*gathered(ranks)) and ranks.tolist() == [adapter.rank for _, adapter in adapters(plain)], step
        for site, score in controller.scores.salience.scores.items():
            assert torch.equal(*gathered(score))
            torch.testing.assert_close(score, alone.scores.salience.scores[site], rtol=1e-6, atol=1e-12)
    assert controller.done and int(ranks.max()) > 2 and not all(bool(apt.get_block_mask(block).all()) for block in apt.blocks)
    for (key, value), other in zip(apt.named_parameters(), plain.parameters(), strict=True):
        if not value.numel():  # which torch cannot gather
            continue
        assert torch.equal(*gathered(value)), key
        torch.testing.assert_close(whole(value), other.detach(), rtol=1e-6, atol=1e-8, msg=lambda text, at=key: f"{at}: {text}")


@check
def a_controller_under_ddp_is_one_process_with_the_joint_batch(rank):
    run("bert", rank)


@check
def a_controller_of_a_decoder_under_ddp(rank):
    run("llama", rank, kurtosis=1.0)


@check
def a_controller_under_fsdp_is_one_process_with_the_joint_batch(rank):
    run("bert", rank, sharded)


@check
def a_controller_of_a_decoder_under_fsdp(rank):
    run("llama", rank, sharded, kurtosis=1.0)


@check
def a_controller_refuses_to_wrap_what_fsdp_has_sharded(rank):
    apt, _ = built(FAMILIES["bert"], max_rank=5, prune=["heads", "hidden"])
    fully_shard(apt, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(adapter_parameters(apt))
    modules = [(type(module), len(module._forward_pre_hooks)) for module in apt.modules()]
    with pytest.raises(RuntimeError, match=r"block 'hidden': expected to be masked once before fully_shard.*got bert\."):
        Controller(apt, optimizer, 16, **SHORT)
    with pytest.raises(RuntimeError, match=r"block 'hidden': expected to be masked once before fully_shard.*got bert\."):
        apt.set_block_mask("hidden", torch.full((apt.blocks["hidden"].count,), 0.5))
    assert modules == [(type(module), len(module._forward_pre_hooks)) for module in apt.modules()]
    assert bool(apt.get_block_mask("hidden").all())


@check
def fsdp_hands_gradients_over_with_the_last_micro_batch(rank):
    """observe() after each of them: only the last finds gradients, and it is the one that counts."""
    family = FAMILIES["bert"]
    apt, _ = built(family, max_rank=5)
    model = sharded(apt)
    optimizer = torch.optim.AdamW(adapter_parameters(apt), lr=1e-3)
    controller = Controller(model, optimizer, 16, **SHORT)
    for last in ((False, True), (False, True), (False, False)):
        for seed, synced in enumerate(last):
            model.set_requires_gradient_sync(synced)
            model(**rows(batch_for(family, seed), rank)).loss.backward()
            controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        if last[-1]:
            controller.step()
        else:
            with pytest.raises(RuntimeError, match=r"expected observe\(\) before the optimizer's step, got none that found the gradients"):
                controller.step()
    assert controller.now == 2 and any(bool(average.any()) for average in controller.importance.averages.values())


@check
def a_controller_refuses_growth_that_ddp_would_not_see(rank):
    """Without max_rank: an error on every rank, masks and ranks as before."""
    family = FAMILIES["bert"]
    apt, optimizer = built(family)
    model, controller = DistributedDataParallel(apt), Controller(apt, optimizer, 16, schedule={"start": 0, "end": 2, "events": 1})
    words = []
    for step in range(2):
        model(**rows(batch_for(family, step), rank)).loss.backward()
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        before = {name: apt.get_block_mask(name) for name in apt.blocks}
        try:
            controller.step()
        except RuntimeError as error:
            words.append(str(error))
    assert len(words) == 1 and "held by DistributedDataParallel" in words[0] and "max_rank" in words[0]
    assert all(torch.equal(apt.get_block_mask(name), mask) for name, mask in before.items())
    assert {adapter.rank for _, adapter in adapters(apt)} == {2}
