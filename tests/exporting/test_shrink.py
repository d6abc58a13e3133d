"""shrink: the cut model is the masked model, smaller and stock."""

import dataclasses

import pytest
import torch
from cases import crossed, turn
from families import EVERY, FAMILIES, GENERATING, ONE_EACH, adapted, close, generated, mask_all, outputs, some, streams, tolerance
from tiny_bert import ALL, MASKS, assert_same, batch, first, half, masked, snapshot, tiny_bert

from apt_ext.adapter.layer import APTAdapter
from apt_ext.config import APTConfig
from apt_ext.exporting.shrinking import shrink
from apt_ext.model import adapters, get_apt_model
from apt_ext.pruning.architectures.lookup import find_blocks


@pytest.mark.parametrize(
    ("masks", "dtype", "around"),
    crossed(
        MASKS,
        (torch.float64, torch.float32),
        ("adapters", "carriers"),
        daily=lambda _, dtype, around: (dtype == torch.float64) == (around == "adapters"),
    ),
)
def test_cut_is_masked_and_stock(masks, dtype, around):
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    apt = masked(MASKS[masks], dtype, ALL if around == "adapters" else APTConfig(r=4, target_modules=["query"]))
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
    once = masked({"0.neurons": first(8), "1.neurons": first(8)}, config=APTConfig(r=4, target_modules=["query"]))
    small = shrink(masked({"0.neurons": first(24), "1.neurons": first(24)}, config=APTConfig(r=4, target_modules=["query"])))
    again = get_apt_model(small, APTConfig(r=4, target_modules=["query"]))
    assert again.blocks["0.neurons"].count == 24
    for name in ("0.neurons", "1.neurons"):
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


# -- every architecture --------------------------------------------------------------------------------------------------

KINDS = [("heads",), ("neurons",), ("hidden",), ("heads", "neurons", "hidden")]


def is_stock(model):
    return all(type(module).__module__.split(".")[0] in ("torch", "transformers") for module in model.modules())


HOWS = ["hard", "soft", "empty", "one"]
STOCK = list(FAMILIES)


def by_day(name, kinds, how):
    """Every family under each of the kinds and, by turns, of the ways."""
    return name in ONE_EACH or how == HOWS[(STOCK.index(name) + KINDS.index(kinds)) % 4] or (len(kinds) == 3 and how == "soft")


@pytest.mark.parametrize(("name", "kinds", "how"), crossed(STOCK, KINDS, HOWS, daily=by_day))
def test_every_family_computes_the_same_when_cut(name, kinds, how, caplog):
    family = FAMILIES[name]
    apt = adapted(family)
    dense = outputs(apt, family.inputs())
    masks = some(family, apt.blocks, kinds, how)
    if how == "empty" and "hidden" in masks:
        masks["hidden"] = torch.arange(24).clamp(max=1).float()
    expected = outputs(mask_all(apt, masks), family.inputs())
    stream, kept = streams(apt, family.inputs()), masks.get("hidden", torch.ones(24)) != 0
    state = {name: value.clone() for name, value in apt.state_dict().items()}
    small = shrink(apt)
    close(outputs(small, family.inputs()), expected, tolerance(family, kinds))
    assert stream and not any(bool(state[..., ~kept].any()) for state in stream)
    output = small.get_output_embeddings()
    tied = output is not None and output.weight is small.get_input_embeddings().weight  # its norm may take back a scale: see decisions.md
    alike = slice(-1 if tied and "hidden" in kinds else None)
    close(streams(small, family.inputs())[alike], [state[..., kept] for state in stream[alike]], tolerance(family, kinds))
    if any(bool((mask != 1).any()) for mask in masks.values()):
        assert (dense[0] - expected[0]).abs().max() > 1e-4
    assert is_stock(small) and type(small) is type(apt.model)
    for name, block in find_blocks(small).items():
        kept = int((masks.get(name, torch.ones(apt.blocks[name].count)) != 0).sum())
        assert block.count == kept or (kept == 0 and block.count == 1 and f"{name}" in caplog.text)
    assert all(torch.equal(value, state[name]) for name, value in apt.state_dict().items())


CACHED = ["hard", "empty", "first"]


