"""Adapters that read one x together, where something changes past torch's counters, and where one learns nothing."""

import pytest
import torch
from attentions import an_x, attention

from apt_ext.adapter.shared_inputs import sharing

pytestmark = pytest.mark.usefixtures("shared")


class Gathers:
    """Put a weight in place before a forward and take it away after it, past every counter, as a wrapper that offloads does."""

    def __init__(self, adapter):
        self.whole = adapter.base_layer.weight.data.clone()
        adapter.base_layer.weight.data = torch.zeros_like(self.whole)
        adapter.register_forward_pre_hook(self.put)
        adapter.register_forward_hook(self.take)

    def put(self, adapter, args):
        adapter.base_layer.weight.data = self.whole

    def take(self, adapter, args, output):
        adapter.base_layer.weight.data = torch.zeros_like(self.whole)


def test_other_memory_in_the_place_of_a_weight_is_seen():
    found = []
    for mode in ("never", "always"):
        group, x = attention(), an_x()
        for adapter in group.values():
            Gathers(adapter)
        with sharing(mode):
            found.append([group[name](x) for name in group])  # all of them alive, as in attention
    for alone, together in zip(*found, strict=True):
        torch.testing.assert_close(together, alone)


def test_the_output_of_a_frozen_layer_requires_no_gradient():
    group, x = attention(), an_x()
    for parameter in group["q"].parameters():
        parameter.requires_grad_(False)
    q, k, v = (group[name](x) for name in "qkv")
    assert not q.requires_grad and k.requires_grad and v.requires_grad
