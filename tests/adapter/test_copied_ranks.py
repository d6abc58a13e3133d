"""Tensors of a grown adapter are copied into another without its rank: forward, save, merge, shrink and reload agree, and it is said."""

import copy
import logging

import pytest
import torch
from families import FAMILIES, outputs
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from apt_ext import (
    APTAdapter,
    APTConfig,
    APTModel,
    Controller,
    adapter_parameters,
    adapters,
    get_apt_model,
    shrink,
)
from apt_ext.common import log

X = torch.randn(5, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _said_anew():
    log.forget("rank")


def adapter(rank=2, max_rank=6, device="cpu"):
    made = APTAdapter.from_linear(nn.Linear(10, 7, dtype=torch.float64, device=device), rank, max_rank=max_rank)
    with torch.no_grad():
        made.Wb.normal_()
    return made


def grown_copy(to=5, device="cpu"):
    """(a grown adapter, another of the old rank that took its tensors)"""
    source = adapter(device=device)
    other = copy.deepcopy(source)
    source.increase_rank(to)
    with torch.no_grad():
        source.Wb.normal_()
        for mine, theirs in zip(other.parameters(), source.parameters(), strict=True):
            mine.copy_(theirs)
    assert other.rank == 2
    return source, other


EVENTS = {
    "state_dict": lambda a: a.state_dict(),
    "get_current_rank": lambda a: a.get_current_rank(),
    "get_parameter_count": lambda a: a.get_parameter_count(),
    "get_sparsity_stats": lambda a: a.get_sparsity_stats(),
    "merge": lambda a: a.merge_weights(),
    "grow": lambda a: a.increase_rank(6),
}


@pytest.mark.parametrize("event", EVENTS)
def test_an_event_takes_the_rank_of_the_tensors(device, event, caplog):
    source, other = (one.eval() for one in grown_copy(device=device))
    x = X.to(device)
    want = source(x)
    assert torch.equal(other(x), want)
    with caplog.at_level(logging.INFO, "apt_ext"):
        EVENTS[event](other)
        EVENTS[event](copy.deepcopy(grown_copy(device=device)[1]))
    assert other.rank == (6 if event == "grow" else 5)
    torch.testing.assert_close(other(x), want)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]  # said once
    assert "5 from now on instead of 2" in caplog.text
    assert torch.equal(other.lora_A[:5], source.lora_A[:5]) and torch.equal(other.lora_B[:, :5], source.lora_B[:, :5])


def test_a_row_of_a_or_a_column_of_b_is_enough():
    for factor in ("lora_A", "lora_B"):
        one = adapter()
        with torch.no_grad():
            getattr(one, factor)[(4, 0) if factor == "lora_A" else (0, 4)] = 1e-300  # rounded to nothing
        assert one.get_current_rank() == 5
    one = adapter()
    with torch.no_grad():
        one.lora_A[3, 2] = float("nan")
    assert one.get_current_rank() == 4


def test_zeros_within_the_rank_stay_ranks():
    """A copy of a lower rank, and a rank that is all zero: nothing is lost, and nothing is said."""
    other, source = adapter(rank=5), adapter()
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), source.parameters(), strict=True):
            mine.copy_(theirs)
    assert other.get_current_rank() == 5 and torch.equal(other(X), source(X))
    again = adapter(rank=1)
    again.load_state_dict(other.state_dict())
    assert again.rank == 5 and torch.equal(again(X), source(X))


def test_adopted_ranks_train_and_are_counted():
    _, other = grown_copy()
    other.state_dict()
    optimizer = torch.optim.AdamW([other.lora_A, other.lora_B])
    before = other.lora_A.detach().clone()
    other(X).square().sum().backward()
    optimizer.step()
    moved = (other.lora_A != before).any(1).tolist()
    assert moved == [True] * 5 + [False] and other.get_parameter_count() == 5 * 17


def test_a_state_that_says_less_than_its_tensors_loads_whole(caplog):
    """As a version that did not look saved it, or a program that put tensors into it."""
    source, other = grown_copy()
    state = {**other.state_dict(), "rank": torch.tensor(2)}
    for target in (adapter(), adapter(max_rank=None), adapter(rank=6)):
        log.forget("rank")
        caplog.clear()
        target.load_state_dict(state)
        assert target.rank == 5
        torch.testing.assert_close(target(X), source(X))
        assert "5 from now on instead of 2" in caplog.text
    with pytest.raises(ValueError, match="rank must be at most the module's max_rank = 3, got 5"):
        adapter(max_rank=3).load_state_dict(state)


