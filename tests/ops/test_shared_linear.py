"""The products of several layers over one x: each against its float64 oracle, and to the bit what the layer alone gives."""

from functools import partial

import pytest
import torch
from problems import Problem, assert_accurate

from apt_ext import _C, ops, reference

RANKS = [(8, 8, 8), (8, 4, 16), (0, 8, 8), (16, 16), (16, 16, 16), (3, 1, 5), (8, 8), (20, 8, 8), (0, 0)]
# tokens, K, and the N of three layers
SHAPES = {"odd": ((18,), 131, (37, 24, 24)), "spans": ((2, 75), 136, (72, 40, 8)), "wide": ((20,), 1032, (1096, 64, 64))}
SHAPES["rows of 32"] = ((7000,), 4096, (72, 8, 8))
SIXTEEN = (torch.bfloat16, torch.float16)
DROPOUTS = [(0.5, 0.5, 0.5), (0.3, 0.0, 0.7), (0.0, 0.05, 0.05)]


class Layers:
    """Problems that share x."""

    def __init__(
        self, shape, K, widths, ranks, dtype, device, masks="none", bias=True, scalings=(1.7,) * 3, factor_dtype=None, dropouts=(0.0,) * 3
    ):
        self.problems = [
            Problem(shape, N, K, R, dtype, device, masks, bias=bias, scaling=scaling, seed=seed, factor_dtype=factor_dtype)
            for seed, (N, R, scaling) in enumerate(zip(widths, ranks, scalings, strict=False))
        ]
        for problem in self.problems:
            problem.x, problem.mask_in = self.problems[0].x, None
        self.dropouts = dropouts[: len(self.problems)]
        self.rngs = [torch.tensor([3 + i, 1 << 40], device=device) if p else None for i, p in enumerate(self.dropouts)]

    def run(self, always=True, called=None):
        """Of each layer {"y", "dA", "dB", "db"}, and dx; `called`: which of them are."""
        called = range(len(self.problems)) if called is None else called
        x = self.problems[0].x.detach().clone().requires_grad_()
        layers = []
        for one, p in zip(self.problems, self.dropouts, strict=True):
            A, B = (factor.detach().clone().requires_grad_() for factor in (one.lora_A, one.lora_B))
            bias = None if one.bias is None else one.bias.detach().clone().requires_grad_()
            layers.append((one.weight, bias, A, B, one.mask_out, one.scaling, p))
        drawn = iter([rng for rng in self.rngs if rng is not None])
        outputs = _C.shared_linear(x, layers, always, lambda _: next(drawn))
        if outputs is None:
            return None
        y = {i: outputs.take(i, x, layers[i]) for i in called}
        torch.autograd.backward(list(y.values()), [self.problems[i].grad for i in called])
        found = [{"y": y[i].detach(), "dA": layers[i][2].grad, "dB": layers[i][3].grad, "db": layers[i][1]} for i in called]
        for one in found:
            one["db"] = None if one["db"] is None else one["db"].grad
        return found, x.grad

    def alone(self, function=ops.apt_linear, run=Problem.run, where=None):
        """What `run` of a problem gives with a function of each layer, which draws on the device `where`, or on its own."""
        rngs = [rng if rng is None or where is None else rng.to(where) for rng in self.rngs]
        dropped = zip(self.problems, self.dropouts, rngs, strict=True)
        return [run(problem, partial(function, dropout=p, rng=rng)) for problem, p, rng in dropped]

    def check(self, found):
        each, dx = found
        oracles, magnitudes = (self.alone(reference.apt_linear, run, "cpu") for run in (Problem.oracle, Problem.magnitudes))
        dtype = self.problems[0].dtype
        for got, problem, expected, magnitude, alone in zip(each, self.problems, oracles, magnitudes, self.alone(), strict=True):
            for name, value in got.items():
                if value is not None:
                    assert_accurate(value, expected[name], magnitude[name], problem.dtype, name)
                    assert torch.equal(value, alone[name]), name
        assert_accurate(dx, sum(one["dx"] for one in oracles), sum(one["dx"] for one in magnitudes), dtype, "dx")


@pytest.mark.parametrize("shape", ["odd", "spans", "wide"])
@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("masks", ["none", "soft"])
def test_against_the_oracle(device, dtype, ranks, shape, masks):
    layers = Layers(*SHAPES[shape], ranks, dtype, device, masks)
    layers.check(layers.run())


@pytest.mark.parametrize("ranks", [(8, 8, 8), (8, 8)], ids=str)
@pytest.mark.parametrize("dropouts", [(0.0,) * 3, DROPOUTS[0]], ids=["kept", "dropped"])
def test_blocks_of_32_rows(device, ranks, dropouts):
    if device == "cpu":
        pytest.skip("the CPU has no blocks")
    layers = Layers(*SHAPES["rows of 32"], ranks, torch.bfloat16, device, dropouts=dropouts)
    layers.check(layers.run(always=False))


