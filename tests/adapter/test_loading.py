"""load_state_dict of an adapter and of a whole model: all of it or nothing; and optimizers of another size afterwards."""

import copy
import pickle

import pytest
import torch
from families import FAMILIES
from small_adapter import make, masks
from torch import nn

from apt_ext import APTConfig, adapter_parameters, adapters, get_apt_model

FAMILY = FAMILIES["bert"]


def built(seed=0, rank=2, dtype=torch.float64, **config):
    apt = get_apt_model(FAMILY.model(dtype, seed), APTConfig(r=rank, lora_alpha=2 * rank, **config))
    with torch.no_grad():
        for _, adapter in adapters(apt):
            adapter.lora_B[:, : adapter.rank].normal_()
    return apt


def copied(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(module, before):
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize(
    "damage, error, words",
    [
        (lambda s: s.pop("mask_in"), RuntimeError, r"1 Missing key\(s\) in state_dict \(mask_in\)"),
        (lambda s: s.pop("base_layer.weight"), RuntimeError, r"Missing key\(s\) in state_dict \(base_layer.weight\)"),
        (lambda s: (s.pop("lora_A"), s.pop("lora_B")), RuntimeError, r"2 Missing key\(s\) in state_dict \(lora_A, lora_B\)"),
        (lambda s: s.update(lora_C=torch.ones(1)), RuntimeError, r"1 Unexpected key\(s\) in state_dict \(lora_C\)"),
        (
            lambda s: s.update({"base_layer.weight": torch.ones(7, 9)}),
            ValueError,
            r"base_layer.weight must have shape \[7, 10\], got \[7, 9\]",
        ),
        (lambda s: s.update({"base_layer.bias": 3.0}), TypeError, "base_layer.bias must be a Tensor, got float"),
    ],
)
def test_an_adapter_loads_all_or_nothing(damage, error, words):
    adapter, other = make(), make(rank=5)
    other.set_masks(*masks())
    state = other.state_dict()
    damage(state)
    before = copied(adapter)
    with pytest.raises(error, match=words):
        adapter.load_state_dict(state)
    assert_same(adapter, before)
    with pytest.raises(TypeError, match="state_dict: expected a dict, got list"):
        adapter.load_state_dict([])


def test_what_is_missing_or_unknown_is_told_where_it_is_not_strict():
    adapter, other = make(), make(rank=5)
    state = {**other.state_dict(), "more": torch.ones(1)}
    del state["base_layer.bias"]
    told = adapter.load_state_dict(state, strict=False)
    assert told.missing_keys == ["base_layer.bias"] and told.unexpected_keys == ["more"]
    assert adapter.rank == 5 and torch.equal(adapter.weight, other.weight) and not torch.equal(adapter.bias, other.bias)


LAST = "model.bert.pooler.dense."


@pytest.mark.parametrize(
    "damage, error, words",
    [
        ({LAST + "mask_in": torch.full((24,), 2.0)}, ValueError, r"pooler.dense.mask_in must hold values in \[0, 1\]"),
        ({LAST + "rank": torch.tensor(9)}, ValueError, "pooler.dense.rank must lie between"),
        ({LAST + "base_layer.weight": torch.ones(3, 3)}, ValueError, r"must have shape \[24, 24\], got \[3, 3\]"),
        ({"model.classifier.weight": torch.ones(2, 24)}, ValueError, r"model.classifier.weight must have shape \[3, 24\], got \[2, 24\]"),
        ({"model.more": torch.ones(1)}, RuntimeError, r"keys of this Bert.*, got 1 Unexpected key\(s\) in state_dict \(model.more\)"),
        ("model.classifier.bias", RuntimeError, r"1 Missing key\(s\) in state_dict \(model.classifier.bias\)"),
    ],
)
@pytest.mark.parametrize("hidden", [False, True])
def test_a_model_loads_all_or_nothing(damage, error, words, hidden):
    apt, other = built(), built(seed=1, rank=3)
    other.set_block_mask("0.heads", torch.tensor([1.0, 0.0, 0.5]))
    if hidden:
        other.set_block_mask("hidden", torch.arange(24).clamp(max=1).float())
        words = words.replace("classifier.weight", "classifier.base_layer.weight").replace("classifier.bias", "classifier.base_layer.bias")
        if damage == "model.classifier.bias":
            damage = "model.classifier.base_layer.bias"
        elif "model.classifier.weight" in damage:
            damage = {"model.classifier.base_layer.weight": damage["model.classifier.weight"]}
    state = other.state_dict()
    if isinstance(damage, str):
        del state[damage]
    else:
        state.update(damage)
    before, modules = copied(apt), dict(apt.named_modules())
    with pytest.raises(error, match=words):
        apt.load_state_dict(state)
    assert_same(apt, before)
    assert dict(apt.named_modules()) == modules


def test_a_rank_above_max_rank_loads_nothing_of_a_model():
    apt, other = built(max_rank=3), built(seed=1)
    dict(adapters(other))["bert.encoder.layer.1.output.dense"].increase_rank(4)
    before = copied(apt)
    with pytest.raises(ValueError, match=r"layer.1.output.dense.rank must be at most the module's max_rank = 3, got 4"):
        apt.load_state_dict(other.state_dict())
    assert_same(apt, before)


def test_masks_of_hidden_dimensions_load_into_a_model_that_has_none():
    apt, fresh = built(), built(seed=1, rank=4)
    mask = torch.arange(24).clamp(max=4).float() / 4
    apt.set_block_mask("hidden", mask)
    fresh.load_state_dict(apt.state_dict())
    assert torch.equal(fresh.get_block_mask("hidden"), mask)
    assert torch.equal(fresh(**FAMILY.inputs()).logits, apt(**FAMILY.inputs()).logits)
    assert_same(fresh, copied(apt))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-tied", "t5"])
def test_a_state_from_before_hidden_dimensions_were_masked(name):
    family = FAMILIES[name]
    apt = get_apt_model(family.model(), APTConfig(r=2))
    state, first = copied(apt), apt(**family.inputs()).logits
    apt.set_block_mask("hidden", torch.arange(24).clamp(max=4).float() / 4)
    masked = copied(apt)
    with pytest.raises(RuntimeError, match="Missing key"):
        apt.load_state_dict({key: value for key, value in state.items() if "norm" not in key.lower() and "ln_" not in key})
    assert_same(apt, masked)
    apt.load_state_dict(state)
    assert bool((apt.get_block_mask("hidden") == 1).all())
    torch.testing.assert_close(apt(**family.inputs()).logits, first, rtol=1e-12, atol=1e-12)
    apt.load_state_dict(masked)
    assert_same(apt, masked)


def test_a_module_that_loads_in_its_own_way_is_left_to_it():
    class Renamed(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *rest):
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "kernel").T
            super()._load_from_state_dict(state_dict, prefix, *rest)

    def model():
        plain = FAMILY.model()
        plain.extra = nn.Sequential(Renamed(3, 5), nn.BatchNorm1d(5)).double()
        return get_apt_model(plain, APTConfig(r=2, target_modules=["query"]))

    apt, other = model(), model()
    state = other.state_dict()
    state["model.extra.0.kernel"] = state.pop("model.extra.0.weight").T
    apt.load_state_dict(state)
    assert torch.equal(apt.extra[0].weight, other.extra[0].weight)


