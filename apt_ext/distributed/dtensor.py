"""What stands beside a Parameter that FSDP2 has sharded (a DTensor)."""

from __future__ import annotations

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor; torch.distributed is not imported to find out."""
    return hasattr(tensor, "device_mesh")


def replicated(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, which every rank has whole, so that it combines with `like`: as it stands, or replicated over the mesh of a DTensor.

    An operation with `like` then takes of it what each rank holds, without communication.
    """
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def whole(tensor: Tensor) -> Tensor:
    """A DTensor's full value, which all ranks of its mesh gather together; any other tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
