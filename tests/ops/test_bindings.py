"""The op table, its two doors, and torch's own checks of every op in it."""

import ast
from pathlib import Path

import pytest
import torch
from problems import Problem

import apt_ext
from apt_ext import _C

LINEAR = ["apt_linear", "apt_linear_backward", "apt_linear_forward", "dropout_mask", "mask_grads_", "merge_"]
COMPACT = ["compact_linear", "compact_linear_backward", "compact_linear_forward", "pack_kept_"]  # test_compact.py has their opcheck
OPS = sorted(LINEAR + COMPACT)


def test_both_doors_and_the_stub_list_the_same_names():
    registered = sorted(n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("apt_ext::"))
    assert registered == OPS
    others = [
        "all_ones",
        "build_info",
        "channel_sums",
        "check_gpu",
        "launch_plan",
        "merge_all",
        "next_moment",
        "node_moment",
        "same_masks",
        "shared_linear",
        "sharing",
    ]
    assert sorted(n for n in dir(_C) if not n.startswith("__")) == sorted([*OPS, *others, "LinearPlan", "Listener", "SharedOutputs"])
    stub = ast.parse(Path(apt_ext.__file__).with_name("_C.pyi").read_text())
    assert sorted(f.name for f in stub.body if isinstance(f, ast.FunctionDef)) == sorted([*OPS, *others])
    for function in stub.body:
        if isinstance(function, ast.FunctionDef) and function.name not in others:
            schema = getattr(torch.ops.apt_ext, function.name).default._schema
            assert [a.arg for a in function.args.args] == [a.name for a in schema.arguments]


def _samples(device):
    for masks in ("none", "soft"):
        p = Problem((2, 3), 6, 5, 2, torch.float32, device, masks)
        both = (p.mask_in, p.mask_out)
        forward = (p.x, p.weight, p.bias, p.lora_A, p.lora_B, *both, 1.5)
        leaves = [t if t is p.weight else t.clone().requires_grad_() for t in forward[:5]]
        yield "apt_linear", (*leaves, *both, 1.5)
        yield "apt_linear", forward
        yield "apt_linear_forward", forward
        t = torch.randn(2, 3, 2, device=device)
        rng = torch.tensor([5, 7], device=device)
        yield "apt_linear", (*leaves, *both, 1.5, 0.4, rng)
        yield "apt_linear_forward", (*forward, 0.4, rng)
        backward = (p.lora_A, p.lora_B, t, *both, 1.5)
        yield "apt_linear_backward", (p.grad, p.x, p.weight, *backward, 0.0, None, [True, True, True, True])
        yield "apt_linear_backward", (p.grad, p.x, None, *backward, 0.4, rng, [False, True, False, True])
        yield "merge_", (p.weight.clone(), p.lora_A, p.lora_B, 1.5, *both, True)
        yield "merge_", (p.weight.clone(), p.lora_A, p.lora_B, 1.5, *both, False)
    yield "dropout_mask", ([2, 3, 5], 0.4, torch.tensor([5, 7], device=device))
    yield (
        "mask_grads_",
        (
            [torch.randn(4, 6, device=device), torch.randn(3, 4, device=device)],
            [torch.rand(6, device=device), torch.rand(3, device=device)],
            [1, 0],
        ),
    )


def test_every_op_has_a_sample():
    assert {name for name, _ in _samples("cpu")} == set(LINEAR)


class Named(torch.Tensor):
    """A subclass that torch's own functions keep."""


