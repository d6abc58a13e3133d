"""What an op must refuse, generated for every tensor of every op: layouts, dtypes, devices, shapes; nothing has then changed."""

import functools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import Problem

from apt_ext import ops, reference
from apt_ext.adapter.packed_weight import PackedWeight

N, K, R = 6, 5, 3


def operands(dtype=torch.float32):
    p = Problem((4,), N, K, R, dtype, masks="soft")
    forward = {name: getattr(p, name) for name in ("x", "weight", "bias", "lora_A", "lora_B", "mask_in", "mask_out")}
    forward["rng"] = torch.tensor([3, 4])
    backward = {"grad": p.grad, **{name: t for name, t in forward.items() if name != "bias"}, "t": torch.randn(4, R, dtype=dtype)}
    merge = {name: forward[name] for name in ("weight", "lora_A", "lora_B", "mask_in", "mask_out")}
    masked = {"grads[0]": torch.randn(4, K, dtype=dtype), "masks[0]": p.mask_in}
    rest = ("bias", "lora_A", "lora_B", "mask_in", "mask_out", "rng")
    compact = {"x": p.x, "packed": kept_lanes(dtype).packed, **{name: forward[name] for name in rest}}
    compact_backward = {"grad": p.grad, **{name: t for name, t in compact.items() if name != "bias"}, "t": backward["t"]}
    return {
        "apt_linear": forward,
        "apt_linear_forward": forward,
        "apt_linear_backward": backward,
        "dropout_mask": {"rng": forward["rng"]},
        "merge_": merge,
        "mask_grads_": masked,
        "compact_linear": compact,
        "compact_linear_forward": compact,
        "compact_linear_backward": compact_backward,
        "pack_kept_": {"packed": compact["packed"], "weight": p.weight},
    }


@functools.cache
def kept_lanes(dtype):
    p = Problem((4,), N, K, R, dtype, masks="soft")
    return PackedWeight(p.mask_in, p.mask_out, p.weight)


def call(op, given):
    t = {name.partition("[")[0]: value for name, value in given.items()}
    function = getattr(torch.ops.apt_ext, op)
    if op in ("apt_linear", "apt_linear_forward"):
        return function(t["x"], t["weight"], t["bias"], t["lora_A"], t["lora_B"], t["mask_in"], t["mask_out"], 1.0, 0.3, t["rng"])
    if op == "apt_linear_backward":
        layer = (t["x"], t["weight"], t["lora_A"], t["lora_B"], t["t"], t["mask_in"], t["mask_out"])
        return function(t["grad"], *layer, 1.0, 0.3, t["rng"], [True] * 4)
    if op == "dropout_mask":
        return function([4, K], 0.3, t["rng"])
    if op == "merge_":
        return function(t["weight"], t["lora_A"], t["lora_B"], 1.0, t["mask_in"], t["mask_out"])
    if op == "mask_grads_":
        return function([t["grads"]], [t["masks"]], [1])
    lanes = kept_lanes(torch.float32)
    if op == "pack_kept_":
        return function(t["packed"], t["weight"], lanes.index_in, lanes.index_out, lanes.kept)
    indices = (lanes.index_in, lanes.index_out, lanes.position_in, lanes.position_out, lanes.kept)
    layer = [t[name] for name in ("packed", "bias", "lora_A", "lora_B", "t", "mask_in", "mask_out") if name in t]
    if op == "compact_linear_backward":
        return function(t["grad"], t["x"], *layer, *indices, 1.0, False, False, 0.3, t["rng"], False, [True] * 4)
    return function(t["x"], *layer, *indices, 1.0, False, False, 0.3, t["rng"])


def quantised(t):
    return torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)


def nested(t, layout):
    return torch.nested.nested_tensor([t[:1], t[:2]] if t.dim() > 1 else [t, t], layout=layout)


