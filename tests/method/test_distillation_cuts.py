"""A Distiller of a student that was cut before, that is cut again, or whose weights others write into."""

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES
from students import passed, student, taught
from torch.nn import functional as F
from training import SCHEDULE, all_of, assert_equal, batch_for, built

from apt_ext import Controller, adapter_parameters, adapters
from apt_ext.method import Distiller

WIDTH = 24
FIRST = [i for i in range(WIDTH) if i not in (0, 5, 23)]  # what the first cut leaves of the hidden dimensions
SECOND = [i for i in FIRST if i not in (1, 6, 7, 22)]
NAMES = ["bert", "llama", "gpt2"]


def cut_to(apt, before, after):
    """Leave the dimensions `after` of those that are left, `before`, both in the numbering of the model as
    it was built."""
    apt.set_block_mask("hidden", torch.tensor([float(i in after) for i in before]))
    apt.cut()


def layer_term(apt, teacher, batch, left, teachers):
    """The mean square of the difference in the teacher's dimensions, 0 where the student has none left; Tr
    is the identity."""
    real = batch["attention_mask"].bool()
    ours = apt(**batch, output_hidden_states=True).hidden_states[1:]
    with torch.no_grad():
        theirs = teacher(**batch, output_hidden_states=True).hidden_states[1:]
    total = 0.0
    for h, t in zip(ours, theirs, strict=True):
        at = {dimension: h[..., place] for place, dimension in enumerate(left)}
        wide = torch.stack([at.get(dimension, torch.zeros_like(h[..., 0])) for dimension in teachers], -1)
        total = total + F.mse_loss(wide[real], t[real])
    return total


@pytest.mark.parametrize("name", NAMES)
def test_an_own_self_of_a_model_that_was_cut(name):
    apt, batch, _ = student(name)
    cut_to(apt, range(WIDTH), FIRST)
    distiller = Distiller(apt, "self", logits=0, layers=1)
    assert passed(apt, distiller, batch).item() == 0
    cut_to(apt, FIRST, SECOND)
    expected = layer_term(apt, distiller.teacher, batch, SECOND, FIRST)
    torch.testing.assert_close(passed(apt, distiller, batch), expected, rtol=1e-9, atol=0)
    distiller.refresh()
    assert passed(apt, distiller, batch).item() == 0


@pytest.mark.parametrize("teachers", ["full", "cut"])
@pytest.mark.parametrize("name", NAMES)
def test_a_given_teacher_of_a_model_that_was_cut(name, teachers):
    """One of the size before the cut, or one of the size after it; a second cut follows."""
    apt, batch, _ = student(name)
    full = copy.deepcopy(apt)
    cut_to(apt, range(WIDTH), FIRST)
    teacher, dimensions = (full, range(WIDTH)) if teachers == "full" else (copy.deepcopy(apt), FIRST)
    distiller = Distiller(apt, teacher, logits=0, layers=1)
    torch.testing.assert_close(
        passed(apt, distiller, batch), layer_term(apt, teacher, batch, FIRST, dimensions), rtol=1e-9, atol=0, check_dtype=False
    )
    cut_to(apt, FIRST, SECOND)
    expected = layer_term(apt, teacher, batch, SECOND, dimensions)
    torch.testing.assert_close(passed(apt, distiller, batch), expected, rtol=1e-9, atol=0)
    passed(apt, distiller, batch).backward()
    assert distiller.transform.lora_B.grad.any()


def test_a_teacher_of_a_hidden_size_that_never_was_is_refused():
    apt, _, family = student()
    cut_to(apt, range(WIDTH), [i for i in range(WIDTH) if i not in (0, 1, 2)])
    teacher = family.model(hidden_size=15, num_hidden_layers=4)
    with pytest.raises(ValueError, match="teacher: expected the student's hidden size 21, got 15; layers=0 compares logits alone"):
        Distiller(apt, teacher)
    Distiller(apt, teacher, layers=0)


@pytest.mark.parametrize("closer", [0, 2])
def test_of_two_neighbours_the_closer_one_is_compared(closer):
    """Layer 1 is gone: whichever of the layers beside it is nearer to the teacher's layer 1, be it the
    first or the last looked at."""
    apt, batch, _ = student()
    distiller = Distiller(apt, "self", logits=0, layers=1)
    apt.set_block_mask("1.neurons", torch.zeros(20))
    with torch.no_grad():
        ours, theirs = (list(m(**batch, output_hidden_states=True).hidden_states) for m in (apt, distiller.teacher))
    ours[closer + 1] = theirs[2]
    ours[3 - closer] = theirs[2] + 1.0
    real = batch["attention_mask"].bool()
    expected = sum(F.mse_loss(ours[i + 1][real], theirs[i + 1][real]) for i in (0, 2, 3))
    found = distiller.loss(batch, SimpleNamespace(hidden_states=tuple(ours)))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0, check_dtype=False)


# -- weights that both have ----------------------------------------------------------------------------------