class Watch(torch.overrides.TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


def test_the_fast_door_is_only_for_plain_tensors():
    """Subclasses, function modes and Python tracers see the same call as through torch.ops."""
    p = Problem((3,), 6, 5, 2, torch.float32, "cpu", "soft")
    others = (p.weight, p.bias, p.lora_A, p.lora_B, p.mask_in, p.mask_out, 1.5)
    expected, op = apt_ext.ops.apt_linear(p.x, *others), torch.ops.apt_ext.apt_linear.default
    assert type(expected) is torch.Tensor
    kept = apt_ext.ops.apt_linear(p.x.as_subclass(Named), *others)
    assert type(kept) is Named and torch.equal(kept.as_subclass(torch.Tensor), expected)
    with Watch() as watch:
        assert torch.equal(apt_ext.ops.apt_linear(p.x, *others), expected)
    assert op in watch.seen
    traced = torch.fx.symbolic_trace(lambda x: apt_ext.ops.apt_linear(x, *others))
    assert op in [node.target for node in traced.graph.nodes] and torch.equal(traced(p.x), expected)


@pytest.mark.parametrize("index", range(20))
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck itself, torch 2.15
def test_opcheck(device, index):
    samples = list(_samples(device))
    assert len(samples) == 20
    name, args = samples[index]
    result = torch.library.opcheck(getattr(torch.ops.apt_ext, name).default, args)
    assert set(result.values()) == {"SUCCESS"}, result


def test_build_info():
    info = apt_ext.ops.build_info()
    assert set(info) == {"version", "cuda", "cuda_archs", "torch_version", "cuda_version", "cpu_capability"}
    assert info["version"] == apt_ext.__version__ and torch.__version__.startswith(info["torch_version"])
    assert info["cuda"] is bool(info["cuda_archs"]) is (info["cuda_version"] is not None)


def test_another_torch_is_refused_before_the_library_is_loaded(tmp_path):
    import shutil
    import subprocess
    import sys

    shutil.copytree(Path(apt_ext.__file__).parent, tmp_path / "apt_ext")
    (tmp_path / "apt_ext" / "_built_for.py").write_text('TORCH = "1.0"\n')
    done = subprocess.run([sys.executable, "-c", "import apt_ext"], cwd=tmp_path, capture_output=True, text=True)
    assert "ImportError: apt_ext was built for torch 1.0 and found torch" in done.stderr


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (5, 7), (1030, 33), (3000, 100), (40_000, 264), (70, 1536), (4, 0)])
def test_channel_sums(device, dtype, shape):
    if device == "cpu":
        shape = (shape[0], shape[1] if shape[0] < 40_000 else 24)  # long sums of fewer channels; wide rows are in the other shapes
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    strided = torch.randn(shape[0], 2 * shape[1], device=device).to(dtype)[:, ::2]
    padded = torch.randn(shape[0], shape[1] + 8, device=device).to(dtype)[:, : shape[1]]  # rows apart
    tokens = torch.rand(shape[0], device=device) > 0.4
    for values in (strided, padded, padded.contiguous()):
        for counted in (None, tokens, tokens.repeat_interleave(2)[::2]):
            kept = values.double() if counted is None else values.double()[counted]
            for signed in (False, True):
                got = _C.channel_sums(values, counted, signed)
                assert got.dtype == wide and got.shape == (shape[1],)
                bound = 2e-6 * kept.abs().sum(0) + 1e-12
                assert bool(((got.double() - (kept if signed else kept.abs()).sum(0)).abs() <= bound).all())
                assert torch.equal(got, _C.channel_sums(values, counted, signed))
        poisoned = values.masked_fill(~tokens[:, None], torch.nan)
        assert torch.equal(_C.channel_sums(poisoned, tokens, False), _C.channel_sums(values, tokens, False))
    nested = strided.unflatten(0, (1, 1, -1)) if shape[0] else strided
    assert torch.equal(_C.channel_sums(nested, tokens.view(nested.shape[:-1]), False), _C.channel_sums(strided, tokens, False))


def test_channel_sums_refuses_in_words():
    values = torch.randn(3, 2)
    for arguments, kind, words in (
        ((values[0], None), ValueError, r"values must be a dense tensor \[\.\.\., channels\] on the CPU or a GPU"),
        ((values.to("meta"), None), ValueError, "values must be a dense tensor .* on meta"),
        ((values.int(), None), TypeError, "values must be float64, float32, float16 or bfloat16, got Int"),
        ((values, torch.ones(2, dtype=torch.bool)), ValueError, r"tokens must be bool \[3\] on cpu"),
        ((values, torch.ones(3)), ValueError, r"tokens must be bool \[3\] on cpu"),
    ):
        with pytest.raises(kind, match=words):
            _C.channel_sums(*arguments, False)