BAD = {
    "float8": (lambda t: t.to(torch.float8_e4m3fn), TypeError),
    "int32": (lambda t: t.int(), TypeError),
    "bool": (lambda t: t.bool(), TypeError),
    "complex64": (lambda t: t.to(torch.complex64), TypeError),
    "float16": (lambda t: t.half(), TypeError),
    "bfloat16": (lambda t: t.bfloat16(), TypeError),
    "quantised": (quantised, TypeError),
    "sparse": (lambda t: t.to_sparse(), TypeError),
    "compressed": (lambda t: t.to_sparse_csr(), TypeError),
    "mkldnn": (lambda t: (t if t.is_floating_point() else t.float()).to_mkldnn(), TypeError),
    "nested": (lambda t: nested(t, torch.strided), TypeError),
    "jagged": (lambda t: nested(t, torch.jagged), TypeError),
    "meta": (lambda t: t.to("meta"), ValueError),
    "a row more": (lambda t: torch.cat([t, t[:1]]), ValueError),
    "a row less": (lambda t: t[1:], ValueError),
    "a column more": (lambda t: torch.cat([t, t[..., :1]], -1), ValueError),
    "a column less": (lambda t: t[..., 1:], ValueError),
    "a dimension more": (lambda t: t.unsqueeze(0), ValueError),
    "a dimension less": (lambda t: t[0], ValueError),
    "no dimension": (lambda t: t.flatten()[0], ValueError),
}
ROWS = ("a row more", "a row less")
FORWARDS = ("apt_linear", "apt_linear_forward", "compact_linear", "compact_linear_forward")
KEPT = ("compact_linear", "compact_linear_forward", "compact_linear_backward", "pack_kept_")
INNER = {"apt_linear_forward", "apt_linear_backward", *KEPT}  # no public names
RIGHT = {  # what is right where the operand stands
    *((op, "x", kind) for op in FORWARDS for kind in (*ROWS, "a dimension more", "a dimension less")),
    *((op, "packed", kind) for op in KEPT for kind in (*ROWS, "a column more", "a column less")),  # it has room for more than it holds
    *(("pack_kept_", "weight", kind) for kind in (*ROWS, "a column more", "a column less")),  # the indices are not looked at
    *(("mask_grads_", "grads[0]", kind) for kind in (*ROWS, "float16", "bfloat16")),  # any shape but along dim, any mask is float32
    ("dropout_mask", "rng", "meta"),
    *(("merge_", "weight", kind) for kind in ("float16", "bfloat16")),  # under float32 factors
}


def cases():
    for op, tensors in operands().items():
        for name, tensor in tensors.items():
            for kind in BAD:
                if (op, name, kind) in RIGHT or (kind == "compressed" and tensor.dim() < 2):
                    continue
                if kind == "jagged" and op in INNER:
                    continue  # torch's own refusal of a Python subclass
                yield pytest.param(op, name, kind, id=f"{op}-{name}-{kind}")


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta", "ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("op,name,kind", list(cases()))
def test_every_operand_is_refused_in_words(op, name, kind):
    change, error = BAD[kind]
    given = operands()[op]
    before = {n: t.clone() for n, t in given.items()}
    bad = change(given[name])
    with pytest.raises(error) as refused:
        call(op, {**given, name: bad})
    text = str(refused.value)
    assert re.match(r"\w+(\[\d\])? must .*got ", text), text
    # It names the operand, or the one that no longer fits it: a weight of another dtype than x, a mask of another length.
    assert text.startswith(name) or kind in ("float16", "bfloat16", "meta") or error is ValueError, text
    for n, t in given.items():
        assert torch.equal(t, before[n]), n


def test_the_table_refuses_nothing_right():
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        for op, tensors in operands(dtype).items():
            if "t" in tensors and dtype == torch.float16:
                tensors["t"] = tensors["t"].float()
            call(op, tensors)


def test_the_table_knows_every_op():
    registered = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("apt_ext::")}
    assert registered == set(operands())


@pytest.mark.parametrize("inference", [False, True])
def test_layouts_are_named_without_autograd_too(inference):
    p = operands()["apt_linear"]
    with torch.inference_mode(inference), torch.no_grad():
        with pytest.raises(TypeError, match="weight must be a dense strided tensor, got layout Sparse"):
            ops.apt_linear(p["x"], p["weight"].to_sparse(), None, p["lora_A"], p["lora_B"])
        with pytest.raises(TypeError, match=r"masks\[1\] must be a dense strided tensor, got layout Sparse"):
            ops.mask_grads_([p["x"], p["weight"]], [p["mask_in"], p["mask_in"].to_sparse()], [1, 1])


@pytest.mark.parametrize("bad", [None, [[1.0]], "x", 3])
def test_what_is_no_tensor_is_a_type_error(bad):
    A, B, W = torch.randn(R, K), torch.randn(N, R), torch.randn(N, K)
    for function, arguments, places in (
        (ops.apt_linear, [torch.randn(4, K), W, None, A, B, None, None, 1.0], {0: "x", 1: "weight", 3: "lora_A", 5: "mask_in"}),
        (ops.merge_, [W, A, B, 1.0], {0: "weight", 1: "lora_A", 2: "lora_B"}),
        (ops.mask_grads_, [[W], [torch.ones(K)], [1]], {0: "grads", 1: "masks"}),
    ):
        for place, name in places.items():
            if bad is None and name in ("weight", "mask_in") and function is ops.apt_linear:
                continue
            given = list(arguments)
            given[place] = [bad] if isinstance(given[place], list) else bad
            with pytest.raises(TypeError, match=name):
                function(*given)
    with pytest.raises(TypeError, match="scaling"):
        ops.apt_linear(torch.randn(4, K), None, None, A, B, scaling="1")


