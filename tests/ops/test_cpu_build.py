"""What a build without CUDA says of a tensor on a GPU."""

import pytest
import torch

from apt_ext import ops


class OnCuda(torch.Tensor):
    """Says that it is on a GPU, as one would where torch has CUDA and this build has not; there is nothing in it."""

    @staticmethod
    def __new__(cls, *size):
        return torch.Tensor._make_wrapper_subclass(cls, size, dtype=torch.float32, device="cuda")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        with torch._C._DisableTorchDispatch():  # on to the kernel, which sees the device
            return function(*args, **(kwargs or {}))


@pytest.mark.skipif(ops.build_info()["cuda"], reason="this build has CUDA")
def test_a_build_without_cuda_says_so_of_a_tensor_that_is_there():
    words = r"built without CUDA and got a tensor on cuda; rebuild it beside a CUDA torch .*: APT_WITH_CUDA=1 python -m pip install"
    with pytest.raises(RuntimeError, match=words):
        ops.mask_grads_([OnCuda(4, 6)], [OnCuda(6)], [1])