@pytest.mark.parametrize("scalings", [(2.0, 1.0, 1.0), (0.5, 0.0, 3.0)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_scalings_of_their_own(device, dtype, scalings, bias):
    layers = Layers(*SHAPES["spans"], (8, 4, 16), dtype, device, "hard", bias, scalings)
    layers.check(layers.run())


@pytest.mark.parametrize("ranks", [(8, 8, 8), (8, 4, 16), (16, 16, 16), (3, 1, 5), (8, 8), (0, 8, 8), (20, 8, 8)], ids=str)
@pytest.mark.parametrize("dropouts", DROPOUTS, ids=str)
@pytest.mark.parametrize("shape", ["odd", "spans", "wide"])
def test_each_drops_its_own(device, dtype, ranks, dropouts, shape):
    layers = Layers(*SHAPES[shape], ranks, dtype, device, "soft" if shape == "spans" else "none", dropouts=dropouts)
    layers.check(layers.run())


def test_an_rng_is_drawn_for_who_drops_alone(device):
    layers = Layers(*SHAPES["spans"], (8, 4, 16), torch.float32, device, dropouts=(0.3, 0.0, 0.7))
    given = [(one.weight, None, one.lora_A, one.lora_B, None, 1.0, p) for one, p in zip(layers.problems, layers.dropouts, strict=True)]
    seen = []

    def draw(x):
        seen.append(x)
        return torch.tensor([len(seen), 2], device=device)

    x = layers.problems[0].x
    assert _C.shared_linear(x, given, True, draw) is not None
    assert len(seen) == 2 and all(one is x for one in seen)
    assert _C.shared_linear(x, given, False, draw) is None and len(seen) == 2  # nothing is drawn where nothing is shared
    with pytest.raises(ZeroDivisionError):
        _C.shared_linear(x, given, True, lambda x: 1 / 0)


def test_float32_factors(device):
    for dtype in SIXTEEN:
        layers = Layers(*SHAPES["spans"], (8, 4, 16), dtype, device, factor_dtype=torch.float32)
        found = layers.run()
        assert found[0][0]["dA"].dtype == torch.float32
        layers.check(found)


@pytest.mark.parametrize("called", [(0,), (2,), (0, 2), (2, 1)], ids=str)
def test_some_are_called(device, dtype, called):
    """dx is to the bit that of the called ones together, of one alone that of its own op."""
    layers = Layers(*SHAPES["spans"], (8, 4, 16), dtype, device)
    found, dx = layers.run(called=called)
    alone = layers.alone()
    if len(called) == 1:
        assert torch.equal(dx, alone[called[0]]["dx"])
    magnitude = sum(layers.problems[i].magnitudes()["dx"] for i in called)
    assert_accurate(dx, sum(layers.problems[i].oracle()["dx"] for i in called), magnitude, dtype, "dx")
    for i, got in zip(called, found, strict=True):
        assert all(torch.equal(value, alone[i][name]) for name, value in got.items())


def test_the_same_bits_twice(device, dtype):
    layers = Layers(*SHAPES["spans"], (8, 4, 16), dtype, device, "soft")
    first, second = layers.run(), layers.run()
    assert torch.equal(first[1], second[1])
    assert all(torch.equal(a[name], b[name]) for a, b in zip(first[0], second[0], strict=True) for name in a)


def test_a_pruned_lane_hides_what_it_holds(device, dtype):
    layers = Layers(*SHAPES["spans"], (8, 4, 16), dtype, device, "hard")
    clean = layers.run()
    for i, problem in enumerate(layers.problems):
        poisoned = problem.poisoned()
        poisoned.x = problem.x
        layers.problems[i] = poisoned
    for ours, expected in zip(layers.run()[0], clean[0], strict=True):
        assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_what_is_worth_it(device, dtype):
    """Where our own passes run: elsewhere each layer is computed alone, unless a test asks."""
    layers = Layers(*SHAPES["spans"], (8, 4, 16), dtype, device)
    assert (layers.run(always=False) is not None) == (device == "cuda" and dtype in SIXTEEN)
    assert Layers(*SHAPES["odd"], (8, 4, 16), dtype, device).run(always=False) is None


def test_half_range(device):
    """A low-rank product may leave float16's range, of one layer and not of the next."""
    dtype = torch.float16
    layers = Layers((70,), 64, (72, 40, 8), (8, 4, 16), dtype, device)
    for problem, by in zip(layers.problems, (2.0**9, 1.0, 2.0**-3), strict=True):
        problem.lora_A, problem.lora_B, problem.scaling = problem.lora_A * by, problem.lora_B / by, 1.0
        problem.grad = problem.grad * 2.0**-4
    found, dx = layers.run()
    assert dx.isfinite().all()
    layers.check((found, dx))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_captured():
    """Nothing asks the device, and a replay reads what is there then."""
    layers = Layers(*SHAPES["spans"], (8, 4, 16), torch.bfloat16, "cuda", "soft")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layers.run(always=False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found, dx = layers.run(always=False)
    layers.problems[0].x.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    expected = layers.run(always=False)
    assert torch.equal(dx, expected[1])
    assert all(torch.equal(ours[name], theirs[name]) for ours, theirs in zip(found, expected[0], strict=True) for name in ours)
