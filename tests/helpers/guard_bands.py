"""Tensors within buffers of NaN, and whether what lies around them has changed."""

import torch


def banded(tensor, layout):
    """(a copy of `tensor` within a buffer of NaN, the buffer): the inner slice of a larger matrix, or a stretch of a longer vector."""
    if layout == "inner slice":
        buffer = tensor.new_full([size + 6 for size in tensor.shape], float("nan"))
        view = buffer[tuple(slice(3, 3 + size) for size in tensor.shape)]
    else:
        buffer = tensor.new_full([tensor.numel() + 6], float("nan"))
        view = buffer[3 : 3 + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view, buffer


def bits(tensor):
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).clone()


def outside(view, buffer):
    """The buffer's bits with the view's elements out of it."""
    kept = buffer.clone()
    kept.as_strided(view.shape, view.stride(), view.storage_offset()).zero_()
    return bits(kept)
