"""Over fifty events that cut memory only falls: nothing old is held; hooks, tensors and state stay as many."""

import gc
import logging
import re

import pytest
import torch
from families import FAMILIES
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.data import DataLoader
from training import batch_for, built

from apt_ext import Controller, adapter_parameters, adapters
from apt_ext.method import Distiller

FAMILY, EVENTS, STEPS = FAMILIES["bert"], 50, 104
CONFIG = {"prune": ["heads", "neurons", "hidden"], "density": 0.12, "round_to": 1, "uniform": False}
SCHEDULE = {"schedule": {"start": 2, "end": 102, "events": EVENTS}}


@pytest.fixture(autouse=True)
def _looks_at_new_objects_alone():
    """What was there before a test is of others, and would be looked through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def living():
    """(bytes, number) of all tensors that are alive, gradients among them; a storage counts once."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    found += [tensor.grad for tensor in found if tensor.is_leaf and tensor.grad is not None]
    return bytes_of(found), len({id(tensor) for tensor in found})


def storages(tensors):
    """{address: bytes}"""
    found = [tensor.untyped_storage() for tensor in tensors]
    return {one.data_ptr(): one.nbytes() for one in found if one.nbytes()}


def bytes_of(tensors):
    return sum(storages(tensors).values())


def tensors_of(model):
    return [*model.parameters(), *model.buffers()]


def hooks_on(model, optimizer):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    on = [len(getattr(module, kind)) for module in model.modules() for kind in kinds]
    on += [len(parameter._backward_hooks or ()) for parameter in model.parameters()]
    return on, len(optimizer._optimizer_step_post_hooks)


def begin(sizes=None, distiller=None, **config):
    apt, _ = built(FAMILY, sizes={"intermediate_size": 48, **(sizes or {})}, **{**CONFIG, **config})
    teacher = None if distiller is None else Distiller(apt, "self", **distiller)
    transform = [] if teacher is None else teacher.parameters()
    optimizer = torch.optim.AdamW([*adapter_parameters(apt), *transform], lr=1e-3)
    controller = Controller(apt, optimizer, STEPS, growth=1.0, log=lambda _: None, **SCHEDULE)
    return apt, optimizer, controller, teacher


def micro_batch(seed, apt, teacher):
    batch = batch_for(FAMILY, seed)
    if teacher is None:
        apt(**batch).loss.backward()
    else:
        teacher.loss(batch, apt(**batch, **teacher.asks), 0.5).backward()


def one_step(parts, seed, accumulate=1):
    apt, optimizer, controller, teacher = parts
    for micro in range(accumulate):
        micro_batch(accumulate * seed + micro, apt, teacher)
    controller.observe()
    optimizer.step()
    optimizer.zero_grad()
    controller.step()


