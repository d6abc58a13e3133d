"""A CUDA graph keeps the widths that a compacted layer had when it was captured: replayed after others it is never silently wrong."""

import logging

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


CHANGES = {
    "fewer inputs": (keep(9), keep(30, 40), True),
    "fewer outputs": (keep(20), keep(3, 40), True),
    "more": (keep(30), keep(40, 40), True),
    "all": (keep(32), keep(40, 40), True),
    "fractions": (keep(20, value=0.5), keep(30, 40), True),
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
    adapter.packing.current.note_capture()
    with caplog.at_level(logging.INFO, "apt_ext"):
        adapter.set_masks(mask_in, mask_out)
        assert [record.levelname for record in caplog.records] == ["WARNING"] * warned
        adapter.set_masks(keep(2), keep(2, 40))
        adapter.set_masks(keep(30), keep(30, 40))
    assert len(caplog.records) == 1 and "capture it again" in caplog.text
    assert adapter.packing.current.packed is packed
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


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_captured_graph(device, dtype, change, caplog):
    """Replayed after a change of masks: right where the widths are equal, said where not, and NaN where less is kept."""
    adapter, (mask_in, mask_out, warned) = compacted(device, dtype), CHANGES[change]
    x = torch.randn(16, 32, device=device, dtype=dtype)

    def captured():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            adapter(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            y = adapter(x)
        return graph, y

    def close(y):
        want = expected(adapter, x.float() if dtype == torch.float32 else x)
        torch.testing.assert_close(y, want.to(dtype), rtol=2e-2, atol=2e-2)

    graph, y = captured()
    graph.replay()
    close(y)
    adapter.set_masks(mask_in.to(device), mask_out.to(device))
    assert ("capture it again" in caplog.text) == warned
    graph.replay()
    if not warned:
        close(y)
    elif change.startswith("fewer") and not torch.isnan(y).any():
        close(y)  # fewer outputs are the first rows of what was captured
    again, other = captured()
    again.replay()
    close(other)
