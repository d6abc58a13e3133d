"""Two ranks agree on changes of masks and rank, or are refused together. test_distributed.py runs them."""

import time
from datetime import timedelta
from functools import partial

import pytest
import torch
from torch import distributed as dist
from two_adapters import Two, assert_same, check, gathered, state

import apt_ext
from apt_ext.distributed import agreement
from apt_ext.optim import resize


def refused_everywhere(rank, calls, match, *adapters):
    """Each rank makes its own call; both raise what matches, at once, and nothing has changed. The next change is made as ever."""
    before, start = state(*adapters), time.monotonic()
    with pytest.raises(RuntimeError, match=match) as caught:
        calls[rank]()
    assert time.monotonic() - start < 10  # half the group's timeout is 30
    assert_same(before, state(*adapters))
    mask = torch.rand(8, generator=torch.Generator().manual_seed(3))
    adapters[0].set_masks(mask)
    assert torch.equal(adapters[0].mask_in, mask)
    adapters[0].set_masks(before[0][1])
    return str(caught.value)


@check
def ranks_with_other_masks_are_refused(rank):
    model = Two()
    one = [partial(model.first.set_masks, torch.full((8,), value)) for value in (0.5, 0.25)]
    text = refused_everywhere(rank, one, "set_masks.*ranks disagree, and nothing has changed", *model.adapters())
    assert "rank 0 " in text and "rank 1 " in text
    sides = [lambda: model.first.set_masks(torch.zeros(8)), lambda: model.first.set_masks(torch.zeros(8), torch.ones(7))]
    refused_everywhere(rank, sides, "ranks disagree", *model.adapters())
    layers = [lambda: model.first.set_masks(mask_out=torch.zeros(7)), lambda: model.second.set_masks(torch.zeros(7))]
    refused_everywhere(rank, layers, "ranks disagree", *model.adapters())


@check
def ranks_with_other_ranks_are_refused(rank):
    for model in (Two(), Two(max_rank=None)):
        first, everything = model.first, model.adapters()
        optimizer = torch.optim.AdamW(model.parameters())
        grow = [partial(first.increase_rank, new, optimizer=optimizer) for new in (3, 4)]
        text = refused_everywhere(rank, grow, r"increase_rank\(\d\)", *everything)
        assert "increase_rank(3)" in text and "increase_rank(4)" in text
        refused_everywhere(rank, [partial(first.set_masks, torch.zeros(8)), partial(first.increase_rank, 3)], "ranks disagree", *everything)
        # a growth that is none on one of them
        refused_everywhere(rank, [partial(first.increase_rank, 2), partial(first.increase_rank, 3)], "ranks disagree", *everything)


@check
def ranks_that_differed_before_are_refused(rank):
    adapter = Two().first
    with agreement.alone():
        adapter.set_masks(mask_out=torch.full((7,), 0.5 + 0.1 * rank))
    before = adapter.get_masks()
    with pytest.raises(RuntimeError, match="ranks disagree"):
        adapter.set_masks(torch.zeros(8))
    with pytest.raises(RuntimeError, match="ranks disagree"):
        adapter.increase_rank(3)
    assert all(map(torch.equal, before, adapter.get_masks())) and adapter.rank == 2


@check
def a_refusal_on_one_rank_reaches_the_others(rank):
    adapter = Two().first
    before, start = state(adapter), time.monotonic()
    error, match = (
        (ValueError, "^mask_in must hold") if rank else (RuntimeError, r"rank 1 refuses set_masks.*ValueError: mask_in must hold")
    )
    with pytest.raises(error, match=match):
        adapter.set_masks(torch.full((8,), 1.0 + rank))
    error, match = (ValueError, "^new_rank must lie") if rank else (RuntimeError, r"rank 1 refuses increase_rank\(9\)")
    with pytest.raises(error, match=match):
        adapter.increase_rank(9 if rank else 3)
    assert time.monotonic() - start < 10  # half the group's timeout is 30
    assert_same(before, state(adapter))
    for _ in range(2):  # refused by every rank, each with its own words
        with pytest.raises(ValueError, match="^new_rank must lie"):
            adapter.increase_rank(9)
    adapter.increase_rank(3)


@check
def a_rank_that_changes_alone_gets_an_error_and_so_do_the_others(rank):
    adapter = Two().first
    store = dist.distributed_c10d._get_default_store()
    usual = store.timeout
    store.set_timeout(timedelta(seconds=1))  # half of it is waited
    before = state(adapter)
    calls = [lambda: adapter.set_masks(torch.zeros(8)), lambda: adapter.increase_rank(3)]
    for call in calls:
        dist.barrier()
        if rank == 0:
            start = time.monotonic()
            with pytest.raises(RuntimeError, match="rank 0 waited 0.5 s for .*, to which 1 of 2 ranks came"):
                call()
            assert 0.4 < time.monotonic() - start < 10
        dist.barrier()  # a collective of the others meanwhile: nothing of the exchange is in its way
        if rank == 1:
            with pytest.raises(RuntimeError, match="rank 0 waited 0.5 s"):
                call()
        assert_same(before, state(adapter))
    store.set_timeout(usual)
    for call in calls:
        call()
    assert adapter.rank == 3 and torch.equal(*gathered(adapter.lora_A))


