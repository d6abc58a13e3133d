"""merge_all: every weight of a model merged as merge_ would, or none."""

import pytest
import torch
from guard_bands import bits
from problems import Problem, poison

from apt_ext import _C, ops

SHAPES = [(16, 24, 4), (33, 17, 20), (9, 8, 0), (1, 1, 1), (70, 520, 33)]


def problems(device, masks="soft", dtypes=(torch.float64, torch.float32, torch.float16, torch.bfloat16)):
    """One of every dtype and shape, every other weight transposed, as Conv1D's is."""
    found = [Problem((1,), *shape, dtype, device, masks) for dtype in dtypes for shape in SHAPES]
    for problem in found[::2]:
        problem.weight = problem.weight.t().clone(memory_format=torch.contiguous_format).t()
    return found


def arguments(found):
    names = ("weight", "lora_A", "lora_B", "scaling", "mask_in", "mask_out")
    return [[getattr(problem, name) for problem in found] for name in names]


@pytest.mark.parametrize("masks", ["none", "hard", "soft", "zero"])
def test_each_is_merged_as_alone(device, masks):
    found = problems(device, masks)
    alone = [ops.merge_(p.weight.clone(), p.lora_A, p.lora_B, p.scaling, p.mask_in, p.mask_out) for p in found]
    versions = [p.weight._version for p in found]
    assert _C.merge_all(*arguments(found)) == -1
    for problem, expected, version in zip(found, alone, versions, strict=True):
        assert torch.equal(problem.weight, expected) and problem.weight._version > version


@pytest.mark.parametrize("index", [0, 7, 19])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_one_that_would_not_be_finite_is_named_and_none_is_written(device, index, value):
    found = problems(device)
    found[index].weight[-1, -1] = value
    found[index].mask_in = found[index].mask_out = None
    before = [bits(problem.weight) for problem in found]
    assert _C.merge_all(*arguments(found)) == index
    assert all(torch.equal(bits(problem.weight), was) for problem, was in zip(found, before, strict=True))


def test_the_first_of_several_is_named(device):
    found = problems(device, "none")
    for index in (11, 4, 19):
        found[index].lora_A[0, 0] = float("nan")
    assert _C.merge_all(*arguments(found)) == 4


def test_what_is_pruned_may_hold_anything(device):
    found = problems(device, "hard")
    for problem in found:
        problem.weight = poison(poison(problem.weight, problem.mask_in, 1), problem.mask_out, 0)
    assert _C.merge_all(*arguments(found)) == -1
    assert all(bool(problem.weight.isfinite().all()) for problem in found)


def test_sums_at_the_end_of_the_range(device):
    """Nothing is refused that fits, and nothing passes that does not, however rough a first look is."""
    A, B = torch.zeros(1, 16, dtype=torch.float16, device=device), torch.zeros(8, 1, dtype=torch.float16, device=device)
    A[0, 15], B[7, 0] = 100, 100  # adds 10000 to one entry
    fits, beyond, ends = (torch.full((8, 16), value, dtype=torch.float16, device=device) for value in (55000.0, 60000.0, 65504.0))
    assert _C.merge_all([fits, beyond], [A, A], [B, B], [1.0, 1.0], [None, None], [None, None]) == 1
    assert (fits == 55000).all() and (beyond == 60000).all()
    assert _C.merge_all([fits, ends], [A, A], [B, B], [1.0, 0.0], [None, None], [None, None]) == -1
    assert fits[7, 15] == 65024 and (ends == 65504).all()


def test_a_mask_may_bring_a_sum_back_into_the_range(device):
    W = torch.full((4, 8), 65504.0, dtype=torch.float16, device=device)
    A, B = torch.full((1, 8), 200.0, dtype=torch.float16, device=device), torch.full((4, 1), 200.0, dtype=torch.float16, device=device)
    half = torch.full((8,), 0.5, device=device)
    assert _C.merge_all([W], [A], [B], [1.0], [None], [None]) == 0
    assert _C.merge_all([W], [A], [B], [1.0], [half], [None]) == -1 and (W == 52736).all()


def test_nothing_to_merge_is_merged():
    meta, empty = torch.empty(4, 8, device="meta"), torch.empty(0, 8)
    factors = [torch.empty(2, 8, device="meta"), torch.empty(2, 8)], [torch.empty(4, 2, device="meta"), torch.empty(0, 2)]
    assert _C.merge_all([], [], [], [], [], []) == -1
    assert _C.merge_all([meta, empty], *factors, [1.0, 1.0], [None, None], [None, None]) == -1


def test_what_does_not_fit_is_refused_before_the_first_write(device):
    found = problems(device, dtypes=(torch.float32,))
    before = [bits(problem.weight) for problem in found]
    weights, *others = arguments(found)
    with pytest.raises(ValueError, match="expected lists of equal lengths"):
        _C.merge_all(weights[:-1], *others)
    with pytest.raises(ValueError, match="weights must be distinct tensors, got two that share memory"):
        _C.merge_all([*weights[:-1], weights[0][:1, :1]], *[[*one[:-1], one[3]] for one in others])
    with pytest.raises(ValueError, match="lora_A must not share memory with weight"):
        _C.merge_all(weights, [*others[0][:-1], weights[-1][:33]], *others[1:])
    with pytest.raises(ValueError, match="lora_B must have shape"):
        _C.merge_all(weights, others[0], others[1][::-1], *others[2:])
    assert all(torch.equal(bits(problem.weight), was) for problem, was in zip(found, before, strict=True))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_weights_of_several_devices_are_one_merge():
    found = [*problems("cuda"), *problems("cpu")]
    alone = [ops.merge_(p.weight.clone(), p.lora_A, p.lora_B, p.scaling, p.mask_in, p.mask_out) for p in found]
    before = [bits(problem.weight) for problem in found]
    found[-1].lora_B[0, 0] = float("inf")
    found[-1].mask_in = found[-1].mask_out = None
    assert _C.merge_all(*arguments(found)) == len(found) - 1
    assert all(torch.equal(bits(problem.weight), was) for problem, was in zip(found, before, strict=True))
    assert _C.merge_all(*arguments(found[:-1])) == -1
    assert all(torch.equal(problem.weight, expected) for problem, expected in zip(found[:-1], alone, strict=False))