@pytest.mark.parametrize(
    ("decoder", "how", "dropout"),
    crossed(GENERATING, CACHED, (False, True), daily=lambda name, how, dropout: not dropout or how == turn(name, GENERATING, CACHED)),
)
def test_generation_with_and_without_cache(decoder, how, dropout):
    family = FAMILIES[decoder]
    rates = {"gpt2": "resid_pdrop", "t5": "dropout_rate"}
    name = rates.get(family.model().config.model_type, "attention_dropout")
    apt = adapted(family, APTConfig(r=2, lora_dropout=0.5 if dropout else 0.0), **{name: 0.5 if dropout else 0.0})
    if how == "first":  # a cache is asked for its length in layer 0
        empty = some(family, apt.blocks, ("heads",), "empty")
        mask_all(
            apt, {name: mask for name, mask in empty.items() if name == "0.heads" or name.startswith("decoder.") and "cross" not in name}
        )
    else:
        mask_all(apt, some(family, apt.blocks, ("heads", "neurons"), how))
    if how == "hard":
        apt.set_block_mask("hidden", (torch.arange(24) % 4 > 0).float())
    expected = generated(apt.model, family.inputs(), use_cache=False)
    small = shrink(apt)
    assert all(block.count for name, block in find_blocks(small).items() if name.endswith("0.heads") and not name.startswith("encoder"))
    within = tolerance(family, ("hidden",))
    close(generated(apt.model, family.inputs(), use_cache=True), expected, within)
    close(generated(small, family.inputs(), use_cache=False), expected, within)
    close(generated(small, family.inputs(), use_cache=True), expected, within)


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama"])
def test_training_with_dropout_is_the_same_too(name):
    """Where a cut leaves the shapes of what dropout draws, the same generator gives the same outputs."""
    rates = {"gpt2": "resid_pdrop", "llama": "attention_dropout", "bert": "hidden_dropout_prob", "distilbert": "dropout"}
    family = FAMILIES[name]
    apt = adapted(family, **{rates[name]: 0.3})
    mask_all(apt, some(family, apt.blocks, ("neurons",), "soft"))
    small = shrink(apt).train()
    apt.train()
    found = []
    for model in (apt, small):
        torch.manual_seed(7)
        found.append(outputs(model, family.inputs()))
    close(*found)
    assert (found[0][0] - outputs(apt.eval(), family.inputs())[0]).abs().max() > 1e-3


@EVERY
def test_cutting_twice_is_cutting_once_by_both_masks(family):
    every = ("heads", "neurons", "hidden")
    once = adapted(family)
    first_masks = some(family, once.blocks, every, "soft", seed=5)
    fresh = APTConfig(r=1, target_modules=r".*\.(query|q_lin|q_proj|c_attn|q)")
    again = get_apt_model(shrink(mask_all(once, first_masks)), fresh).eval()
    second_masks = some(family, again.blocks, every, "hard", seed=6)
    small = shrink(mask_all(again, second_masks))
    both = {}
    for name, mask in first_masks.items():
        both[name] = mask.clone()
        both[name][mask != 0] *= second_masks[name]
    direct = shrink(mask_all(once, both))
    close(outputs(small, family.inputs()), outputs(direct, family.inputs()), tolerance(family, every))
    assert {n: b.count for n, b in find_blocks(small).items()} == {n: b.count for n, b in find_blocks(direct).items()}


@EVERY
def test_merging_first_changes_nothing(family):
    apt = adapted(family)
    mask_all(apt, some(family, apt.blocks, ("heads", "neurons"), "soft"))
    small = shrink(apt).state_dict()
    kept = {name: apt.get_block_mask(name) for name in apt.blocks}
    plain = get_apt_model(apt.merge_and_unload(), APTConfig(r=1, target_modules=r".*\.(query|q_lin|q_proj|c_attn|q)"))
    again = shrink(mask_all(plain, {name: (mask != 0).float() for name, mask in kept.items()})).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in small.items())


@EVERY
def test_ties_are_kept(family):
    small = shrink(mask_all(apt := adapted(family), some(family, apt.blocks, ("hidden",), "soft")))
    tied = {name for name, p in family.model().named_parameters(remove_duplicate=False)} - {n for n, _ in family.model().named_parameters()}
    assert tied == {n for n, _ in small.named_parameters(remove_duplicate=False)} - {n for n, _ in small.named_parameters()}


