"""Derivatives of every kind are right or refused by name; what a graph has saved cannot change unseen."""

import itertools

import pytest
import torch
from problems import Problem, assert_accurate
from small_adapter import make
from torch.autograd import forward_ad

import apt_ext
from apt_ext import ops, reference

ARGUMENTS = ("x", "weight", "bias", "lora_A", "lora_B", "mask_in", "mask_out")
LEAVES = (0, 2, 3, 4)


def problem(dtype=torch.float64, **options):
    p = Problem((4,), 6, 5, 3, dtype, masks="soft", **options)
    p.arguments = [p.x, p.weight, p.bias, p.lora_A, p.lora_B, p.mask_in.to(dtype), p.mask_out.to(dtype)]
    return p


def of(p, function, *indices):
    """`function`, an apt_linear, of the arguments at `indices` alone."""

    def call(*values):
        given = list(p.arguments)
        for index, value in zip(indices, values, strict=True):
            given[index] = value
        return function(*given, p.scaling)

    return call, tuple(p.arguments[index] for index in indices)


# -- second derivatives and forward mode -------------------------------------------------------------------------------


def test_second_and_third_derivatives():
    p = problem()
    function, inputs = of(p, ops.apt_linear, *LEAVES)
    leaves = [t.clone().requires_grad_() for t in inputs]
    assert torch.autograd.gradgradcheck(function, leaves)

    def penalty(linear):
        function, _ = of(p, linear, *LEAVES)
        first = torch.autograd.grad(function(*leaves).tanh().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in second), leaves)

    for got, want in zip(penalty(ops.apt_linear), penalty(reference.apt_linear), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_second_derivatives_in_every_dtype(device, dtype):
    p = Problem((3, 4), 12, 16, 4, dtype, device, "soft")

    def penalty(function, x, A, B):
        first = torch.autograd.grad(function(x, p.weight, p.bias, A, B, p.mask_in, p.mask_out, 0.5), (x, A, B), p.grad, create_graph=True)
        return torch.autograd.grad(sum(g.to(torch.promote_types(dtype, torch.float32)).square().mean() for g in first), (x, A, B))

    got = penalty(ops.apt_linear, *(t.clone().requires_grad_() for t in (p.x, p.lora_A, p.lora_B)))
    q = p._double(lambda t: t)

    def penalty64(x, A, B):
        first = torch.autograd.grad(
            reference.apt_linear(x, q.weight, q.bias, A, B, q.mask_in, q.mask_out, 0.5), (x, A, B), q.grad, create_graph=True
        )
        return torch.autograd.grad(sum(g.square().mean() for g in first), (x, A, B))

    want = penalty64(*(t.clone().requires_grad_() for t in (q.x, q.lora_A, q.lora_B)))
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        assert_accurate(g, w, 20 * w.abs(), dtype)


@pytest.mark.parametrize("way", ["jvp", "dual numbers"])
@pytest.mark.parametrize("index", range(7), ids=ARGUMENTS)
def test_forward_mode_of_every_argument(way, index):
    p = problem()
    (function, inputs), (expected, _) = of(p, ops.apt_linear, index), of(p, reference.apt_linear, index)
    tangents = tuple(torch.randn_like(t) for t in inputs)
    want = torch.func.jvp(expected, inputs, tangents)
    if way == "jvp":
        got = torch.func.jvp(function, inputs, tangents)
    else:
        with forward_ad.dual_level():
            got = forward_ad.unpack_dual(function(forward_ad.make_dual(inputs[0], tangents[0])))
    torch.testing.assert_close(tuple(got), want)
    assert want[1].abs().max() > 0


def test_pruned_lanes_stay_out_of_every_derivative():
    clean = Problem((4,), 6, 5, 3, torch.float64, masks="hard")
    dirty = clean.poisoned()

    def both(p):
        def function(x, A, B, b):
            return ops.apt_linear(x, p.weight, b, A, B, p.mask_in, p.mask_out, 1.5).tanh().sum()

        inputs = (p.x, p.lora_A, p.lora_B, p.bias)
        yield from torch.func.grad(function, (0, 1, 2, 3))(*inputs)
        yield torch.func.jvp(lambda *a: torch.stack(torch.func.grad(function, (0, 1, 2, 3))(*a)[:1]), inputs, inputs)[1]
        leaves = [t.clone().requires_grad_() for t in inputs]
        first = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
        yield from torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for got, want in zip(both(dirty), both(clean), strict=True):
        assert torch.isfinite(want).all()
        torch.testing.assert_close(got, want)


# -- torch.func --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", LEAVES, ids=[ARGUMENTS[i] for i in LEAVES])
def test_func_transforms(index):
    p = problem()
    (function, inputs), (expected, _) = of(p, ops.apt_linear, index), of(p, reference.apt_linear, index)

    def loss(function):
        return lambda value: function(value).tanh().square().sum()

    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(loss(function))(*inputs), transform(loss(expected))(*inputs))
    torch.testing.assert_close(torch.func.jacrev(function)(*inputs), torch.func.jacrev(expected)(*inputs))


