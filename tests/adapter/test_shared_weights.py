"""Adapters that read one memory: where one of them merges, the others refuse to compute instead of computing something else."""

import copy
import gc

import pytest
import torch
from families import FAMILIES, adapted, outputs
from small_adapter import make
from torch import nn

from apt_ext import APTAdapter, APTConfig, adapters, get_apt_model, shrink
from apt_ext.adapter import shared_memory
from apt_ext.adapter.shared_memory import indexed
from apt_ext.method.distillation import frozen_copy

MERGED = pytest.raises(RuntimeError, match=r"forward of .*: its base layer carries the merge of another adapter; call unmerge_weights\(\)")
FOR_GOOD = pytest.raises(RuntimeError, match=r"forward of .*merged for good \(merge_and_unload\); load the base weight again")


def pair(kind, device="cpu"):
    """Two adapters over one memory."""
    first = make(device)
    if kind == "one linear":
        linear = first.base_layer
    else:
        linear = nn.Linear(10, 7, device=device, dtype=torch.float64)
        shared = first.base_layer
        if kind == "one Parameter":
            linear.weight = shared.weight
        elif kind == "one storage":
            linear.weight, linear.bias = (nn.Parameter(value.detach()) for value in (shared.weight, shared.bias))
        elif kind == "one bias":
            linear.bias = shared.bias
        else:
            memory = torch.randn(130, device=device, dtype=torch.float64)
            shared.weight, linear.weight = (nn.Parameter(memory[start : start + 70].view(7, 10), requires_grad=False) for start in (0, 60))
    second = APTAdapter.from_linear(linear, 2)
    with torch.no_grad():
        second.lora_B.normal_()
    first.set_masks(torch.rand(10, device=device), torch.rand(7, device=device))
    return first.eval(), second.eval()


KINDS = ("one linear", "one Parameter", "one storage", "one bias", "overlapping views")


@pytest.mark.parametrize("kind", KINDS)
def test_the_other_refuses_until_the_merge_is_undone(device, kind):
    first, second = pair(kind, device)
    alone = make(device)
    x = torch.randn(3, 10, dtype=torch.float64, device=device)
    want = second(x)
    for keep in ("device", "cpu"):
        first.merge_weights(keep)
        with MERGED:
            second(x)
        second.set_disabled(True)
        with MERGED:
            second(x)
        second.set_disabled(False)
        with MERGED:
            second(x, mask_in=torch.ones(10, device=device))
        first(x), alone(x)  # nobody else
        first.unmerge_weights()
        assert torch.equal(second(x), want)
    second.merge_weights()
    with MERGED:
        first(x)
    torch.testing.assert_close(second(x), want)


@pytest.mark.parametrize("kind", KINDS)
def test_look_ups_within_an_index_find_the_same(kind):
    with indexed():
        first, second = pair(kind)  # made within it
        others = [make() for _ in range(3)]
        x = torch.randn(3, 10, dtype=torch.float64)
        want = second(x)
        with indexed():
            first.merge_weights()
        with MERGED:
            second(x)
        with pytest.raises(RuntimeError, match="already carries the merge of another adapter"):
            second.merge_weights()
        for other in others:
            other(x), other.merge_weights()
        first.unmerge_weights()
        assert torch.equal(second(x), want)
    second.merge_weights()
    with MERGED:
        first(x)


def looked_at(count, monkeypatch):
    """How often merging a model of `count` linears asks where a tensor lies."""
    calls = []
    where = shared_memory._memory
    model = get_apt_model(nn.Sequential(*[nn.Linear(4, 4) for _ in range(count)]), APTConfig(r=1))
    with monkeypatch.context() as patched:
        patched.setattr(shared_memory, "_memory", lambda tensor: calls.append(None) or where(tensor))
        model.merge_and_unload()
    return len(calls)


def test_merging_a_model_asks_once_for_each_adapter_more(monkeypatch):
    gc.collect()  # adapters of other tests
    one, two, four = (looked_at(count, monkeypatch) for count in (20, 40, 80))
    assert four - two <= 2.5 * (two - one)


def test_compacted_ones_refuse_as_well():
    first, second = pair("one linear")
    second.set_masks((torch.arange(10) % 2).float())
    second.compact()
    x = torch.randn(3, 10, dtype=torch.float64)
    want = second(x)
    first.merge_weights()
    with MERGED:
        second(x)
    first.unmerge_weights()
    torch.testing.assert_close(second(x), want)


def test_compiled_before_the_merge():
    first, second = pair("one linear")
    x = torch.randn(3, 10, dtype=torch.float64)
    compiled = torch.compile(second, backend="eager")
    want = compiled(x)
    first.merge_weights()
    with MERGED:
        compiled(x)
    first.unmerge_weights()
    torch.testing.assert_close(compiled(x), want)


