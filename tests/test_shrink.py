"""shrink: the cut model is the masked model, smaller and stock."""

import pytest
import torch
from test_model import assert_same, batch, half, snapshot, tiny_bert, trained

from apt_ext.adapter import APTAdapter
from apt_ext.config import APTConfig
from apt_ext.model import adapters
from apt_ext.structure.shrink import shrink

ALL = APTConfig(r=4)


def masked(masks, dtype=torch.float64, config=ALL, **bert):
    apt = trained(tiny_bert(dtype=dtype, **bert), config)
    for name, mask in masks.items():
        apt.set_block_mask(name, mask)
    return apt


def first(kept, count=48, value=1.0):
    return (torch.arange(count) < kept).float() * value


MASKS = {
    "none": {},
    "half": {"0.neurons": half(), "1.neurons": half()},
    "fractions": {"0.neurons": half() * 0.37, "1.neurons": torch.linspace(0, 1, 48)},
    "one survivor": {"0.neurons": first(1), "1.neurons": first(1)},
    "empty": {"0.neurons": first(0), "1.neurons": first(0)},
    "one layer empty": {"1.neurons": first(0)},
    "different widths": {"0.neurons": first(17), "1.neurons": first(40, value=0.5)},
}


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["float64", "float32"])
@pytest.mark.parametrize("config", [ALL, APTConfig(r=4, target_modules=["query"])], ids=["adapters", "carriers"])
def test_cut_is_masked_and_stock(masks, dtype, tolerance, config):
    apt = masked(masks, dtype, config)
    before = snapshot(apt)
    expected = apt(**batch(), output_hidden_states=True)
    small = shrink(apt)
    got = small(**batch(), output_hidden_states=True)
    for theirs, ours in zip((expected.logits, *expected.hidden_states), (got.logits, *got.hidden_states), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=tolerance)
    assert type(small) is type(apt.model) and not small.training
    assert all(type(module).__module__.split(".")[0] in ("torch", "transformers") for module in small.modules())
    assert all(p.requires_grad and p.dtype == dtype for p in small.parameters())
    widths = [int((apt.get_block_mask(f"{i}.neurons") != 0).sum()) for i in range(2)]
    for width, layer in zip(widths, small.bert.encoder.layer, strict=True):
        up, down = layer.intermediate.dense, layer.output.dense
        assert up.weight.shape == (width, 32) and up.bias.shape == (width,) and up.out_features == width
        assert down.weight.shape == (32, width) and down.bias.shape == (32,) and down.in_features == width
    assert small.config.intermediate_size == (widths[0] if widths[0] == widths[1] else 48)
    # a removed neuron is a row, its bias and a column
    removed = sum(48 - width for width in widths) * (2 * 32 + 1)
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in tiny_bert().parameters()) - removed
    assert_same(before, snapshot(apt))
    assert apt.config.intermediate_size == 48
    assert not {p.data_ptr() for p in small.parameters() if p.numel()} & {p.data_ptr() for p in apt.parameters()}


def test_the_small_model_trains():
    small = shrink(masked(MASKS["half"]))
    small(**batch()).loss.backward()
    assert small.bert.encoder.layer[0].intermediate.dense.weight.grad.abs().sum() > 0


def test_pruned_lanes_may_hold_anything():
    mask = half()
    clean = shrink(masked({"0.neurons": mask}))
    apt = masked({"0.neurons": mask})
    up = dict(adapters(apt))["bert.encoder.layer.0.intermediate.dense"]
    down = dict(adapters(apt))["bert.encoder.layer.0.output.dense"]
    gone = mask == 0
    with torch.no_grad():
        for tensor in (up.weight, up.bias, up.lora_B):
            tensor[gone] = float("nan")
        down.weight[:, gone] = float("inf")
        down.lora_A[:, gone] = float("nan")
    small = shrink(apt)
    for (name, ours), theirs in zip(small.named_parameters(), clean.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_merged_model_and_an_unmerged_one_shrink_to_the_same():
    apt = masked(MASKS["fractions"])
    expected = shrink(apt).state_dict()
    for _, adapter in adapters(apt):
        adapter.merge_weights()
    got = shrink(apt).state_dict()
    assert all(torch.equal(value, got[name]) for name, value in expected.items())
    assert all(adapter.merged for _, adapter in adapters(apt))


def test_merge_then_cut_is_cut_of_the_merged():
    apt = masked(MASKS["half"])
    small = shrink(apt).state_dict()
    kept = half().nonzero().flatten()
    full = apt.merge_and_unload().state_dict()
    for i in range(2):
        layer = f"bert.encoder.layer.{i}"
        assert torch.equal(small[f"{layer}.intermediate.dense.weight"], full[f"{layer}.intermediate.dense.weight"][kept])
        assert torch.equal(small[f"{layer}.output.dense.weight"], full[f"{layer}.output.dense.weight"][:, kept])


def test_shrinking_twice_is_shrinking_once_by_both_masks():
    from apt_ext.model import get_apt_model

    once = masked({"0.neurons": first(8), "1.neurons": first(8)}, config=APTConfig(r=4, target_modules=["query"]))
    small = shrink(masked({"0.neurons": first(24), "1.neurons": first(24)}, config=APTConfig(r=4, target_modules=["query"])))
    again = get_apt_model(small, APTConfig(r=4, target_modules=["query"]))
    assert again.blocks["0.neurons"].count == 24
    for name in again.blocks:
        again.set_block_mask(name, first(8, 24))
    expected, got = shrink(once).state_dict(), shrink(again).state_dict()
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


def test_a_saved_linear_is_cut_too():
    config = APTConfig(r=4, target_modules=["query"], modules_to_save=["layer.0.intermediate.dense", "layer.0.output"])
    apt = masked({"0.neurons": half() * 0.5}, config=config)
    small = shrink(apt)
    assert small.bert.encoder.layer[0].intermediate.dense.out_features == 24
    assert torch.allclose(small(**batch()).logits, apt(**batch()).logits, rtol=0, atol=1e-10)


def test_it_refuses_by_name_and_leaves_the_model():
    apt = masked(MASKS["half"])
    adapter: APTAdapter = dict(adapters(apt))["bert.encoder.layer.1.attention.self.key"]
    with torch.no_grad():
        adapter.lora_B[0, 0] = float("inf")
    before = snapshot(apt)
    with pytest.raises(RuntimeError, match=r"^bert.encoder.layer.1.attention.self.key: .*finite"):
        shrink(apt)
    assert_same(before, snapshot(apt))
    with pytest.raises(TypeError, match="model: expected an APTModel, got BertForSequenceClassification"):
        shrink(tiny_bert())