def same(distiller, batch, before):
    return all(torch.equal(a, b) for a, b in zip(taught(distiller, batch), before, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_merging_the_student_for_good_is_noticed(name):
    apt, batch, _ = student(name)
    distiller = Distiller(apt, "self")
    outputs = apt(**batch, **distiller.asks)
    apt.merge_and_unload()
    with pytest.raises(RuntimeError, match="merged for good"):
        taught(distiller, batch)
    with pytest.raises(RuntimeError, match=r"loss: .*weight was written since the last refresh, by merge_and_unload\(\)"):
        distiller.loss(batch, outputs)
    distiller.refresh()
    assert passed(apt, distiller, batch).item() == 0


@pytest.mark.parametrize("name", NAMES)
def test_what_leaves_the_teacher_as_it_was_is_allowed(name):
    apt, batch, _ = student(name)
    distiller = Distiller(apt, "self")
    before = taught(distiller, batch)
    optimizer = torch.optim.AdamW(adapter_parameters(apt), lr=0.1)

    def step():
        passed(apt, distiller, batch, 0.5).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert same(distiller, batch, before)

    step()
    for keep in ("device", "cpu"):
        for _, adapter in adapters(apt):
            adapter.merge_weights(keep)
        for _, adapter in adapters(apt):
            adapter.unmerge_weights()
        step()
    apt.model.load_state_dict(apt.model.state_dict())  # writes what is there
    step()
    for _, adapter in adapters(apt):
        if adapter.rank:
            adapter.increase_rank(3, optimizer=optimizer)
    step()
    apt.compact(dense="cpu")
    step()
    apt.compact(False)
    cut_to(apt, range(WIDTH), FIRST)
    optimizer = torch.optim.AdamW(adapter_parameters(apt), lr=0.1)
    step()
    for _, adapter in adapters(apt):  # into weights of its own, since the cut
        adapter.merge_weights()
        adapter.unmerge_weights()
    step()


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_any_write_into_a_frozen_weight_is_noticed(name):
    apt, batch, _ = student(name)
    distiller = Distiller(apt, "self")
    outputs = apt(**batch, **distiller.asks)
    key, table = next((key, value) for key, value in apt.named_parameters() if "embed" in key or "wte" in key)
    with torch.no_grad():
        table[3, 1] += 1.0
    with pytest.raises(RuntimeError, match=f"loss: {key} was written"):
        distiller.loss(batch, outputs)
    distiller.refresh()
    distiller.loss(batch, outputs)


# -- a run that cuts -----------------------------------------------------------------------------------------

LESS = "^state_dict: expected a state that was cut at least as far as this model, got one that keeps"
CUTTING = {"prune": ["heads", "neurons", "hidden"], "density": 0.35, "round_to": 1, "uniform": False}


def begin(name, **options):
    """(model, optimizer, Controller, Distiller) before the first step: the uncut base."""
    apt, _ = built(FAMILIES[name], **CUTTING)
    distiller = Distiller(apt, "self", **options)
    optimizer = torch.optim.AdamW([*adapter_parameters(apt), *distiller.parameters()], lr=1e-2)
    return apt, optimizer, Controller(apt, optimizer, 16, log=lambda _: None, **SCHEDULE), distiller


def go(parts, name, steps, refreshes=()):
    """The losses of these steps, with a refresh before each of `refreshes`."""
    apt, optimizer, controller, distiller = parts
    losses = []
    for step in steps:
        if step in refreshes:
            distiller.refresh()
        batch = batch_for(FAMILIES[name], step)
        loss = distiller.loss(batch, apt(**batch, **distiller.asks), 0.5)
        loss.backward()
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_events_leave_the_teacher_as_it_was(name):
    parts = begin(name)
    apt, _, _, distiller = parts
    batch = batch_for(FAMILIES[name], 99)
    before = taught(distiller, batch)
    for step in range(16):
        if step == 8:  # between two events
            distiller.refresh()
            before = taught(distiller, batch)
        go(parts, name, [step])
        assert same(distiller, batch, before)
    left = [{block: one.count for block, one in model.blocks.items()} for model in (apt, distiller.teacher)]
    assert left[1] == parts[2].history[0]["kept"] and left[0] == parts[2].history[-1]["kept"] != left[1]


# Before the first event; between events, with a teacher that was cut less than the student, and as much; after the last.
@pytest.mark.parametrize("stop", [3, 7, 8, 9, 11, 15])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_distilled_run_that_stopped_goes_on_bitwise(name, stop):
    refreshes = (2, 8, 11)
    whole = begin(name)
    go(whole, name, range(stop), refreshes)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in whole], file)
    again = begin(name)
    for part, state in zip(again, torch.load(io.BytesIO(file.getvalue()), weights_only=True), strict=True):
        part.load_state_dict(state)
    counts = [{block: one.count for block, one in parts[3].teacher.blocks.items()} for parts in (whole, again)]
    assert counts[0] == counts[1]
    expected = go(whole, name, range(stop, 16), refreshes)
    assert go(again, name, range(stop, 16), refreshes) == expected
    assert_equal(all_of(*again[:3]), all_of(*whole[:3]))
    assert again[2].history == whole[2].history


def test_a_teacher_that_was_cut_less_is_refused_and_changes_nothing():
    """The student was loaded first, and the Distiller made of it then: its teacher has lost what the state has."""
    whole = begin("bert")
    go(whole, "bert", range(9))  # the teacher is the uncut student of before
    again = begin("bert")
    again[0].load_state_dict(whole[0].state_dict())
    late = Distiller(again[0], "self")
    less = whole[3].state_dict()
    batch = batch_for(FAMILIES["bert"], 99)
    before, state = taught(late, batch), late.state_dict()
    with pytest.raises(ValueError, match=LESS):
        late.load_state_dict(less)
    whole[3].refresh()
    go(whole, "bert", range(9, 12))  # a second event
    further = Distiller(whole[0], "self")
    with pytest.raises(ValueError, match=LESS):
        further.load_state_dict(whole[3].state_dict())
    assert same(late, batch, before)
    assert_equal(late.state_dict(), state)
    again[3].load_state_dict(less)  # as the words say: one that was not cut as far
    assert not same(again[3], batch, taught(whole[3], batch))  # that one was refreshed since
    again[3].load_state_dict(whole[3].state_dict())
    assert same(again[3], batch, taught(whole[3], batch))
