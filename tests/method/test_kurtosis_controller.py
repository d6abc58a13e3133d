"""Outliers in a training run: the Controller reads the weights before it chooses, whether masks move in
windows or at every step."""

import pytest
import torch
from families import FAMILIES
from training import batch_for

from apt_ext import APTConfig, Controller, adapter_parameters, get_apt_model

WINDOWS = {"start": 1, "end": 5, "events": 1}
HEAD = 1  # of layer 0: its values are small, and one weight that reads it is very large


def with_an_outlier(name):
    """A head of little salience, since its values are small, and of great kurtosis, which no scale of its
    values changes."""
    model = FAMILIES[name].model()
    with torch.no_grad():
        if name == "gpt2":  # Conv1D [in, out]: queries, keys and values side by side, heads of 8
            attention = model.transformer.h[0].attn
            values = slice(48 + 8 * HEAD, 56 + 8 * HEAD)
            attention.c_attn.weight[:, values] *= 1e-3
            attention.c_attn.bias[values] *= 1e-3
            attention.c_proj.weight[8 * HEAD, 0] = 50.0
        elif name == "llama":  # three key-value groups of 4 channels, each read by two heads
            attention = model.model.layers[0].self_attn
            attention.v_proj.weight[4 * HEAD : 4 * HEAD + 4] *= 1e-3
            attention.o_proj.weight[0, 8 * HEAD] = 50.0
        else:
            attention = model.bert.encoder.layer[0].attention
            attention.self.value.weight[8 * HEAD : 8 * HEAD + 8] *= 1e-3
            attention.self.value.bias[8 * HEAD : 8 * HEAD + 8] *= 1e-3
            attention.output.dense.weight[0, 8 * HEAD] = 50.0
    return get_apt_model(model, APTConfig(r=2, prune=["heads"], density=0.9))


def keeps_the_head(name, schedule, kurtosis):
    apt = with_an_outlier(name)
    optimizer = torch.optim.SGD(adapter_parameters(apt), lr=0.0)
    controller = Controller(apt, optimizer, 6, schedule=schedule, growth=1.0, kurtosis=kurtosis, shrink="none")
    for _ in range(6):
        apt(**batch_for(FAMILIES[name], 0)).loss.backward()
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
    masks = [apt.get_block_mask(f"{layer}.heads") for layer in range(2)]
    assert any(not bool(mask.all()) for mask in masks)
    return bool(masks[0][HEAD])


@pytest.mark.parametrize("schedule", [WINDOWS, {**WINDOWS, "per_step": True}], ids=["windows", "every step"])
@pytest.mark.parametrize(("name", "by_default"), [("llama", True), ("gpt2", True), ("bert", False)])
def test_an_outlier_keeps_a_head_that_salience_would_not(name, by_default, schedule):
    """It counts by default in decoders alone."""
    assert not keeps_the_head(name, schedule, 0.0)
    assert keeps_the_head(name, schedule, 1.0)
    assert keeps_the_head(name, schedule, None) == by_default
