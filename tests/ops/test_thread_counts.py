"""Other numbers of threads add up in other orders: the same bits with as many threads, the accuracy of contract.md with others."""

import pytest
import torch
from problems import DTYPES, Problem, assert_accurate
from torch import nn

from apt_ext import APTAdapter, ops, reference

COUNTS = (1, 2, 3, 5)


@pytest.fixture
def with_threads():
    """A function: what another one gives with so many threads."""
    before = torch.get_num_threads()

    def run(count, function):
        torch.set_num_threads(count)
        return function()

    yield run
    torch.set_num_threads(before)


@pytest.mark.parametrize("masks", ["none", "soft", "hard"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_apt_linear(with_threads, dtype, masks):
    problem = Problem((257,), 130, 140, 9, dtype, masks=masks)
    expected, magnitude = problem.oracle(), problem.magnitudes()
    for count in COUNTS:
        first, second = (with_threads(count, lambda: problem.run(ops.apt_linear)) for _ in range(2))
        for name, value in first.items():
            assert torch.equal(value, second[name]), (name, count)
            assert_accurate(value, expected[name], magnitude[name], dtype, f"{name} with {count} threads")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compacted(with_threads, dtype):
    problem = Problem((257,), 130, 140, 9, dtype, masks="soft")
    adapter = APTAdapter.from_linear(nn.Linear(140, 130, dtype=dtype), 9, problem.scaling)
    with torch.no_grad():
        adapter.base_layer.weight.copy_(problem.weight), adapter.base_layer.bias.copy_(problem.bias)
        adapter.lora_A.copy_(problem.lora_A), adapter.lora_B.copy_(problem.lora_B)
    adapter.set_masks(problem.mask_in, problem.mask_out)
    adapter.compact()
    expected, magnitude = problem.oracle(), problem.magnitudes()

    def results():
        x = problem.x.clone().requires_grad_()
        y = adapter(x)
        dx, dA, dB = torch.autograd.grad(y, (x, adapter.lora_A, adapter.lora_B), problem.grad)
        return {"y": y.detach(), "dx": dx, "dA": dA, "dB": dB}

    for count in COUNTS:
        first, second = (with_threads(count, results) for _ in range(2))
        for name, value in first.items():
            assert torch.equal(value, second[name]), (name, count)
            assert_accurate(value, expected[name], magnitude[name], dtype, f"{name} with {count} threads")


@pytest.mark.parametrize("size", [(300, 140), (1100, 1040)], ids=["one thread", "a block of rows a thread"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge(with_threads, dtype, size):
    problem = Problem((1,), *size, 9, dtype, masks="soft")
    given = (problem.lora_A, problem.lora_B, problem.scaling, problem.mask_in, problem.mask_out)
    doubles = [value.double() if isinstance(value, torch.Tensor) else value for value in given]
    expected = reference.merge_(problem.weight.double().clone(), *doubles)
    magnitude = reference.merge_(problem.weight.abs().double().clone(), *(v.abs() if isinstance(v, torch.Tensor) else v for v in doubles))
    merged = [with_threads(count, lambda: ops.merge_(problem.weight.clone(), *given)) for count in (*COUNTS, *COUNTS)]
    for first, second in zip(merged[: len(COUNTS)], merged[len(COUNTS) :], strict=True):
        assert torch.equal(first, second)
        assert_accurate(first, expected, magnitude, dtype)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_freed_while_another_stream_uses_it(dtype, compacted):
    """What an op allocates belongs to the stream that it runs on: freed by the host, it is not given to another stream meanwhile.

    The side stream is held up, so all of its work is still to come when this stream allocates and writes as much as there is.
    """
    torch.manual_seed(0)
    adapter = APTAdapter.from_linear(nn.Linear(512, 512, device="cuda", dtype=dtype), 8)
    with torch.no_grad():
        adapter.lora_B.normal_()
    adapter.set_masks(*((torch.arange(512, device="cuda") % n != 0).float() * 0.5 for n in (2, 3)))
    if compacted:
        adapter.compact()

    def results(x):
        y = adapter(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, adapter.lora_A, adapter.lora_B))]

    source = torch.randn(1024, 512, device="cuda", dtype=dtype)
    want = results(source.clone().requires_grad_())
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for _ in range(3):
        x = source.clone().requires_grad_()
        x.record_stream(side)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            got = results(x)
        del x  # the side stream has not read it yet
        written = [torch.full((1024, 512), float("nan"), device="cuda", dtype=dtype) for _ in range(40)]
        torch.cuda.current_stream().wait_stream(side)
        for value, other in zip(got, want, strict=True):
            assert torch.equal(value, other)
        del written, got
