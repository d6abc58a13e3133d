"""Outliers: kurtosis as SciPy defines it, per head, and what the scores do with it."""

import importlib.util

import pytest
import torch
from families import FAMILIES
from torch import nn

from apt_ext import APTAdapter, APTConfig, get_apt_model
from apt_ext.method import BlockScores, kurtosis
from apt_ext.method.score.kurtosis import outliers, row_outliers


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0, 3.0, 4.0, 5.0], -1.3),  # the discrete uniform's -6 (n^2 + 1) / (5 (n^2 - 1))
        ([0.0, 1.0], -2.0),
        ([0.0] * 9 + [1.0], (1 - 3 * 0.1 * 0.9) / (0.1 * 0.9) - 3),  # Bernoulli: (1 - 3 p q) / (p q) - 3
        ([2.0, 2.0, 2.0], 0.0),
        ([0.1, 0.1, 0.1], 0.0),
        ([1e-12, 2e-12, 3e-12, 4e-12, 5e-12], -1.3),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_excess_and_biased(values, expected, dtype):
    assert kurtosis(torch.tensor(values, dtype=dtype)).item() == pytest.approx(expected, abs=2e-5)


@pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="SciPy is not there")
def test_agrees_with_scipy():
    from scipy import stats

    values = torch.randn(5, 40, dtype=torch.float64).exp()
    expected = stats.kurtosis(values.numpy(), axis=1, fisher=True, bias=True)
    torch.testing.assert_close(kurtosis(values), torch.from_numpy(expected))


def flat_linear(out=6, heads=4, size=3):
    """Every product is of the same small size, but for signs: negative excess, so no outliers."""
    linear = nn.Linear(heads * size, out, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(torch.randint(0, 2, linear.weight.shape, generator=torch.Generator().manual_seed(0)) * 2.0 - 1)
    return linear


@pytest.mark.parametrize("head", range(4))
def test_an_outlier_in_a_head_raises_that_head_alone(head):
    linear = flat_linear()
    with torch.no_grad():
        linear.weight[2, 3 * head + 1] = 50.0
    found = outliers(linear, torch.ones(12, dtype=torch.float64), 4)
    assert found[head] > 2 and found.count_nonzero() == 1


def test_an_outlier_of_the_activations_in_a_head_counts_but_not_in_a_neuron():
    linear, mean = flat_linear(), torch.ones(12, dtype=torch.float64)
    mean[8] = 50.0
    assert outliers(linear, mean, 2).nonzero().flatten().tolist() == [1]
    assert torch.equal(outliers(linear, mean, 12), outliers(linear, None, 12))  # a channel's scale changes nothing


def test_it_is_of_the_adapted_weight_and_of_what_is_left():
    adapter = APTAdapter.from_linear(flat_linear(), 1, scaling=1.0)
    with torch.no_grad():
        adapter.lora_A.zero_()[0, 5], adapter.lora_B.zero_()[3, 0] = 1.0, 50.0
    assert outliers(adapter, None, 4).nonzero().flatten().tolist() == [1]
    assert row_outliers(adapter, None).nonzero().flatten().tolist() == [3]
    of_neurons, without = outliers(adapter, None, 12), torch.ones(12)
    without[5] = 0
    adapter.set_masks(mask_in=without)
    assert of_neurons[5] > 0 and torch.equal(outliers(adapter, None, 12), of_neurons * without) and not row_outliers(adapter, None).any()
    mask = torch.ones(6)
    mask[3] = 0
    adapter.set_masks(torch.ones(12), mask)
    assert not outliers(adapter, None, 4).any() and not row_outliers(adapter, None).any()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_weight_scales_what_is_added_and_loss_scale_changes_no_order(name):
    family = FAMILIES[name]
    inputs = family.inputs()
    found = []
    for weight, scale in ((0.0, 1.0), (1.0, 1.0), (2.0, 1.0), (2.0, 64.0)):
        apt = get_apt_model(family.model(), APTConfig(r=2))
        scores = BlockScores(apt, ["heads", "neurons", "hidden"], decay=0.0, kurtosis=weight)
        (apt(**inputs, labels=inputs["input_ids"]).loss * scale).backward()
        scores.salience.update()
        scores.look_for_outliers()
        found.append(scores.scores())
    plain, one, two, scaled = found
    for block, score in plain.items():
        assert bool((one[block] >= score).all())
        torch.testing.assert_close(two[block] - score, 2 * (one[block] - score), rtol=1e-3, atol=float(score.mean()) * 1e-5)
        torch.testing.assert_close(scaled[block], 64 * two[block], rtol=1e-4, atol=0)
    assert any(bool((one[block] > 1.01 * score).any()) for block, score in plain.items())
