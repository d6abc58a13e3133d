"""A CUDA graph keeps the widths of its capture: replayed after others it is never silently wrong.

And what it reads is never given back.
"""

import gc
import logging
import weakref

import pytest
import torch
from small_adapter import expected
from torch import nn

from apt_ext import APTAdapter
from apt_ext.common import log

CUDA = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(autouse=True)
def _said_anew():
    log.forget("capture")


def keep(count, of=32, device="cpu", value=1.0):
    return (torch.arange(of, device=device) < count).float() * value


def compacted(device="cpu", dtype=torch.float32, dense="keep"):
    torch.manual_seed(0)
    adapter = APTAdapter.from_linear(nn.Linear(32, 40, device=device, dtype=dtype), 4)
    with torch.no_grad():
        adapter.lora_B.normal_(0, 0.1)
    adapter.set_masks(keep(20, device=device), keep(30, 40, device=device))
    adapter.compact(dense=dense)
    return adapter


def captured(adapter, x):
    """(a CUDA graph of a forward, its output)"""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        adapter(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = adapter(x)
    return graph, y


CHANGES = {
    "fewer inputs": (keep(9), keep(30, 40), True),
    "fewer outputs": (keep(20), keep(3, 40), True),
    "more": (keep(30), keep(40, 40), True),
    "all": (keep(32), keep(40, 40), True),
    "fractions": (keep(20, value=0.5), keep(30, 40), True),
    "fewer of one, more of the other": (keep(9), keep(40, 40), True),
    "as many, others": (keep(20).flip(0), keep(30, 40).flip(0), False),
    "equal widths": (keep(17), keep(27, 40), False),
    "the same": (keep(20), keep(30, 40), False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_widths_than_the_captured_are_said_once(change, caplog):
    adapter, (mask_in, mask_out, warned) = compacted(), CHANGES[change]
    x = torch.randn(5, 32)
    adapter.set_masks(keep(12))  # nothing is captured yet
    adapter.set_masks(keep(20))
    assert not caplog.records
    packed = adapter.packing.current.packed
    fits = change not in ("more", "all")
    adapter.packing.current.note_capture()
    with caplog.at_level(logging.INFO, "apt_ext"):
        adapter.set_masks(mask_in, mask_out)
        assert [record.levelname for record in caplog.records] == ["WARNING"] * warned
        assert (adapter.packing.current.packed is packed) == fits and torch.isnan(packed).all() == (not fits)
        adapter.set_masks(keep(2), keep(2, 40))
        adapter.set_masks(keep(30), keep(30, 40))
    assert len(caplog.records) == 1 and "capture it again" in caplog.text
    assert torch.isnan(packed).all() and adapter.packing.current.packed is not packed
    torch.testing.assert_close(adapter(x), expected(adapter, x))
    other = compacted()
    other.packing.current.note_capture()
    with caplog.at_level(logging.INFO, "apt_ext"):
        other.set_masks(keep(2))
    assert caplog.records[-1].levelname == "INFO"


def test_what_a_narrowed_layer_no_longer_reads_is_nan():
    adapter = compacted()  # 24 lanes by 32
    adapter.packing.current.note_capture()
    adapter.set_masks(keep(8), keep(30, 40))
    held = adapter.packing.current.packed
    assert torch.isfinite(held[: 8 * 32]).all() and torch.isnan(held[8 * 32 : 24 * 32]).all()
    x = torch.randn(5, 32, requires_grad=True)
    y = adapter(x)
    torch.testing.assert_close(y, expected(adapter, x))
    y.square().sum().backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(adapter.lora_A.grad).all()
    adapter.set_masks(keep(32), keep(40, 40))  # and comes back whole
    torch.testing.assert_close(adapter(x), expected(adapter, x))


def test_where_the_whole_weight_is_in_host_memory(caplog):
    adapter = compacted(dense="cpu")
    x = torch.randn(5, 32)
    adapter.packing.current.note_capture()
    adapter.set_masks(keep(8))
    assert "capture it again" in caplog.text
    want = adapter(x)
    adapter.compact(False)
    torch.testing.assert_close(adapter(x), want)


def test_memory_that_a_graph_reads_stays_and_is_used_again():
    adapter, x = compacted(), torch.randn(5, 32)
    kept = adapter.packing.current
    kept.note_capture()
    kept.note_capture()  # another forward of the same capture
    captured, whole = weakref.ref(kept.packed), kept.packed.clone()
    adapter.set_masks(keep(30), keep(40, 40))
    gc.collect()
    assert captured() is not None and torch.isnan(captured()).all() and len(kept.packed) == 32 * 40
    torch.testing.assert_close(adapter(x), expected(adapter, x))
    adapter.set_masks(keep(8), keep(8, 40))  # fits into what is there anyway
    assert kept.packed is captured() and torch.isnan(kept.packed[64:]).all()
    torch.testing.assert_close(adapter(x), expected(adapter, x))
    adapter.set_masks(keep(20), keep(30, 40))
    assert kept.packed is captured() and torch.equal(kept.packed, whole)  # and the graph is right again
    memory = weakref.ref(kept)
    adapter.compact(False)
    del kept
    gc.collect()
    assert memory() is None and captured() is None


def test_a_graph_of_each_event_holds_no_more_than_the_first():
    """Captured again after each fall of masks: what they read is one vector."""
    adapter = compacted()
    adapter.packing.current.note_capture()
    first = adapter.packing.current.packed
    for count in (16, 12, 8, 3):
        adapter.set_masks(keep(count), keep(count, 40))
        adapter.packing.current.note_capture()
        assert adapter.packing.current.packed is first


@pytest.mark.parametrize("dense", ["keep", "cpu"])
def test_compacted_again_it_is_what_the_graph_reads(dense):
    adapter, x = compacted(), torch.randn(5, 32)
    kept = adapter.packing.current
    kept.note_capture()
    captured = kept.packed
    adapter.compact(dense=dense)
    assert adapter.packing.current is kept and kept.packed is captured
    want = adapter(x)
    adapter.set_masks(keep(32), keep(40, 40))
    adapter.set_masks(keep(20), keep(30, 40))
    assert kept.packed is captured
    torch.testing.assert_close(adapter(x), want)
    adapter.compact(False)
    torch.testing.assert_close(adapter(x), want)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_captured_graph(device, dtype, change, caplog):
    """Replayed after a change of masks: right where the widths are equal, else said, and mostly NaN."""
    adapter, (mask_in, mask_out, warned) = compacted(device, dtype), CHANGES[change]
    x = torch.randn(16, 32, device=device, dtype=dtype)

    def close(y):
        want = expected(adapter, x.float() if dtype == torch.float32 else x)
        torch.testing.assert_close(y, want.to(dtype), rtol=2e-2, atol=2e-2)

    graph, y = captured(adapter, x)
    graph.replay()
    close(y)
    adapter.set_masks(mask_in.to(device), mask_out.to(device))
    assert ("capture it again" in caplog.text) == warned
    graph.replay()
    if not warned:
        close(y)
    elif change.startswith("fewer") and not torch.isnan(y).any():
        close(y)  # fewer outputs are the first rows of what was captured
    elif change in ("more", "all"):
        assert torch.isnan(y).any()
    again, other = captured(adapter, x)
    again.replay()
    close(other)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA)])
