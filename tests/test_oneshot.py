"""one_shot: what does nothing goes first, and the model is otherwise as it was."""

import pytest
import torch
from families import EVERY, FAMILIES, keep_first

from apt_ext import APTConfig, get_apt_model, shrink
from apt_ext.method import one_shot

KEEP = {"heads": 1, "neurons": 5, "hidden": 20}


def with_loss(family, apt, seeds=(1, 2)):
    """Batches with labels, for whatever head the model has."""
    for seed in seeds:
        inputs = family.inputs(seed)
        if "SequenceClassification" in family.kind:
            yield {**inputs, "labels": torch.tensor([0, 1, 2])}
        elif family.alike:
            yield {**inputs, "labels": inputs["decoder_input_ids"]}
        else:
            yield {**inputs, "labels": inputs["input_ids"]}


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
    ("keep", "words"), [({"heads": 4}, "expected 1 to 3 heads, got 4"), ({"neurons": 0}, "1 to 20 neurons"), ({"lanes": 1}, "1 to 0 lanes")]
)
def test_it_refuses_in_words(keep, words):
    family = FAMILIES["bert"]
    apt = keep_first(get_apt_model(family.model(), APTConfig(r=2)), neurons=9)
    with pytest.raises(ValueError, match=words):
        one_shot(apt, with_loss(family, apt), keep)
    with pytest.raises(ValueError, match="batches: expected at least one"):
        one_shot(apt, [], {"heads": 2})
    assert int(apt.get_block_mask("0.neurons").sum()) == 9 and bool(apt.get_block_mask("0.heads").all())
