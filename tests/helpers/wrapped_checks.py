"""Two ranks train under DDP and FSDP2: growth, masks and hold_pruned against one process; refusals. test_distributed.py runs them."""

import copy
import time
import warnings
from datetime import timedelta

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from two_adapters import Two, assert_same, check, gathered, loss, state, whole

import apt_ext
from apt_ext.distributed import agreement


def follows_one_process(wrap, rank):
    """Five steps of a wrapped model, with changes, against one process that averages the gradients of both ranks' batches."""
    torch.manual_seed(100 + rank)
    model, plain = Two(), Two()
    wrapped = wrap(model)
    optimizers = [torch.optim.AdamW(apt_ext.adapter_parameters(m), lr=0.05, weight_decay=0.3) for m in (model, plain)]
    for m, optimizer in zip((model, plain), optimizers, strict=True):
        apt_ext.hold_pruned(optimizer, m.adapters())
    for step in range(5):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss(wrapped, rank, step).backward()
        (sum(loss(plain, other, step) for other in range(2)) / 2).backward()
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            if p.requires_grad:
                mine, other = gathered(p.grad)
                assert torch.equal(mine, other), (step, name)
                torch.testing.assert_close(mine, q.grad, rtol=1e-4, atol=1e-6, msg=lambda text, at=(step, name): f"{at}: {text}")
        for a in model.adapters():
            assert not whole(a.lora_A.grad)[a.rank :].any() and not whole(a.lora_B.grad)[:, a.rank :].any()
        before = [whole(p).clone() for p in (model.first.lora_B, model.second.lora_A)]
        for optimizer in optimizers:
            optimizer.step()
        pruned = model.first.mask_out == 0  # also mask_in of the second
        assert torch.equal(whole(model.first.lora_B)[pruned], before[0][pruned])
        assert torch.equal(whole(model.second.lora_A)[:, pruned], before[1][:, pruned])
        old = [whole(p).clone() for p in model.parameters()]
        model.change(step)
        with agreement.alone(), torch.no_grad():  # the model of one process takes the rows that the ranks agreed on
            plain.change(step)
            for a, b in zip(model.adapters(), plain.adapters(), strict=True):
                grown = torch.arange(5)[:, None] >= (a.rank - (step in (1, 3)))
                b.lora_A.copy_(torch.where(grown, whole(a.lora_A), b.lora_A))
        for p, was in zip(model.parameters(), old, strict=True):
            mine, other = gathered(p)
            assert torch.equal(mine, other)
            assert torch.equal(mine[was != 0], was[was != 0])
    assert [a.rank for a in model.adapters()] == [4, 4] and whole(model.first.lora_A)[:4].all() and whole(model.first.lora_B)[:2, :4].all()
    assert not whole(model.first.lora_A)[4:].any()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(whole(p), q.detach(), rtol=1e-3, atol=1e-5)


def sharded(model):
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.first, mesh=mesh)
    return fully_shard(model, mesh=mesh)


# -- DDP ----------------------------------------------------------------------------------------------------------------------------------


@check
def ddp_follows_one_process(rank):
    follows_one_process(DistributedDataParallel, rank)


@check
def ddp_of_compacted_adapters_follows_one_process(rank):
    def wrap(model):
        for adapter in model.adapters():
            adapter.compact()
        return DistributedDataParallel(model)

    follows_one_process(wrap, rank)


@check
def fsdp_refuses_what_it_has_sharded(rank):
    model = sharded(Two())
    with pytest.raises(RuntimeError, match="compact: FSDP has sharded this layer"):
        model.first.compact()
    assert not model.first.compacted


@check
def ddp_growth_between_accumulated_batches(rank):
    model, plain = Two(), Two()
    wrapped = DistributedDataParallel(model)
    with wrapped.no_sync():
        loss(wrapped, rank, 0).backward()
    first = [p.grad.clone() for p in apt_ext.adapter_parameters(model)]
    model.first.increase_rank(4)
    assert all(map(torch.equal, first, (p.grad for p in apt_ext.adapter_parameters(model))))
    loss(wrapped, rank, 1).backward()
    plain.load_state_dict(model.state_dict())
    sum(loss(plain, other, step) for other in range(2) for step in range(2)).div(2).backward()
    for p, q in zip(apt_ext.adapter_parameters(model), apt_ext.adapter_parameters(plain), strict=True):
        mine, other = gathered(p.grad)
        assert torch.equal(mine, other)
        torch.testing.assert_close(mine[:, :2] if p is model.first.lora_B else mine, q.grad[:, :2] if p is model.first.lora_B else q.grad)


@check
def ddp_refuses_reallocation_until_unwrapped(rank):
    model = Two(max_rank=None)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(apt_ext.adapter_parameters(model))
    loss(wrapped, rank, 0).backward()
    optimizer.step()
    before = state(*model.adapters())
    with pytest.raises(RuntimeError, match="held by DistributedDataParallel.*max_rank"):
        model.first.increase_rank(4, optimizer=optimizer)
    assert_same(before, state(*model.adapters()))
    del wrapped
    model.first.increase_rank(4, optimizer=optimizer)
    wrapped = DistributedDataParallel(model)
    optimizer.zero_grad()
    loss(wrapped, rank, 1).backward()
    optimizer.step()
    assert torch.equal(*gathered(model.first.lora_A)) and torch.equal(*gathered(model.first.lora_B)) and model.first.lora_B[:, 2:].all()


