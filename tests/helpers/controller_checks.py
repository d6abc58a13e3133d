"""Two ranks train under a Controller: the same masks and ranks on both, those of one process with the joint batch."""

import pytest
import torch
from families import FAMILIES
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import SHORT, batch_for, built
from two_adapters import check, gathered, whole

from apt_ext import Controller, adapter_parameters, adapters
from apt_ext.distributed import agreement


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
    """Without max_rank: an error on every rank when it is made; and where it was made before DDP, masks and ranks are as before."""
    family = FAMILIES["bert"]
    apt, optimizer = built(family)
    controller = Controller(apt, optimizer, 16, schedule={"start": 0, "end": 2, "events": 1})
    model, words = DistributedDataParallel(apt), []
    other, its = built(family)
    wrapped = DistributedDataParallel(other)
    with pytest.raises(RuntimeError, match=r"growth: expected at most 1, or APTConfig\(max_rank=.* held by DistributedDataParallel"):
        Controller(wrapped, its, 16, **SHORT)
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


def modules_of(apt):
    return [(name, type(module), id(module)) for name, module in apt.named_modules()]


@check
def a_mask_that_is_refused_leaves_no_carrier(rank):
    """Embeddings and norms are wrapped once the ranks agree, and not before."""
    for name in ("bert", "llama"):
        apt, _ = built(FAMILIES[name])
        before = modules_of(apt)
        mask = torch.ones(apt.blocks["hidden"].count)
        mask[rank] = 0
        with pytest.raises(RuntimeError, match="set_block_mask 'hidden': the ranks disagree, and nothing has changed"):
            apt.set_block_mask("hidden", mask)
        if rank:
            mask[0] = 2  # out of range on one rank alone
        with pytest.raises((RuntimeError, ValueError), match="set_block_mask 'hidden'|must hold values in"):
            apt.set_block_mask("hidden", mask)
        assert modules_of(apt) == before and bool(apt.get_block_mask("hidden").all())


@check
def a_controller_that_one_rank_refuses_is_made_on_none(rank):
    """With other settings, or where one rank alone finds a mistake: no rank has its carriers, hooks or a Controller at work."""
    for mine, words in (
        ([{"density": 0.7}, {"density": 0.6}], "a new Controller: the ranks disagree, and nothing has changed"),
        ([{}, {"prune": ["neurons"], "density": 0.9}], "the ranks disagree"),
        ([{}, {"decay": 1.0}], "rank 1 refuses a new Controller with ValueError: decay" if rank == 0 else "decay must lie in"),
    ):
        apt, optimizer = built(FAMILIES["bert"], prune=["heads", "neurons", "hidden"], max_rank=5)
        before = modules_of(apt)
        with pytest.raises((RuntimeError, ValueError), match=words):
            Controller(apt, optimizer, 16, **SHORT, **mine[rank])
        assert modules_of(apt) == before and not any(module._forward_pre_hooks for module in apt.modules())
        assert not optimizer._optimizer_step_post_hooks
        Controller(apt, optimizer, 16, seed=rank, **SHORT)  # the seed is each rank's own: rank 0's new rows are used everywhere
        assert modules_of(apt) != before


@check
def a_state_that_is_refused_leaves_no_carrier(rank):
    """A state of pruned hidden dimensions brings carriers, but not with a tensor of another size."""
    apt, _ = built(FAMILIES["bert"])
    with agreement.alone():
        other, _ = built(FAMILIES["bert"])
        other.set_block_mask("hidden", torch.cat([torch.zeros(4), torch.ones(20)]))
    before = modules_of(apt)
    with pytest.raises(ValueError, match=r"query.lora_A and .* must have shapes"):
        apt.load_state_dict({**other.state_dict(), "model.bert.encoder.layer.0.attention.self.query.lora_A": torch.ones(2, 2)})
    assert modules_of(apt) == before
    apt.load_state_dict(other.state_dict())
    assert modules_of(apt) != before and int(apt.get_block_mask("hidden").sum()) == 20
