"""A Distiller of a student that was cut before, that is cut again, or whose weights others write into."""

import copy
from types import SimpleNamespace

import pytest
import torch
from students import passed, student, taught
from torch.nn import functional as F

from apt_ext import adapter_parameters, adapters
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