class Batches(torch.utils.data.Dataset):
    def __len__(self):
        return 3 * STEPS

    def __getitem__(self, index):
        row = index % 3
        return {name: value[row] for name, value in batch_for(FAMILY, index // 3).items()}


def loaded(parts):
    """Steps whose batches a DataLoader brings."""
    apt, optimizer, controller, _ = parts
    for batch in DataLoader(Batches(), batch_size=3):
        outputs = apt(**batch)
        outputs.loss.backward()
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
        del outputs, batch
        yield


LOOPS = {
    "plain": lambda parts: (one_step(parts, seed) for seed in range(STEPS)),
    "a loader": loaded,
    "accumulation": lambda parts: (one_step(parts, seed, 3) for seed in range(STEPS)),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_memory_only_falls(loop):
    parts = begin()
    apt, optimizer, controller, _ = parts
    sizes, numbers, listened, keys = [], [], [], []
    for _ in LOOPS[loop](parts):
        if controller.now not in controller.steps.events:
            continue
        size, number = living()
        sizes.append(size)
        numbers.append(number)
        listened.append(hooks_on(apt, optimizer))
        keys.append([sorted(state) for state in optimizer.state.values()])
    assert len(sizes) == EVENTS and len(controller.history) == EVENTS and controller.done
    kept = [event["kept"] for event in controller.history]
    assert sum(a != b for a, b in zip(kept[:-1], kept[1:], strict=True)) > 25  # most events cut
    assert all(after <= before for before, after in zip(sizes[:-1], sizes[1:], strict=True)), sizes
    assert sizes[-1] < 0.6 * sizes[0]
    assert max(numbers[1:]) <= numbers[1], numbers  # from the first cut on the model knows its origin
    assert all(keys[0] == other for other in keys)
    assert all(listened[0] == other for other in listened[:-1])  # the last event takes the Controller's away
    assert len(optimizer.state) == len(adapter_parameters(apt))


def weak(tensors):
    return [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]


def living_ones(references):
    return sum(not one.expired() for one in references)


def test_what_a_cut_replaces_is_freed_at_once():
    """Of weights, factors and the optimizer's state; at each event, without a search for cycles."""
    parts = begin()
    apt, optimizer, controller, _ = parts
    cut, counted = 0, 0
    gc.disable()
    try:
        for seed in range(STEPS):
            before = []
            for parameter in apt.parameters():
                moments = [value for value in optimizer.state.get(parameter, {}).values() if value.dim()]
                before.append((parameter, parameter.shape, weak([parameter, *moments])))
                del moments
            one_step(parts, seed)
            for parameter, shape, old in before:
                if parameter.shape != shape:
                    assert living_ones(old) == 0, seed
                    cut, counted = cut + 1, counted + len(old)
    finally:
        gc.enable()
    assert cut > 200 and counted > 1.5 * cut  # some have moments


def test_an_own_self_holds_the_old_weights_until_it_is_refreshed(caplog):
    wide = {"intermediate_size": 4096}
    parts = begin(wide, {"logits": 1.0, "layers": 0.9}, prune=["neurons"], density=0.6, round_to=64)
    apt, optimizer, controller, teacher = parts
    wide = [p for p in apt.parameters() if p.dim() == 2 and {*p.shape} == {24, 4096}]
    assert len(wide) == 4
    first = weak(wide)

    def alone():
        students = storages(tensors_of(apt))
        teachers = storages(tensors_of(teacher.teacher))
        return sum(size for address, size in teachers.items() if address not in students)

    def told():
        said = r"keeps the weights of before: ([\d.]+) MiB"
        return [float(number) for line in caplog.messages for number in re.findall(said, line)]

    assert teacher.memory == alone() > 0 and living_ones(first) == 4
    copies, sizes = teacher.memory, []
    with caplog.at_level(logging.INFO, "apt_ext"):
        for seed in range(52):
            one_step(parts, seed)
            if controller.now in controller.steps.events:
                sizes.append(living()[0])
            assert teacher.memory == alone()
    assert living_ones(first) == 4  # the teacher alone has them now
    held = 4 * 4096 * 24 * 8
    assert teacher.memory >= copies + held
    assert all(after <= before for before, after in zip(sizes[1:-1], sizes[2:], strict=True)), sizes
    assert told()[-1] == pytest.approx(teacher.memory / 2**20, abs=0.051)
    kept = [str(event["kept"]) for event in controller.history if event["step"] < 52]
    assert len(told()) == len({*kept} - {str(apt.blocks.full)}) > 3  # once after each cut
    teacher.refresh()
    assert living_ones(first) == 0
    assert teacher.memory == alone() < copies
    assert living()[0] <= sizes[-1] - held + (copies - teacher.memory)


def test_a_refused_event_holds_nothing():
    """An event that is refused again and again leaves no half-made cut behind."""
    parts = begin()
    apt, optimizer, controller, _ = parts
    found = []
    for seed in range(STEPS):
        micro_batch(seed, apt, None)
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        if seed < 20 or seed + 1 not in controller.steps.events:
            controller.step()
            continue
        for _, adapter in adapters(apt):
            adapter.merge_weights()
        while controller.now == seed and len(found) < 5:
            try:
                controller.step()
            except RuntimeError as error:
                assert "is merged under its present masks" in str(error)
                found.append(living())
        for _, adapter in adapters(apt):
            adapter.unmerge_weights()
        if found:
            break
    assert len(found) == 5 and len(set(found)) == 1
    controller.step()
    assert controller.now == seed + 1 and controller.history[-1]["kept"] != controller.history[-2]["kept"]
    assert living()[0] <= found[0][0]
