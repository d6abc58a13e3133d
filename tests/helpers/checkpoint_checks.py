"""A run that stopped on two ranks goes on in one process, and the other way round."""

import pathlib
import tempfile

import torch
from controller_checks import rows
from families import FAMILIES
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from training import SHORT, batch_for, built
from two_adapters import check

from apt_ext import APTModel, Controller, adapter_parameters, adapters
from apt_ext.distributed import agreement

FAMILY, STEPS, STOP = FAMILIES["bert"], 12, 7  # between the first event and the second


def begun():
    apt, optimizer = built(FAMILY, max_rank=5)
    return apt, optimizer, Controller(apt, optimizer, 16, **SHORT)


def saved(parts, directory):
    apt, optimizer, controller = parts
    apt.save_pretrained(directory)
    torch.save([optimizer.state_dict(), controller.state_dict()], directory / "run.pt")


def loaded(directory):
    base = FAMILY.model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    apt = APTModel.from_pretrained(base, directory).train()
    optimizer = torch.optim.AdamW(adapter_parameters(apt), lr=1e-3)
    controller = Controller(apt, optimizer, 16, **{**SHORT, "seed": 5})
    for part, state in zip((optimizer, controller), torch.load(directory / "run.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    return apt, optimizer, controller


def go_on(parts, first, last, rank=None):
    """Steps on this rank's rows, under DDP; without a rank those of one process with the rows of both."""
    apt, optimizer, controller = parts
    model = apt if rank is None else DistributedDataParallel(apt)
    for step in range(first, last):
        batch = batch_for(FAMILY, step)
        losses = [model(**rows(batch, part)).loss for part in ((0, 1) if rank is None else (rank,))]
        (sum(losses) / len(losses)).backward()
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
    return parts


@check
def a_run_goes_on_with_another_number_of_ranks(rank):
    places = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(places)
    place = pathlib.Path(places[0])
    together = go_on(begun(), 0, STOP, rank)
    with agreement.alone():
        alone = go_on(begun(), 0, STOP)
        if rank == 0:
            saved(together, place / "two")
            saved(alone, place / "one")
    dist.barrier()
    from_one = go_on(loaded(place / "one"), STOP, STEPS, rank)
    with agreement.alone():
        from_two = go_on(loaded(place / "two"), STOP, STEPS)
        whole = go_on(alone, STOP, STEPS)
    expected = dict(whole[0].named_parameters())
    assert any(not bool(whole[0].get_block_mask(name).all()) for name in whole[0].blocks)
    for apt, _, controller in (from_one, from_two):
        assert controller.now == STEPS
        assert all(torch.equal(apt.get_block_mask(name), whole[0].get_block_mask(name)) for name in apt.blocks)
        assert [adapter.rank for _, adapter in adapters(apt)] == [adapter.rank for _, adapter in adapters(whole[0])]
        for key, value in apt.named_parameters():
            torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-8, msg=lambda text, at=key: f"{at}: {text}")