@pytest.mark.parametrize("with_weight", [True, False])
def test_an_x_that_does_not_fit_is_named_itself(with_weight):
    """Not the weight or the factor that it is held against, which are right."""
    A, B, W = torch.randn(R, K), torch.randn(N, R), torch.randn(N, K) if with_weight else None
    for shape in ((4, K + 1), (K - 1,), (2, 3, 0)):
        with pytest.raises(ValueError, match=rf"x must have shape \[\.\.\., K={K}\] to fit .*lora_A, got \[.*{shape[-1]}\]"):
            ops.apt_linear(torch.randn(*shape), W, None, A, B)
    if with_weight:
        with pytest.raises(ValueError, match="weight must have shape"):
            ops.apt_linear(torch.randn(4, K), torch.randn(N, K + 1), None, A, B)
        with pytest.raises(ValueError, match="lora_A must have shape"):
            ops.apt_linear(torch.randn(4, K), W, None, torch.randn(R, K + 1), B)


# -- small sizes, all of them --------------------------------------------------------------------------------------------

SIZE = st.integers(0, 5)
MASK = st.sampled_from(["none", "hard", "soft", "zero", "one"])


@given(st.lists(SIZE, min_size=0, max_size=3), SIZE, SIZE, SIZE, MASK, st.booleans(), st.booleans(), st.integers(0, 2**16))
def test_apt_linear_of_every_small_size(shape, n, k, r, masks, weight, bias, seed):
    p = Problem(shape, n, k, r, torch.float64, masks=masks, weight=weight, bias=bias, seed=seed)
    got, want = p.run(ops.apt_linear), p.run(reference.apt_linear)
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12, msg=name)


@given(SIZE, SIZE, SIZE, MASK, st.booleans(), st.integers(0, 2**16))
def test_merge_of_every_small_size(n, k, r, masks, check, seed):
    p = Problem((1,), n, k, r, torch.float64, masks=masks, seed=seed)
    want = reference.merge_(p.weight.clone(), p.lora_A, p.lora_B, 1.5, p.mask_in, p.mask_out)
    torch.testing.assert_close(ops.merge_(p.weight, p.lora_A, p.lora_B, 1.5, p.mask_in, p.mask_out, check), want, rtol=1e-12, atol=1e-12)


@given(st.lists(st.tuples(st.lists(SIZE, min_size=1, max_size=3), st.integers(0, 2), st.booleans()), max_size=4), st.integers(0, 2**16))
def test_mask_grads_of_every_small_size(grads, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors, masks, dims = [], [], []
    for shape, dim, transposed in grads:
        grad = torch.randn(shape, generator=generator)
        tensors.append(grad.transpose(0, -1).contiguous().transpose(0, -1) if transposed else grad)
        dims.append(dim % len(shape) - (len(shape) if transposed else 0))
        masks.append((torch.rand(shape[dims[-1]], generator=generator) > 0.4).float() * torch.rand(shape[dims[-1]], generator=generator))
    want = [reference.scale_lanes(t.clone(), mask, dim) for t, mask, dim in zip(tensors, masks, dims, strict=True)]
    ops.mask_grads_(tensors, masks, dims)
    torch.testing.assert_close(tensors, want)


@pytest.mark.parametrize("name", ["index_in", "index_out", "position_in", "position_out", "kept"])
@pytest.mark.parametrize("change", [torch.Tensor.float, torch.Tensor.short, lambda t: t[None], lambda t: t.to("meta")])
def test_lanes_of_a_compacted_layer_that_are_none(name, change):
    p, lanes = operands()["compact_linear"], kept_lanes(torch.float32)
    del p["rng"]
    given = {one: getattr(lanes, one) for one in ("index_in", "index_out", "position_in", "position_out", "kept")}
    given[name] = change(given[name])
    with pytest.raises((TypeError, ValueError), match=f"{name} must .*got "):
        torch.ops.apt_ext.compact_linear(*p.values(), *given.values(), 1.0, False, False)