@check
def a_batch_of_changes_costs_one_exchange(rank):
    model = Two()
    rounds = agreement._number
    new = torch.zeros(7)
    with agreement.change("step 5") as agree:
        agree(new, [3, 4])
        for _ in range(3):
            model.first.set_masks(mask_out=new)
            model.second.set_masks(mask_in=new)
        model.first.increase_rank(3)
        model.second.increase_rank(4)
    assert agreement._number == rounds + 1 and not model.second.mask_in.any()
    assert torch.equal(*gathered(model.second.lora_A)) and model.second.lora_A[:4].all()  # rank 0's rows all the same
    before = state(*model.adapters())
    with pytest.raises(RuntimeError, match="step 6: the ranks disagree"), agreement.change("step 6") as agree:
        agree(new, [4, 4 + rank])
        model.first.set_masks(torch.zeros(8))
    assert_same(before, state(*model.adapters()))
    with pytest.raises(ValueError if rank else RuntimeError, match="new_rank|rank 1 refuses step 7"), agreement.change("step 7") as agree:
        if rank:
            model.first.increase_rank(99)  # what a nested call refuses before all is agreed is reported for the whole
        agree()
    assert agreement._number == rounds + 3


def tiny_bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, max_position_embeddings=8
    )
    return apt_ext.get_apt_model(BertForSequenceClassification(config), apt_ext.APTConfig(r=2, target_modules=["query", "value"]))


@check
def block_masks_are_agreed_on_in_one_exchange(rank):
    model = tiny_bert()
    rounds = agreement._number
    mask = torch.ones(12)
    mask[3] = 0
    model.set_block_mask("0.neurons", mask)
    assert agreement._number == rounds + 1 and torch.equal(model.get_block_mask("0.neurons"), mask)
    with pytest.raises(RuntimeError, match="set_block_mask '0.neurons': the ranks disagree"):
        model.set_block_mask("0.neurons", torch.full((12,), 0.5 + 0.1 * rank))
    with pytest.raises(ValueError if rank else RuntimeError, match="rank 1 refuses set_block_mask|expected a block of this model"):
        model.set_block_mask("no such block" if rank else "0.neurons", mask)
    assert torch.equal(model.get_block_mask("0.neurons"), mask)
    name, adapter = next(iter(apt_ext.adapters(model)))
    with pytest.raises(RuntimeError, match=f"set_masks of {name}: the ranks disagree"):
        adapter.set_masks(torch.full((8,), 0.5 + 0.1 * rank))


@check
def a_cut_is_agreed_on_and_shrink_asks_nobody(rank):
    model = tiny_bert()
    rounds, mask = agreement._number, torch.ones(12)
    with agreement.alone():
        mask[2 + rank] = 0
        model.set_block_mask("0.neurons", mask)
    widths = [adapter.weight.shape for _, adapter in apt_ext.adapters(model)]
    with pytest.raises(RuntimeError, match="^cut: the ranks disagree"):
        model.cut()
    assert [adapter.weight.shape for _, adapter in apt_ext.adapters(model)] == widths
    if rank == 0:  # as one does to export
        apt_ext.shrink(model)
        model.load_state_dict(model.state_dict())
    assert agreement._number == rounds + 1
    with agreement.alone():
        model.set_block_mask("0.neurons", torch.tensor([0.0, *[1] * 11]))
    model.cut()
    assert model.blocks["0.neurons"].count == 11 and agreement._number == rounds + 2


@check
def what_a_rank_does_alone_on_purpose(rank):
    adapter = Two().first
    if rank == 0:
        with agreement.alone():
            adapter.set_masks(torch.zeros(8))
            adapter.increase_rank(3)
        assert adapter.rank == 3
    dist.barrier()
    Two().first.set_masks(torch.zeros(8))


@check
def new_rows_are_rank_zeros(rank):
    for dtype in (torch.float32, torch.bfloat16):
        rows = resize.draw_rows(3, 4, 1.0, torch.Generator().manual_seed(rank), "cpu", dtype)
        mine = torch.empty(3, 4).normal_(0.0, 1.0, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert torch.equal(*gathered(rows)) and torch.equal(rows, mine)
    adapter = Two(max_rank=None).first
    adapter.increase_rank(5, generator=torch.Generator().manual_seed(rank))
    assert torch.equal(*gathered(adapter.lora_A))


@check
def the_store_is_left_tidy(rank):
    adapter, store = Two().first, dist.distributed_c10d._get_default_store()
    dist.barrier()
    adapter.set_masks(torch.zeros(8))
    dist.barrier()
    keys = store.num_keys()
    dist.barrier()
    for _ in range(20):
        adapter.set_masks(torch.zeros(8))
    dist.barrier()
    now = store.num_keys()
    dist.barrier()  # before the other rank asks for the next check, which is a key more
    assert now == keys