@pytest.mark.parametrize("index", [1, 5, 6], ids=["weight", "mask_in", "mask_out"])
def test_func_grad_of_a_constant_is_refused_by_name(index):
    function, inputs = of(problem(), ops.apt_linear, index)
    with pytest.raises(RuntimeError, match=f"{ARGUMENTS[index]} is a constant"):
        torch.func.grad(lambda value: function(value).sum())(*inputs)


def test_vmap_over_every_set_of_arguments():
    p = problem()
    for indices in itertools.chain(itertools.combinations(range(7), 1), [(0, 3, 4), (0, 5, 6), tuple(range(7))]):
        function, inputs = of(p, ops.apt_linear, *indices)
        many = tuple(torch.stack([t, t / 2, t * t.sign()]) for t in inputs)
        got = torch.func.vmap(function)(*many)
        want = torch.stack([function(*one) for one in zip(*many, strict=True)])
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_vmap_inside_and_outside_of_gradients():
    p = problem()
    A = p.lora_A.clone().requires_grad_()
    function, _ = of(p, ops.apt_linear, 0, 3)
    torch.func.vmap(function, (0, None))(torch.stack([p.x, p.x / 2]), A).sum().backward()
    want = sum(torch.autograd.grad(function(x, A).sum(), A)[0] for x in (p.x, p.x / 2))
    torch.testing.assert_close(A.grad, want)
    # a gradient for each token
    each = torch.func.vmap(torch.func.grad(lambda A, x: function(x, A).tanh().sum()), (None, 0))(p.lora_A, p.x)
    loop = torch.stack([torch.autograd.grad(function(x, A).tanh().sum(), A)[0] for x in p.x])
    torch.testing.assert_close(each, loop)
    # many incoming gradients at once, which torch runs as a vmap of the backward
    grads = torch.randn(3, 4, 6, dtype=torch.float64)
    batched = torch.autograd.grad(function(p.x, A), A, grads, is_grads_batched=True)[0]
    torch.testing.assert_close(batched, torch.stack([torch.autograd.grad(function(p.x, A), A, g)[0] for g in grads]))


def test_functional_call_of_an_adapter():
    adapter, x = make(), torch.randn(4, 10, dtype=torch.float64)
    adapter.set_masks(torch.rand(10))
    parameters = {name: value.detach() for name, value in adapter.named_parameters() if value.requires_grad}

    def loss(parameters):
        return torch.func.functional_call(adapter, parameters, (x,)).square().sum()

    got = torch.func.grad(loss)(parameters)
    want = torch.autograd.grad(adapter(x).square().sum(), (adapter.lora_A, adapter.lora_B))
    torch.testing.assert_close((got["lora_A"], got["lora_B"]), want)