def test_parameters_alone_say_their_rank():
    source, _ = grown_copy()
    state = {name: value for name, value in source.state_dict().items() if name in ("lora_A", "lora_B")}
    for target in (adapter(), adapter(rank=6)):
        state |= {f"base_layer.{name}": value for name, value in source.base_layer.state_dict().items()}
        target.load_state_dict(state, strict=False)
        assert target.rank == 5 and torch.equal(target(X), source(X))


CONFIGS = {"llama": {"r": 2, "max_rank": 8}, "bert": {"r": 1, "max_rank": 4}}


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("made", ["before growth", "after growth"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_moving_average(name, made, use_buffers, tmp_path):
    family, config = FAMILIES[name], APTConfig(**CONFIGS[name])
    model = get_apt_model(family.model(), config)
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=5e-2)
    batch = family.inputs()

    def average():
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)

    ema = average()
    for step in range(4):
        model(**batch).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            for _, one in adapters(model):
                if one.rank:
                    one.increase_rank(config.max_rank, optimizer=optimizer)
            ema = average() if made == "after growth" else ema
        ema.update_parameters(model)
    ema = ema.module.eval()
    want = outputs(ema, batch)[0]
    assert (want - outputs(model.eval(), batch)[0]).abs().max() > 1e-4  # an average
    small = outputs(shrink(ema), batch)[0]
    torch.testing.assert_close(small, want)
    ema.save_pretrained(tmp_path)
    assert {one.rank for _, one in adapters(ema)} == {one.rank for _, one in adapters(model)}
    loaded = APTModel.from_pretrained(family.model(), tmp_path).eval()
    assert torch.equal(outputs(loaded, batch)[0], want)
    ema.set_block_mask("hidden", (torch.arange(24) > 4).float())
    masked = outputs(ema, batch)[0]
    ema.cut()
    torch.testing.assert_close(outputs(ema, batch)[0], masked, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_without_reserved_storage_torch_refuses_and_the_average_stays_whole(use_buffers):
    model = adapter(max_rank=None)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    ema.update_parameters(model)
    ema.update_parameters(model)
    model.increase_rank(4)
    with pytest.raises(RuntimeError, match="size|shape"):
        ema.update_parameters(model)
    other = ema.module
    assert other.rank == other.get_current_rank() == len(other.lora_A) == other.lora_B.shape[1] == 2
    again = adapter(rank=1, max_rank=None)
    again.load_state_dict(other.state_dict())
    assert torch.equal(again(X), other(X))


def test_a_model_that_a_controller_prunes_and_grows():
    """Tensors of a further grown copy come into the model itself: its next event counts them, and writes over none of them."""
    family = FAMILIES["bert"]
    model = get_apt_model(family.model(torch.float32), APTConfig(r=2, max_rank=8, density=0.5)).train()
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=1e-3)
    controller = Controller(model, optimizer, total_steps=8)
    other = copy.deepcopy(model)
    for _, one in adapters(other):
        if one.rank:
            one.increase_rank(6)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)
    kept = {name: one.lora_A[2:6].detach().clone() for name, one in adapters(model) if one.rank}
    batch = {**family.inputs(), "labels": torch.tensor([0, 1, 2])}
    optimizer.param_groups[0]["lr"] = 0.0
    for _ in range(8):
        model(**batch).loss.backward()
        controller.observe()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    assert all(one.rank >= 6 and torch.equal(one.lora_A[2:6], kept[name]) for name, one in adapters(model) if name in kept)


def test_a_rank_is_read_without_its_device():
    """In forward and in the property: on meta there is nothing to ask."""
    one = adapter().to("meta")
    assert one.rank == one.get_current_rank() == 2
    assert one(X.to("meta")).shape == (5, 7)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_averaged_masks_are_said_when_the_average_is_cut(name, caplog):
    """A moving average of buffers makes fractions of masks, of which nothing is cut."""
    apt = get_apt_model(FAMILIES[name].model(), APTConfig(r=2))
    average = AveragedModel(apt, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    average.update_parameters(apt)
    block = apt.blocks["0.neurons"]
    apt.set_block_mask("0.neurons", (torch.arange(block.count) % 2).float())
    average.update_parameters(apt)
    shrink(apt)
    assert not caplog.records
    shrink(average.module)
    assert "hold fractions, '0.neurons' first" in caplog.text and "use_buffers=False" in caplog.text