@EVERY
def test_the_size_is_what_the_blocks_say(family):
    """Parameters of the cut model are those of a stock model with the cut's config, where one can say it."""
    apt = adapted(family)
    masks = {name: mask for name, mask in some(family, apt.blocks, ("neurons",), "one").items()}
    small = shrink(mask_all(apt, masks))
    stock = type(small)(small.config)
    assert {n: p.shape for n, p in stock.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}


def test_layers_that_share_a_position_bias_must_be_alike():
    family = FAMILIES["t5"]
    apt = adapted(family)
    apt.set_block_mask("encoder.0.heads", torch.tensor([1.0, 1, 0]))
    with pytest.raises(ValueError, match=r"encoder.1.heads: expected the same heads of encoder.0.heads.* \[0, 1, 2\] of 3"):
        shrink(apt)
    apt.set_block_mask("encoder.1.heads", torch.tensor([1.0, 0, 1]))
    with pytest.raises(ValueError, match="encoder.1.heads: expected the same heads"):
        shrink(apt)
    apt.set_block_mask("encoder.1.heads", torch.tensor([1.0, 1, 0]))
    apt.set_block_mask("decoder.1.cross_heads", torch.tensor([0.0, 1, 0]))
    with pytest.raises(ValueError, match="decoder.1.cross_heads: expected the number of heads"):
        shrink(apt)
    apt.set_block_mask("decoder.0.cross_heads", torch.tensor([1.0, 0, 0]))
    close(outputs(shrink(apt), family.inputs()), outputs(apt, family.inputs()))


def test_no_dimension_left_is_refused():
    apt = adapted(FAMILIES["bert"])
    apt.set_block_mask("hidden", torch.zeros(24))
    with pytest.raises(ValueError, match="hidden: expected a mask that keeps at least one dimension"):
        shrink(apt)


@pytest.mark.parametrize("name", ["roberta", "roberta-mlm", "llama", "gpt2", "t5"])
@pytest.mark.parametrize("kind", ["bare", "ForTokenClassification", "ForQuestionAnswering", "ForSequenceClassification"])
def test_other_heads_of_the_same_architecture(name, kind):
    family = FAMILIES[name]
    base = family.kind.split("For")[0].removesuffix("LMHeadModel")
    sizes = {**family.sizes, "pad_token_id": 0, "num_labels": 2 if kind == "ForQuestionAnswering" else 3}
    other = dataclasses.replace(family, kind=base + ("Model" if kind == "bare" else kind), sizes=sizes)
    model = other.model()
    inputs = family.inputs()
    if name == "t5" and kind == "ForTokenClassification":
        del inputs["decoder_input_ids"]
    elif name == "t5" and kind == "ForSequenceClassification":
        inputs["input_ids"][:, -3], inputs["attention_mask"] = 1, torch.ones_like(inputs["attention_mask"])
        model.config.eos_token_id = 1
        inputs["decoder_input_ids"] = inputs["input_ids"].clone()
    apt = get_apt_model(model, APTConfig(r=2)).eval()
    mask_all(apt, some(family, apt.blocks, ("heads", "neurons", "hidden"), "hard"))
    with torch.no_grad():
        expected, got = apt(**inputs), shrink(apt)(**inputs)
    for ours, theirs in zip(got.to_tuple(), expected.to_tuple(), strict=True):
        if isinstance(ours, torch.Tensor):
            if ours.shape != theirs.shape:  # a bare model hands on the residual stream
                theirs = theirs[..., apt.get_block_mask("hidden") != 0]
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)


def test_each_type_of_layer_has_a_cache_of_its_own():
    """Where full and sliding attention alternate, the first layer of each is asked for the length."""
    family = FAMILIES["qwen2-sliding"]
    apt = adapted(family)
    assert apt.config.layer_types == ["full_attention", "sliding_attention"]
    apt.set_block_mask("1.heads", torch.zeros(3))
    expected = generated(apt.model, family.inputs(), use_cache=False)
    small = shrink(apt)
    assert find_blocks(small)["1.heads"].count == 1
    close(generated(small, family.inputs(), use_cache=True), expected)
