"""Two ranks that cut while they train, each its own model; and the wrappers under which nothing is cut."""

import logging
from contextlib import contextmanager

import pytest
import torch
from controller_checks import modules_of, rows, sharded
from families import FAMILIES
from torch.nn.parallel import DistributedDataParallel
from training import SCHEDULE, all_of, assert_equal, batch_for, built, hooks, state_of, train
from two_adapters import check, gathered

from apt_ext import Controller, adapter_parameters, adapters
from apt_ext.distributed import agreement

FAMILY = FAMILIES["bert"]
CONFIG = {"prune": ["heads", "neurons", "hidden"], "density": 0.4, "round_to": 1, "uniform": False}


def begin(**options):
    apt, optimizer = built(FAMILY, **CONFIG)
    return apt, optimizer, Controller(apt, optimizer, 16, log=lambda _: None, **SCHEDULE, **options)


def assert_same_on_both(parts):
    for key, value in all_of(*parts).items():
        if value.numel():  # which torch cannot gather
            assert torch.equal(*gathered(value.float())), key


@contextmanager
def warned():
    """Yield what the logger of the package warns of within this context."""
    said, logger = [], logging.getLogger("apt_ext")
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


@check
def ranks_cut_alike(rank):
    """Each has its own model and the same data: the same bits as one process alone has."""
    parts = begin()
    assert parts[2].shrink == "cut"
    with agreement.alone():
        alone = begin()
    for step in range(16):
        train(*parts, FAMILY, 1, first=step)
        with agreement.alone():
            train(*alone, FAMILY, 1, first=step)
    assert_same_on_both(parts)
    apt, _, controller = parts
    assert apt.blocks.origin is not None and controller.done and controller.density <= 0.4
    counts = torch.tensor([block.count for block in apt.blocks.values()])
    assert torch.equal(*gathered(counts))
    for block in controller.blocks:
        assert torch.equal(controller.original(block), alone[2].original(block)), block
    for (name, ours), (_, theirs) in zip(adapters(apt), adapters(alone[0]), strict=True):
        assert ours.lora_A.shape == theirs.lora_A.shape, name


def before_an_event(**options):
    """A run up to the step of its second event, which is still to be made."""
    parts = begin(**options)
    apt, optimizer, controller = parts
    train(*parts, FAMILY, 9)
    apt(**batch_for(FAMILY, 9)).loss.backward()
    controller.observe()
    optimizer.step()
    optimizer.zero_grad()
    return parts


def shapes(apt):
    return [(name, id(parameter), parameter.shape) for name, parameter in apt.named_parameters()]


def assert_refused(parts, words):
    """The event is refused, and nothing of model, optimizer or Controller is another; twice alike."""
    apt, optimizer, controller = parts
    before, sizes, now = state_of(apt), shapes(apt), controller.now
    moments = {id(v): v.clone() for state in optimizer.state.values() for v in state.values()}
    generator = controller.generator.get_state()
    with pytest.raises(RuntimeError, match=words):
        controller.step()
    assert shapes(apt) == sizes and controller.now == now
    assert_equal(state_of(apt), before)
    after = {id(v): v for state in optimizer.state.values() for v in state.values()}
    assert_equal(after, moments)
    assert torch.equal(controller.generator.get_state(), generator)


@check
def a_salience_that_differs_on_one_rank_refuses_the_cut_on_every_rank(rank):
    parts, plain = before_an_event(), before_an_event()
    for _, adapter in adapters(parts[0]):
        adapter.merge_weights()
    assert_refused(parts, "^step: .* is merged")  # what this step has heard is in the averages from here on
    for _, adapter in adapters(parts[0]):
        adapter.unmerge_weights()
    scores = parts[2].scores.salience.scores
    kept = {name: score.clone() for name, score in scores.items()}
    if rank:
        for score in scores.values():
            score.copy_(score.flip(0))
    for _ in range(2):
        assert_refused(parts, "^step 10 of the Controller: the ranks disagree, and nothing has changed")
    for name, score in scores.items():
        score.copy_(kept[name])
    for each in (parts, plain):
        each[2].step()
        train(*each, FAMILY, 6, first=10)
        assert each[2].done and each[0].blocks.origin is not None
    assert_equal(all_of(*parts), all_of(*plain))
    assert_same_on_both(parts)


@check
def a_mask_that_others_set_on_one_rank_refuses_the_cut_on_every_rank(rank):
    parts = before_an_event()
    apt, _, controller = parts
    mask = apt.get_block_mask("1.neurons")
    other = mask.clone()
    other[0] = 0.5
    if rank:
        with agreement.alone():
            apt.set_block_mask("1.neurons", other)
    words = "step: expected block '1.neurons' under the mask that this Controller gave it, got another"
    for _ in range(2):
        assert_refused(parts, f"^{words}" if rank else f"rank 1 refuses step 10 of the Controller.*{words}")
    if rank:
        with agreement.alone():
            apt.set_block_mask("1.neurons", mask)
    controller.step()
    train(*parts, FAMILY, 6, first=10)
    assert controller.done
    assert_same_on_both(parts)