@pytest.mark.parametrize("dense", ["keep", "cpu"])
def test_a_replayed_graph_reads_no_memory_that_was_given_back(device, dense):
    """What others allocate after the change it does not read; back at its widths it is right."""
    adapter = compacted(device)
    x = torch.randn(16, 32, device=device)
    graph, y = captured(adapter, x)
    adapter.compact(dense=dense)  # which is the one that was captured
    graph.replay()
    want = y.clone()
    for m_in, m_out in ((keep(30), keep(40, 40)), (keep(32), keep(40, 40)), (keep(31), keep(40, 40))):
        adapter.set_masks(m_in.to(device), m_out.to(device))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        others = [torch.full((24 * 32,), 7.0, device=device) for _ in range(64)]  # would be read as weights
        graph.replay()
        torch.cuda.synchronize()
        assert torch.isnan(y).any() and not (y == 7.0).any()
        del others
    adapter.set_masks(keep(20, device=device), keep(30, 40, device))
    graph.replay()
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(adapter(x), want)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA)])
def test_memory_on_a_device(device):
    """What is kept and no more, also while masks change and where the whole weight is in host memory."""
    size, mib = 1024, 1 << 20  # W has 4 MiB

    def requested(which="current"):
        return torch.cuda.memory_stats()[f"requested_bytes.all.{which}"]

    adapter = APTAdapter.from_linear(nn.Linear(size, size, device=device), 1)
    whole = keep(size, size, device)
    adapter.set_masks(keep(size // 2, size, device), whole)
    adapter.compact(dense="cpu")
    adapter.compact(dense="keep")  # all is queued once
    torch.cuda.synchronize()
    start = requested()
    adapter.set_masks(keep(size // 4, size, device))
    assert requested() - start == -mib
    adapter.set_masks(whole)
    assert requested() - start == 2 * mib
    adapter.compact(dense="cpu")
    assert requested() - start <= 4096 - 2 * mib
    adapter.set_masks(keep(size // 8, size, device))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = requested()
    adapter.set_masks(keep(size // 4, size, device))
    assert requested("peak") - before < 1.5 * mib  # the new copy, and not W
