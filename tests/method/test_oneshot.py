"""one_shot: what does nothing goes first, and the model is otherwise as it was."""

import math

import pytest
import torch
from families import EVERY, FAMILIES, keep_first, with_loss

from apt_ext import APTConfig, get_apt_model, shrink
from apt_ext.method import block_scores, cost_of, one_shot, within_density
from apt_ext.method.score.kurtosis import outliers

KEEP = {"heads": 1, "neurons": 5, "hidden": 20}


@EVERY
def test_it_keeps_so_many_of_each_and_changes_nothing_else(family):
    apt = get_apt_model(family.model(), APTConfig(r=2)).train()
    before = [(p, p.detach().clone()) for p in apt.parameters()]
    keep = {**KEEP, "heads": min(2, family.sizes.get("num_key_value_heads", 3))}
    masks = one_shot(apt, with_loss(family, apt), keep)
    assert apt.training and masks.keys() == apt.blocks.keys()
    for name, block in apt.blocks.items():
        assert torch.equal(apt.get_block_mask(name), masks[name]) and int(masks[name].sum()) == keep[block.kind]
    assert all(p.grad is None and torch.equal(p, value) for p, value in before)
    assert all(not module._forward_pre_hooks for module in apt.modules())
    shrink(apt)  # layers that have to be alike are


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
def test_what_does_nothing_goes_first(name):
    """Neurons and heads whose output weights are zero have no gradient."""
    family = FAMILIES[name]
    model = family.model()
    blocks = get_apt_model(family.model(), APTConfig(r=2)).blocks
    with torch.no_grad():
        for block in blocks.values():
            if block.kind == "hidden":
                continue
            weight = model.get_submodule(block.reader).weight
            lanes = weight if type(model.get_submodule(block.reader)).__name__ == "Conv1D" else weight.t()
            size = len(lanes) // block.count
            lanes[: size * (block.count // 2)] = 0  # the first half is dead
    apt = get_apt_model(model, APTConfig(r=2, target_modules=r".*\.(query|q_proj|c_attn|q)"))
    keep = {"heads": 1, "neurons": 3}  # few: behind a ReLU living ones can be idle too
    for block, mask in one_shot(apt, with_loss(family, apt), keep).items():
        assert not mask[: len(mask) // 2].any(), block


def test_gradients_that_were_there_stay():
    family = FAMILIES["bert"]
    apt = get_apt_model(family.model(), APTConfig(r=2))
    apt(**next(with_loss(family, apt))).loss.backward()
    before = {name: p.grad.clone() for name, p in apt.named_parameters() if p.grad is not None}
    one_shot(apt, with_loss(family, apt), {"neurons": 5})
    after = {name: p.grad for name, p in apt.named_parameters() if p.grad is not None}
    assert before.keys() == after.keys() and all(torch.equal(after[name], grad) for name, grad in before.items())


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ({"heads": 4}, "expected 1 to 3 heads, got 4"),
        ({"neurons": 0}, "1 to 20 neurons"),
        ({"lanes": 1}, r"kinds of blocks of this model \(heads, neurons, hidden\), got 'lanes'"),
        (1.5, r"a density in \[0, 1\], got 1.5"),
    ],
)
def test_it_refuses_in_words(keep, words):
    family = FAMILIES["bert"]
    apt = keep_first(get_apt_model(family.model(), APTConfig(r=2)), neurons=9)
    with pytest.raises(ValueError, match=words):
        one_shot(apt, with_loss(family, apt), keep)
    with pytest.raises(ValueError, match="batches: expected at least one"):
        one_shot(apt, [], {"heads": 2})
    with pytest.raises(ValueError, match=r"batches\[0\]: expected labels, got a batch for which"):
        one_shot(apt, [family.inputs()], {"heads": 2})
    with pytest.raises(TypeError, match="keep: expected an int for heads, got float"):
        one_shot(apt, with_loss(family, apt), {"heads": 2.0})
    with pytest.raises(TypeError, match="keep must be a number, got NoneType"):
        one_shot(apt, with_loss(family, apt), None)
    with pytest.raises(TypeError, match=f"model: expected an APTModel, got {type(apt.model).__name__}"):
        one_shot(apt.model, [], {"heads": 2})
    assert int(apt.get_block_mask("0.neurons").sum()) == 9 and bool(apt.get_block_mask("0.heads").all())


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
def test_a_density_is_met_and_nothing_more_would_fit(name, uniform):
    family = FAMILIES[name]
    apt = get_apt_model(family.model(), APTConfig(r=2, prune=["heads", "neurons"], round_to=4, uniform=uniform))
    masks = one_shot(apt, with_loss(family, apt), 0.5)
    cost = cost_of(apt.model, apt.blocks)
    full = {block: apt.blocks[block].count for block in apt.blocks}
    kept = {block: int(apt.get_block_mask(block).sum()) for block in apt.blocks}
    assert masks.keys() == {block for block in apt.blocks if block != "hidden"}
    assert 0.2 < cost.total(kept) / cost.total(full) <= 0.5
    for block, mask in masks.items():
        assert torch.equal(apt.get_block_mask(block), mask) and (apt.blocks[block].kind == "heads" or kept[block] % 4 == 0)
    if uniform:
        assert len({kept[block] for block in masks if apt.blocks[block].kind == "neurons"}) == 1


def test_a_density_that_is_rounded_down_keeps_what_it_says():
    """As at an event of a Controller: 0.29 * 100 is a little below 29."""
    apt = get_apt_model(FAMILIES["bert"].model(), APTConfig(r=2, round_to=1, uniform=False))
    cost, full = cost_of(apt.model, apt.blocks), {name: block.count for name, block in apt.blocks.items()}
    scores = {name: torch.arange(1.0, 1.0 + full[name]) for name in ("0.neurons", "1.neurons")}
    for left in range(2, 20):
        kept = {**full, "0.neurons": left, "1.neurons": left}
        masks = within_density(apt, scores, math.nextafter(cost.total(kept) / cost.total(full), 0.0))
        assert sum(int(mask.sum()) for mask in masks.values()) == 2 * left


def test_within_density_goes_by_the_scores_for_what_a_block_costs():
    """BERT's layers: a head costs more than a neuron, so of equal scores neurons stay."""
    apt = get_apt_model(FAMILIES["bert"].model(), APTConfig(r=2, round_to=1, uniform=False))
    ones = {name: torch.ones(block.count) for name, block in apt.blocks.items() if block.kind != "hidden"}
    masks = within_density(apt, ones, 0.5)
    assert [int(masks[f"{layer}.heads"].sum()) for layer in (0, 1)] == [1, 1] and sum(int(masks[f"{n}.neurons"].sum()) for n in (0, 1)) > 30
    assert masks["0.neurons"][2]
    assert within_density(apt, {**ones, "1.neurons": torch.zeros(20)}, 0.5)["1.neurons"].sum() < masks["0.neurons"].sum()  # not uniform
    ones["0.neurons"][2] = 0
    assert not within_density(apt, ones, 0.5)["0.neurons"][2]
    assert bool(apt.get_block_mask("0.heads").all())  # nothing is masked here
    keep_first(apt, neurons=5)
    assert not within_density(apt, ones, 0.4)["0.neurons"][5:].any()  # what is gone stays gone
    with pytest.raises(ValueError, match=r"keep: expected a density of at least 0\.\d+, which is what always stays, got 0\.01"):
        within_density(apt, ones, 0.01)
    with pytest.raises(ValueError, match="expected a density of at least"):
        one_shot(apt, with_loss(FAMILIES["bert"], apt), 0.01)
    assert bool(apt.get_block_mask("0.heads").all())


def test_kurtosis_is_of_all_the_samples_and_raises_what_has_an_outlier():
    family = FAMILIES["llama"]
    apt = get_apt_model(family.model(), APTConfig(r=2, prune=["heads", "neurons"]))
    plain = block_scores(apt, ["heads", "neurons"], with_loss(family, apt))
    weighted = block_scores(apt, ["heads", "neurons"], with_loss(family, apt), 2.0)
    turned = block_scores(apt, ["heads", "neurons"], with_loss(family, apt, (2, 1)), 2.0)
    assert any(not torch.equal(plain[name], weighted[name]) for name in plain)
    seen = []
    handle = apt.model.get_submodule("model.layers.1.self_attn.o_proj").register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for batch in with_loss(family, apt):
        apt(**batch)
    handle.remove()
    mean = torch.cat(seen).flatten(0, 1).sum(0)
    expected = outliers(apt.model.get_submodule("model.layers.1.self_attn.o_proj"), mean, 3)
    scale = torch.cat([plain["0.heads"], plain["1.heads"]]).mean()
    torch.testing.assert_close(weighted["1.heads"], (plain["1.heads"] + 2.0 * scale * expected).float(), check_dtype=False)
    for name in plain:
        torch.testing.assert_close(weighted[name], turned[name])
    with torch.no_grad():
        apt.model.get_submodule("model.layers.1.mlp.down_proj").weight[3, 11] = 40.0
    plain, weighted = (block_scores(apt, ["neurons"], with_loss(family, apt), weight)["1.neurons"] for weight in (0.0, 2.0))
    assert int((weighted - plain).argmax()) == 11
    for keep in ({"neurons": 3}, 0.5):
        found = []
        for weight in (0.0, 1e6):
            found.append(torch.cat(list(one_shot(apt, with_loss(family, apt), keep, kurtosis=weight).values())))
            for name, block in apt.blocks.items():
                apt.set_block_mask(name, torch.ones(block.count))
        assert not torch.equal(*found)


@pytest.mark.parametrize("weight", [0.0, 100.0])
def test_what_is_out_stays_out(weight):
    """Whatever outliers its weights have."""
    family = FAMILIES["bert"]
    apt = keep_first(get_apt_model(family.model(), APTConfig(r=2)), neurons=9)
    before = {name: apt.get_block_mask(name) for name in apt.blocks if name.endswith("neurons")}
    masks = one_shot(apt, with_loss(family, apt), {"neurons": 9}, kurtosis=weight)
    assert all(torch.equal(mask, before[name]) for name, mask in masks.items())


@pytest.mark.parametrize(
    ("name", "keep", "words"),
    [
        ("bert", {"heads": 2}, "one_shot: no stock config can say what keep leaves: BertConfig makes heads of hidden_size"),
        ("bert", {"neurons": 5}, None),
        ("llama", {"heads": 2}, None),
    ],
)
def test_what_no_stock_config_can_say_is_said_first(name, keep, words, caplog):
    family = FAMILIES[name]
    apt = get_apt_model(family.model(), APTConfig(r=2))

    def batches():
        assert ("one_shot:" in caplog.text) == (words is not None)  # before the first batch
        yield from with_loss(family, apt)

    one_shot(apt, batches(), keep)
    assert words is None or words in caplog.text