@pytest.mark.parametrize("way", ["made", "copied", "pickled", "assigned"])
@pytest.mark.parametrize("fused", [False, True])
def test_modules_that_train_whole_are_guarded_too(way, fused, fused_is_guarded):
    """An optimizer of the uncut model's head has not seen the cut, which another model made."""
    apt, cut = built(dtype=torch.float32), built(dtype=torch.float32)
    if way == "copied":
        apt = copy.deepcopy(apt)
    elif way == "pickled":
        apt = pickle.loads(pickle.dumps(apt))  # noqa: S301  # our own
    elif way == "assigned":
        apt.load_state_dict(copied(apt), assign=True)
    cut.set_block_mask("hidden", (torch.arange(24) < 16).float())
    cut.cut()
    optimizers = [torch.optim.AdamW(adapter_parameters(model), lr=1.0, fused=fused) for model in (apt, cut)]
    for model in (apt, cut):
        model(**FAMILY.inputs(), labels=torch.zeros(3, dtype=torch.long)).loss.backward()
    optimizers[1].step()
    head = next(i for i, parameter in enumerate(adapter_parameters(apt)) if parameter is apt.classifier.weight)
    state = optimizers[1].state_dict()
    state["state"] = {head: state["state"][head]}  # of the factors, which are guarded in any case, nothing
    optimizers[0].load_state_dict(state)
    before = copied(apt)
    with pytest.raises(RuntimeError, match=r"state 'exp_avg' has shape \(3, 16\), expected the Parameter's \(3, 24\)"):
        optimizers[0].step()
    assert_same(apt, before)
