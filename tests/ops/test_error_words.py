"""An error about two tensors names both, whichever is at fault; a GPU that the build has no code for is named, with the way out."""

import pytest
import torch
from small_adapter import make
from torch import nn

from apt_ext import _C, APTAdapter, ops


def operands(device="cpu", **changes):
    shapes = {"x": (3, 24), "weight": (20, 24), "lora_A": (4, 24), "lora_B": (20, 4), **changes}
    return {name: torch.randn(shape, device=device) for name, shape in shapes.items()}


# what is wrong: (shapes, all of these are in the message)
SHAPES = {
    "weight of other rows": ({"weight": (19, 24)}, (r"lora_B must have shape \[N=19, R=4\]", r"weight \[19, 24\]", r"got \[20, 4\]")),
    "lora_B of other rows": ({"lora_B": (21, 4)}, (r"lora_B must have shape \[N=20, R=4\]", r"weight \[20, 24\]", r"got \[21, 4\]")),
    "weight of other columns": ({"weight": (20, 23)}, (r"weight must have shape \[N=20, K=24\]", r"lora_A \[4, 24\]", r"got \[20, 23\]")),
    "lora_A of other columns": ({"lora_A": (4, 23)}, (r"lora_A must have shape \[R=4, K=24\]", r"weight \[20, 24\]", r"got \[4, 23\]")),
    "lora_A of other rows": ({"lora_A": (5, 24)}, (r"lora_B must have shape \[N=20, R=5\]", r"lora_A \[5, 24\]", r"got \[20, 4\]")),
    "lora_B of other columns": ({"lora_B": (20, 3)}, (r"lora_B must have shape \[N=20, R=4\]", r"lora_A \[4, 24\]", r"got \[20, 3\]")),
}


@pytest.mark.parametrize("fault", SHAPES)
def test_both_are_named(device, fault):
    shapes, words = SHAPES[fault]
    given = operands(device, **shapes)
    calls = [lambda: ops.apt_linear(given["x"], given["weight"], None, given["lora_A"], given["lora_B"])]
    if not {"weight", "lora_A"} & shapes.keys() or fault == "weight of other rows":
        calls.append(lambda: ops.merge_(given["weight"], given["lora_A"], given["lora_B"], 1.0))
    for call in calls:
        with pytest.raises(ValueError) as found:  # noqa: PT011  # matched below
            call()
        for word in words:
            found.match(word)


def test_both_are_named_by_a_backward():
    given = operands(weight=(19, 24))
    grad, t = torch.randn(3, 19), torch.randn(3, 4)
    with pytest.raises(
        ValueError, match=r"lora_B must have shape \[N=19, R=4\] to fit weight \[19, 24\] and lora_A \[4, 24\], got \[20, 4\]"
    ):
        torch.ops.apt_ext.apt_linear_backward(
            grad, given["x"], given["weight"], given["lora_A"], given["lora_B"], t, None, None, 1.0, 0.0, None, [True] * 4
        )


@pytest.mark.parametrize("shape", [(6, 10), (8, 10), (7, 9), (10, 7)])
@pytest.mark.parametrize("compacted", [False, True])
def test_another_weight_in_the_place_of_the_base_layers(compacted, shape):
    """Smaller ones must not be read past their end."""
    adapter = make()
    adapter.set_masks((torch.arange(10) != 2).float(), (torch.arange(7) != 1).float())
    if compacted:
        adapter.compact()
    adapter(torch.ones(2, 10, dtype=torch.float64))
    adapter.base_layer.weight = nn.Parameter(torch.randn(shape, dtype=torch.float64), requires_grad=False)
    with pytest.raises(ValueError, match="must have shape .*lora_") as found:
        adapter(torch.ones(2, 10, dtype=torch.float64))
    assert "weight" in str(found.value) and str(list(shape)) in str(found.value)


OURS = "8.0;9.0a;9.0+PTX"


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((8, 0), OURS, True),
        ((8, 6), OURS, True),  # code of an earlier minor version
        ((8, 9), OURS, True),
        ((9, 0), OURS, True),
        ((10, 0), OURS, True),  # PTX
        ((12, 1), OURS, True),
        ((7, 5), OURS, False),
        ((7, 0), OURS, False),
        ((9, 0), "9.0a", True),
        ((9, 1), "9.0a", False),  # of that GPU alone
        ((10, 0), "9.0a", False),
        ((10, 3), "10.0f", True),  # of its family
        ((12, 0), "10.0f", False),
        ((8, 0), "8.6", False),
        ((9, 0), "8.0;8.6", False),
        ((9, 0), "8.0+PTX", True),
        ((7, 5), "8.0+PTX", False),
        ((9, 0), "9.0a+PTX", True),
        ((10, 0), "9.0a+PTX", False),
        ((7, 5), "Turing;8.0", True),  # nothing is known of a name
        ((9, 0), "", False),
    ],
)
def test_a_gpu_that_the_build_has_no_code_for(capability, archs, runs):
    if runs:
        _C.check_gpu("a GPU", *capability, archs)
        return
    with pytest.raises(RuntimeError) as found:
        _C.check_gpu("NVIDIA Quadro", *capability, archs)
    text = str(found.value)
    assert text.startswith(
        f"apt_ext has no code for NVIDIA Quadro (compute capability {capability[0]}.{capability[1]}): this build is for {archs};"
    )
    assert f"TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]} APT_WITH_CUDA=1" in text


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_this_gpu_runs():
    _C.check_gpu(torch.cuda.get_device_name(), *torch.cuda.get_device_capability(), ";".join(ops.build_info()["cuda_archs"]))
    APTAdapter(8, 8, 2, device="cuda")(torch.ones(2, 8, device="cuda"))