@check
def ddp_growth_between_forward_and_backward_is_an_error_on_every_rank(rank):
    model = Two()
    value = loss(DistributedDataParallel(model), rank, 0)
    model.first.increase_rank(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
    dist.barrier()


# -- FSDP2 --------------------------------------------------------------------------------------------------------------------------------


@check
def fsdp_follows_one_process(rank):
    follows_one_process(sharded, rank)


@check
def fsdp_refuses_reallocation(rank):
    model = sharded(Two(max_rank=None))
    for adapter, evaluated in ((model.first, False), (model.second, True)):
        if evaluated:
            with torch.no_grad():
                loss(model, rank, 0)  # leaves the root gathered
            assert not hasattr(adapter.lora_A, "full_tensor")
        with pytest.raises(RuntimeError, match="expected a Parameter that no wrapper holds.*max_rank"):
            adapter.increase_rank(4)
        assert adapter.rank == 2 and adapter.lora_A.shape[0] == 2


@check
def fsdp_refuses_what_a_gathered_parameter_would_lose(rank):
    model = sharded(Two())
    optimizer = torch.optim.AdamW(apt_ext.adapter_parameters(model))
    apt_ext.hold_pruned(optimizer, model.adapters())
    loss(model, rank, 0).backward()
    with torch.no_grad():
        loss(model, rank, 0)
    assert not hasattr(model.second.lora_A, "full_tensor")
    before = [whole(p) for p in model.first.parameters()]
    with pytest.raises(RuntimeError, match=r"increase_rank: FSDPTwo has the Parameter gathered.*reshard\(\)"):
        model.second.increase_rank(3)
    with pytest.raises(RuntimeError, match="merge_weights: FSDPTwo has the Parameter gathered"):
        model.second.merge_weights()
    with pytest.raises(RuntimeError, match=r"hold_pruned: AdamW does not hold the present lora_A.*reshard\(\)"):
        optimizer.step()
    assert all(map(torch.equal, before, (whole(p) for p in model.first.parameters()))) and not optimizer.state
    model.reshard()
    model.second.increase_rank(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="merge_weights: FSDP2 has sharded this layer"):
        model.first.merge_weights()
    assert not model.first.merged and model.second.rank == 3


@check
def fsdp_gradient_masks(rank):
    model = sharded(Two())
    loss(model, rank, 0).backward()
    model.first.set_masks(torch.tensor([0.0, 1, 1, 0, 1, 1, 1, 1]), torch.tensor([1, 0.5, 0, 1, 1, 1, 0]))
    A, B = (whole(p.grad).clone() for p in (model.first.lora_A, model.first.lora_B))
    model.first.apply_grad_mask()
    A[:, [0, 3]], B[[2, 6]] = 0, 0
    assert torch.equal(whole(model.first.lora_A.grad), A) and torch.equal(whole(model.first.lora_B.grad), B) and A.any() and B.any()


@check
def fsdp_state_dict_comes_back(rank):
    model = sharded(Two())
    model.change(3)
    saved = copy.deepcopy(model.state_dict())
    other = sharded(Two())
    other.load_state_dict(saved)
    assert other.first.rank == 3 and torch.equal(other.first.mask_out, model.first.mask_out)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(whole(p), whole(q))


@check
def fsdp1_is_refused(rank):
    """It steps flat pieces, also with use_orig_params."""
    model = Two()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own deprecations
        wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = torch.optim.AdamW(apt_ext.adapter_parameters(model))
    apt_ext.hold_pruned(optimizer, model.adapters())
    assert isinstance(wrapped, FullyShardedDataParallel) and model.first.lora_A.dim() == 1
    with pytest.raises(RuntimeError, match="increase_rank: expected reserved storage of shape .* in pieces"):
        model.first.increase_rank(3)
    with pytest.raises(RuntimeError, match="hold_pruned: lora_A has shape .* steps pieces"):
        optimizer.step()
    assert model.first.rank == 2 and not optimizer.state


# -- and last ---------------------------------------------------------------------------------------------------------------------------


@check
def a_change_alone_ends_a_collective_of_the_others(rank):
    """The last check: rank 0 changes alone, gives up and leaves; rank 1, in DDP's collective, gets an error instead of waiting for ever."""
    model = Two()
    wrapped = DistributedDataParallel(model)
    if rank == 0:
        dist.distributed_c10d._get_default_store().set_timeout(timedelta(seconds=2))
        with pytest.raises(RuntimeError, match="rank 0 waited 1 s"):
            model.first.set_masks(torch.zeros(8))
        del wrapped
        dist.destroy_process_group()
    else:
        start = time.monotonic()
        with pytest.raises(RuntimeError):
            loss(wrapped, rank, 0).backward()
        assert time.monotonic() - start < 20