def test_ops_that_write_refuse_transforms_by_name():
    p = problem()
    one = torch.ones_like
    with forward_ad.dual_level():
        for index, name in ((0, "weight"), (1, "lora_A"), (2, "lora_B"), (3, "mask_in")):
            given = [p.weight.clone(), p.lora_A, p.lora_B, p.mask_in.double()]
            given[index] = forward_ad.make_dual(given[index], one(given[index]))
            with pytest.raises(RuntimeError, match=f"merge_ has no forward-mode derivative, but {name} carries a tangent"):
                ops.merge_(*given[:3], 1.0, given[3])
            torch.testing.assert_close(given[0], p.weight, rtol=0, atol=0)
        dual = forward_ad.make_dual(p.lora_A.clone(), one(p.lora_A))
        with pytest.raises(RuntimeError, match=r"mask_grads_ has no forward-mode derivative, but grads\[0\] carries a tangent"):
            ops.mask_grads_([dual], [p.mask_in], [1])
        with pytest.raises(RuntimeError, match="apt_linear_forward is one half of apt_linear"):
            torch.ops.apt_ext.apt_linear_forward(p.x, None, None, dual, p.lora_B, None, None, 1.0)
    for call in (
        lambda W: ops.merge_(W, p.lora_A, p.lora_B, 1.0),
        lambda W: ops.mask_grads_([W], [p.mask_in], [1]),
    ):
        with pytest.raises(RuntimeError, match="apt_ext::m"):
            torch.func.vmap(call)(torch.stack([p.weight, p.weight]))


# -- saved tensors -----------------------------------------------------------------------------------------------------

MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("index", [0, 1, 3, 4, 5, 6], ids=[ARGUMENTS[i] for i in (0, 1, 3, 4, 5, 6)])
def test_a_saved_tensor_changed_before_backward_is_torchs_error(device, index, mode):
    p = Problem((4,), 6, 5, 3, torch.float64, device, "soft")
    given = [p.x, p.weight, p.bias, p.lora_A, p.lora_B, p.mask_in, p.mask_out]
    y = ops.apt_linear(*(t.requires_grad_() if i in LEAVES else t for i, t in enumerate(given)))
    with MODES[mode]():
        given[index].mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_our_own_writes_count_as_changes(device, mode):
    p = Problem((4,), 6, 5, 3, torch.float64, device, "soft")
    merged, masked, other = (torch.randn(6, 5, dtype=torch.float64, device=device) for _ in range(3))
    for written, write in (
        (merged, lambda: ops.merge_(merged, p.lora_A, p.lora_B, 1.0)),
        (merged, lambda: ops.merge_(merged.detach().t().t(), p.lora_A, p.lora_B, 1.0, check=False)),
        (masked, lambda: ops.mask_grads_([other, masked], [p.mask_in] * 2, [1, 1])),
        (masked, lambda: apt_ext._C.mask_grads_([masked[:2]], [p.mask_in], [1])),
    ):
        x = p.x.clone().requires_grad_()
        y = torch.nn.functional.linear(x, written)
        version = written._version
        with MODES[mode]():
            write()
        assert written._version > version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", ["merge", "unmerge", "set_masks", "grow", "grow within max_rank", "load"])
def test_an_adapter_changed_between_forward_and_backward(mode, change):
    adapter = make(max_rank=5 if "max_rank" in change else None)
    adapter.set_masks(torch.rand(10), torch.rand(7))
    if change == "unmerge":
        adapter.eval().merge_weights()
    state = {name: value.clone() for name, value in adapter.state_dict().items()}
    x = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    y = adapter(x)
    with MODES[mode]():
        {
            "merge": adapter.merge_weights,
            "unmerge": adapter.unmerge_weights,
            "set_masks": lambda: adapter.set_masks(torch.zeros(10)),
            "load": lambda: adapter.load_state_dict(state),
        }.get(change, lambda: adapter.increase_rank(4))()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_masks_known_to_be_ones_belong_to_their_forward():
    adapter = make()
    x = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    (want,) = torch.autograd.grad(adapter(x).sum(), x)
    y = adapter(x)
    adapter.set_masks(torch.zeros(10))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], want)