@check
def under_ddp_the_default_is_compact_and_a_cut_is_refused_on_every_rank(rank):
    apt, optimizer = built(FAMILY, **CONFIG)
    model = DistributedDataParallel(apt)
    before, listened = modules_of(apt), hooks(apt, optimizer)
    with pytest.raises(RuntimeError, match="^shrink: DistributedDataParallel holds the Parameters.*shrink='compact' leaves"):
        Controller(model, optimizer, 16, growth=1.0, shrink="cut", **SCHEDULE)
    assert modules_of(apt) == before and hooks(apt, optimizer) == listened
    with warned() as said:
        controller = Controller(model, optimizer, 16, growth=1.0, log=lambda _: None, **SCHEDULE)
    said = [line for line in said if "compacted and not cut" in line]
    assert len(said) == 1 and "DistributedDataParallel holds" in said[0] and controller.shrink == "compact"
    sizes = shapes(apt)
    for step in range(16):
        model(**rows(batch_for(FAMILY, step), rank)).loss.backward()
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
    assert controller.done and controller.density <= 0.4
    assert shapes(apt) == sizes and apt.blocks.origin is None
    assert all(adapter.compacted for _, adapter in adapters(apt) if adapter.rank)


@check
def under_fsdp_the_default_is_compact_and_a_cut_is_refused_on_every_rank(rank):
    apt, _ = built(FAMILY, **CONFIG)
    model = sharded(apt)
    optimizer = torch.optim.AdamW(adapter_parameters(apt), lr=1e-3)
    before, listened = modules_of(apt), hooks(apt, optimizer)
    with pytest.raises(RuntimeError, match="^shrink: FSDP.* holds the Parameters.*shrink='compact' leaves"):
        Controller(model, optimizer, 16, growth=1.0, shrink="cut", **SCHEDULE)
    assert modules_of(apt) == before and hooks(apt, optimizer) == listened
    with warned() as said:
        controller = Controller(model, optimizer, 16, growth=1.0, **SCHEDULE)
    said = [line for line in said if "compacted and not cut" in line]
    assert len(said) == 1 and controller.shrink == "compact"
    assert "FSDP or tensor parallelism (a DTensor) holds" in said[0] and "they stay full-size under their masks" in said[0]


@check
def a_wrapper_that_comes_after_the_controller_makes_it_compact(rank):
    """The default looks again at its first cut; one that was asked for is refused there."""
    for shrink in (None, "cut"):
        apt, optimizer, controller = begin(shrink=shrink, growth=1.0)
        assert controller.shrink == "cut"
        model, refused = DistributedDataParallel(apt), 0
        with warned() as said:
            for step in range(6):
                model(**rows(batch_for(FAMILY, step), rank)).loss.backward()
                controller.observe()
                optimizer.step()
                optimizer.zero_grad()
                if shrink and step == 5:
                    assert_refused((apt, optimizer, controller), "held by DistributedDataParallel")
                    refused += 1
                else:
                    controller.step()
        assert apt.blocks.origin is None and refused == (shrink is not None)
        if shrink is None:
            assert controller.shrink == "compact"
            assert any("DistributedDataParallel holds" in line for line in said)


@check
def a_cut_state_is_refused_by_a_model_that_ddp_holds(rank):
    trained = begin()
    train(*trained, FAMILY, 11)
    state = trained[0].state_dict()
    apt, optimizer = built(FAMILY, **CONFIG)
    model = DistributedDataParallel(apt)
    before, sizes, modules = state_of(apt), shapes(apt), modules_of(apt)
    for load, given in (
        (apt.load_state_dict, state),
        (model.module.load_state_dict, state),
        (model.load_state_dict, {f"module.{key}": value for key, value in state.items()}),
    ):
        with pytest.raises(RuntimeError, match="held by DistributedDataParallel"):
            load(given)
        assert shapes(apt) == sizes and modules_of(apt) == modules and apt.blocks.origin is None
        assert_equal(state_of(apt), before)
    del model, load
    apt.load_state_dict(state)
    assert_equal(state_of(apt), state_of(trained[0]))
    model = DistributedDataParallel(apt)  # cut first, then wrapped
    model(**batch_for(FAMILY, 0)).loss.backward()
    model.load_state_dict({f"module.{key}": value for key, value in state.items()})  # which cuts nothing
