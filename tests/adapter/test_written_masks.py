"""Masks that somebody writes past torch's version counter: seen by the next forward on the CPU, at the next event on a device."""

import pytest
import torch
from families import FAMILIES, adapted, outputs
from small_adapter import expected, make, outcome
from torch.utils.checkpoint import checkpoint

from apt_ext import adapters, shrink
from apt_ext.adapter import mask_change
from apt_ext.adapter.mask import SIDES


def inputs(device="cpu"):
    return torch.randn(4, 10, dtype=torch.float64, device=device, requires_grad=True)


def through_data(buffer, index, value):
    buffer.data[index] = value


def through_numpy(buffer, index, value):
    buffer.numpy()[index] = value


WRITES = {"data": through_data, "numpy": through_numpy}


def right(adapter, x):
    torch.testing.assert_close(outcome(adapter, x)[0], expected(adapter, x))
    assert (torch.autograd.grad(adapter(x).sum(), x)[0][:, adapter.mask_in == 0] == 0).all()


@pytest.mark.parametrize("start", ["ones", "a mask"])
@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize("write", WRITES)
def test_a_forward_on_the_cpu_sees_it(write, compacted, start):
    adapter, x = make(), inputs()
    if start == "a mask":
        adapter.set_masks((torch.arange(10) % 3 != 0).float(), (torch.arange(7) != 1).float())
    if compacted:
        adapter.compact()
    right(adapter, x)
    for name, index, value in (("mask_in", 4, 0.0), ("mask_out", 2, 0.5), ("mask_in", 4, 1.0), ("mask_out", 2, 0.0), ("mask_in", 0, 0.25)):
        WRITES[write](getattr(adapter, name), index, value)
        right(adapter, x)
        assert torch.equal(adapter(x)[:, adapter.mask_out == 0], torch.zeros(4, int((adapter.mask_out == 0).sum()), dtype=torch.float64))
    adapter.set_masks(torch.ones(10), torch.ones(7))
    right(adapter, x)


def test_a_model_of_many_adapters_sees_it():
    for name in ("llama", "bert"):
        family = FAMILIES[name]
        apt, other = adapted(family), adapted(family)
        block = next(key for key in apt.blocks if key.endswith("neurons"))
        mask = (torch.arange(20) % 3 != 0).float()
        other.set_block_mask(block, mask)
        outputs(apt, family.inputs())
        for (_, mine), (_, theirs) in zip(adapters(apt), adapters(other), strict=True):
            for key in SIDES:
                getattr(mine, key).data.copy_(getattr(theirs, key))
        want = outputs(other, family.inputs())[0]
        assert torch.equal(outputs(apt, family.inputs())[0], want)
        torch.testing.assert_close(outputs(shrink(apt), family.inputs())[0], want)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("compacted", [False, True])
def test_before_a_recomputation_it_is_an_error(compacted, reentrant):
    adapter, x = make(), inputs()
    if compacted:
        adapter.compact()
    y = checkpoint(adapter, x, use_reentrant=reentrant)
    adapter.mask_in.data[3] = 0
    with pytest.raises(RuntimeError, match="masks changed"):
        y.sum().backward()


EVENTS = {
    "set_masks": lambda a: a.set_masks(mask_out=torch.ones(7, device=a.mask_out.device)),
    "state_dict": lambda a: a.state_dict(),
    "merge_weights": lambda a: a.merge_weights(),
    "compact": lambda a: a.compact(),
    "increase_rank": lambda a: a.increase_rank(4),
}


@pytest.mark.parametrize("event", EVENTS)
def test_an_event_says_it(device, event, monkeypatch):
    """On the CPU as if it were a device, where no forward looks."""
    monkeypatch.setattr(mask_change, "is_read_by_forward", lambda buffer: False)
    adapter = make(device).eval()
    adapter.mask_in.data[4] = 0
    with pytest.warns(UserWarning, match=rf"{event} of APTAdapter\(10, 7\): mask_in was written without torch counting it"):
        EVENTS[event](adapter)
    x = inputs(device)
    with torch.no_grad():
        torch.testing.assert_close(adapter.eval()(x), expected(adapter, x)) if event != "merge_weights" else None
    adapter.state_dict()  # said once
    adapter.unmerge_weights()
    y = adapter(x)
    assert adapter.mask_in[4] == 0 and (torch.autograd.grad(y.sum(), x)[0][:, 4] == 0).all()


def test_what_torch_counts_is_no_matter_of_words(device):
    adapter, x = make(device), inputs(device)
    with torch.no_grad():
        adapter.mask_in[4] = 0
    adapter.state_dict()
    right(adapter, x)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("call", ["cut", "shrink", "state_dict", "compact"])
def test_an_event_of_a_model_on_a_device(call):
    family = FAMILIES["bert"]
    apt = adapted(family).cuda()
    adapter = next(one for _, one in adapters(apt))
    apt.set_block_mask("0.heads", torch.tensor([1.0, 0.5, 1.0], device="cuda"))
    adapter.mask_out.data[0] = 0
    with pytest.warns(UserWarning, match="mask_out was written without torch counting it"):
        {"cut": apt.cut, "shrink": lambda: shrink(apt), "state_dict": apt.state_dict, "compact": apt.compact}[call]()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("start", ["ones", "a mask"])
def test_a_compacted_layer_on_a_device_is_in_step_after_an_event(start):
    adapter, x = make("cuda"), inputs("cuda")
    if start == "a mask":
        adapter.set_masks((torch.arange(10, device="cuda") % 3 != 0).float())
    adapter.compact()
    adapter.mask_in.data[4] = 0
    with pytest.warns(UserWarning, match="mask_in was written"):
        adapter.state_dict()
    right(adapter, x)


def test_overrides_are_used_as_they_are():
    adapter, x, ones = make(), inputs(), (torch.ones(10), torch.ones(7))
    adapter.mask_in.data[4] = 0
    torch.testing.assert_close(adapter(x, *ones), expected(adapter, x, *ones))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_masks_of_embeddings_and_norms_are_read_where_they_lie():
    apt = adapted(FAMILIES["bert"]).cuda()
    apt.set_block_mask("hidden", (torch.arange(24) < 18).float())
    embedding = apt.model.get_submodule(apt.blocks["hidden"].scaling_side.module)
    embedding.mask_out.data[6:12] = 0
    assert int(apt.get_block_mask("hidden").sum()) == int(embedding.mask_out.sum()) == 12