def test_copies_go_on_as_what_they_are():
    """A copy of the whole is a pair of its own; a copy of the refusing one holds merged values, whatever becomes of the first."""
    both = nn.ModuleList(pair("one linear"))
    x = torch.randn(3, 10, dtype=torch.float64)
    want = both[1](x)
    both[0].merge_weights()
    other, lone = copy.deepcopy(both), copy.deepcopy(both[1])
    narrow = copy.deepcopy(both[1]).to(torch.float32)
    both[0].unmerge_weights()
    assert torch.equal(both[1](x), want)
    for refused in (other[1], lone):
        with MERGED:
            refused(x)
    with MERGED:
        narrow(x.float())
    other[0].unmerge_weights()
    assert torch.equal(other[1](x), want)


def test_a_merged_one_whose_merge_another_undid():
    """Copies in one memory, as a self-teacher's: both are merged, and only one can take it back."""
    first = make().eval()
    first.merge_weights()
    memo = {id(parameter): nn.Parameter(parameter.detach(), requires_grad=False) for parameter in first.base_layer.parameters()}
    second = copy.deepcopy(first, memo)
    x = torch.randn(3, 10, dtype=torch.float64)
    assert torch.equal(second(x), first(x))
    first.unmerge_weights()
    with pytest.raises(RuntimeError, match=r"its merge was undone in memory that it shares"):
        second(x)
    second.unmerge_weights()
    assert torch.equal(second(x), first(x))


def test_no_adapter_is_put_on_a_merged_linear():
    adapter = make()
    adapter.merge_weights()
    with pytest.raises(RuntimeError, match="from_linear: this linear already carries the merge of another adapter"):
        APTAdapter.from_linear(adapter.base_layer, 1)
    adapter.unmerge_weights()
    APTAdapter.from_linear(adapter.base_layer, 1)


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "gpt2"])
def test_a_self_teacher_of_a_student_that_is_merged_for_good(name):
    family = FAMILIES[name]
    student = adapted(family)
    student.set_block_mask(
        "0.neurons" if "0.neurons" in student.blocks else "encoder.0.neurons",
        torch.arange(20).clamp(max=1).float() if name != "gpt2" else torch.rand(96),
    )
    teacher, batch = frozen_copy(student), family.inputs()
    want = outputs(teacher, batch)[0]
    _, adapter = next(adapters(student))
    adapter.merge_weights()
    with pytest.raises(RuntimeError, match=rf"forward of {adapter.label}: its base layer carries the merge of {adapter.label}"):
        outputs(teacher, batch)
    adapter.unmerge_weights()
    assert torch.equal(outputs(teacher, batch)[0], want)
    shrink(student)  # works on a copy
    assert torch.equal(outputs(teacher, batch)[0], want)
    state = {key: value.clone() for key, value in teacher.state_dict().items()}
    merged = student.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, want)
    with FOR_GOOD:
        outputs(teacher, batch)
    with torch.no_grad(), teacher.disable_adapter(), FOR_GOOD:
        teacher(**batch)
    teacher.load_state_dict(state)
    assert torch.equal(outputs(teacher, batch)[0], want)


def test_a_merge_and_unload_that_fails_leaves_the_teacher_right():
    student = adapted(FAMILIES["bert"], dtype=torch.float16)
    teacher, batch = frozen_copy(student), FAMILIES["bert"].inputs()
    want = outputs(teacher, batch)[0]
    *_, (_, last) = adapters(student)
    with torch.no_grad():
        last.base_layer.weight.fill_(6e4)
        found = [one for _, one in adapters(student) if one.rank][-1]
        found.lora_A.fill_(6e4), found.lora_B.fill_(6e4)
    with pytest.raises(RuntimeError, match="would not be finite"):
        student.merge_and_unload()
    if last is not found:
        assert want.shape == outputs(teacher, batch)[0].shape
    assert not any(one.merge.foreign for _, one in adapters(teacher))


def test_a_weight_that_another_adapter_reads_is_not_put_away():
    first, second = pair("one linear")
    with pytest.raises(RuntimeError, match="cannot offload a weight that another adapter reads"):
        first.compact(dense="cpu")
    assert not first.compacted
    first.compact()
    second(torch.randn(3, 10, dtype=torch.float64))


def test_a_model_whose_tied_weights_stay_compacts():
    family = FAMILIES["llama-tied"]
    model = get_apt_model(family.model(), APTConfig(r=2))
    model.set_block_mask("0.neurons", (torch.arange(20) > 4).float())
    want = outputs(model.eval(), family.inputs())[0]
    model.compact(dense="cpu")
    torch.testing.assert_close(outputs(model, family.inputs())[0], want)
