"""What the adapter, the model level and the files refuse: every argument of the wrong kind, in words, and nothing has changed."""

import copy
import re
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import apt_ext
from apt_ext import APTAdapter, APTConfig, APTModel, get_apt_model, hold_pruned

NO_NUMBER = [None, "1", [1.0], {}, True, 1j, torch.tensor(1.0), torch.ones(3), object()]
NO_INT = [*NO_NUMBER, 1.0, float("nan")]
NO_MODULE = [None, "model", 3, [], {}, torch.ones(2)]
NO_PATH = [None, 3, 1.5, True, [], {}, torch.ones(2), b"path"]


def adapter():
    torch.manual_seed(0)
    return APTAdapter.from_linear(nn.Linear(6, 4), 2)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4))


@contextmanager
def refused(name, *kinds):
    """The contract's own errors, none derived from them, which name the argument and say what came."""
    with pytest.raises(kinds or (TypeError, ValueError)) as error:
        yield
    text = str(error.value)
    assert type(error.value) in (TypeError, ValueError, RuntimeError) and name in text and "got " in text, (type(error.value), text)


@pytest.mark.parametrize("name", ["scaling", "dropout", "init_std"])
def test_numbers_of_an_adapter(name):
    for bad in NO_NUMBER:
        if not (bad is None and name == "init_std"):
            with refused(name, TypeError):
                APTAdapter(6, 4, 2, **{name: bad})
            with refused(name, TypeError):
                APTAdapter.from_linear(nn.Linear(6, 4), 2, **{name: bad})
    for bad in (float("nan"), float("inf"), 10**400):
        with refused(name, ValueError):
            APTAdapter(6, 4, 2, **{name: bad})
    with pytest.raises(ValueError, match=r"lora_alpha: expected a finite number"):
        APTConfig(lora_alpha=10**400)


def test_sizes_types_and_places_of_an_adapter():
    for bad in NO_INT:
        with refused("rank", TypeError):
            APTAdapter.from_linear(nn.Linear(6, 4), bad)
        with refused("new_rank", TypeError):
            adapter().increase_rank(bad)
        with refused("dtype", TypeError):
            APTAdapter(6, 4, 2, dtype=bad) if bad is not None else APTAdapter(6, 4, 2, dtype=int)
    with refused("dtype", TypeError):
        APTAdapter.from_linear(nn.Linear(6, 4), 2, dtype=torch.ones(2))
    for bad in ("x", "cuda:99", -1, 1 << 70, 1.5):
        with refused("device"):
            APTAdapter(6, 4, 2, device=bad)


def test_a_mask_of_another_layout():
    lone = adapter()
    for bad in (torch.ones(6).to_sparse(), torch.nested.nested_tensor([torch.ones(2), torch.ones(4)], layout=torch.jagged)):
        with refused("mask_in", TypeError):
            lone.set_masks(bad)
        assert bool((lone.mask_in == 1).all())


def test_a_mask_that_leaves_its_range_by_less_than_float32_says():
    lone = adapter()
    for bad in (1 + 1e-12, -1e-60):
        with refused("mask_in", ValueError):
            lone.set_masks(torch.full((6,), bad, dtype=torch.float64))
        assert bool((lone.mask_in == 1).all())


def test_an_input_that_is_no_tensor_beside_a_mask():
    with refused("x", TypeError):
        adapter()([1.0] * 6, mask_in=torch.ones(6))


def test_choices_and_generators():
    one = adapter()
    before = copy.deepcopy(one.state_dict())
    for bad in (None, "x", 3, [], torch.ones(3)):
        with refused("keep", ValueError):
            one.merge_weights(bad)
        with refused("init_type", ValueError):
            one.increase_rank(3, init_type=bad)
        if bad is not None:
            with refused("generator", TypeError):
                one.increase_rank(3, generator=bad)
    for key, value in one.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_linears_that_do_not_hold_together():
    def spoilt(**parts):
        linear = nn.Linear(6, 4)
        for name, value in parts.items():
            setattr(linear, name, nn.Parameter(value))
        return linear

    with refused("weight", ValueError):
        APTAdapter.from_linear(spoilt(weight=torch.zeros(4)), 2)
    for bias in (torch.zeros(3), torch.zeros(4, dtype=torch.float64), torch.zeros(4, device="meta"), torch.zeros(1, 4)):
        with refused("bias", ValueError):
            APTAdapter.from_linear(spoilt(bias=bias), 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_linear_whose_weight_is_a_method():
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear})
    with refused("linear", TypeError):
        APTAdapter.from_linear(quantised[0], 2)


def test_a_linear_with_hooks_is_refused():
    """They would not run: an adapter computes with the weight and never calls the layer."""

    def hooked(how):
        linear = nn.Linear(6, 4)
        how(linear)
        return linear

    for how in (
        lambda linear: linear.register_forward_hook(lambda module, args, output: 2 * output),
        lambda linear: linear.register_forward_pre_hook(lambda module, args: None),
        lambda linear: setattr(linear, "forward", lambda x: x),
    ):
        with refused("hook", RuntimeError):
            APTAdapter.from_linear(hooked(how), 2)
        plain = nn.Sequential(hooked(how), nn.Linear(4, 4))
        with refused("0: linear", RuntimeError):
            get_apt_model(plain, APTConfig(r=2))
        assert type(plain[0]) is nn.Linear and plain[1].weight.requires_grad


def test_what_is_no_module():
    for bad in NO_MODULE:
        for call in (
            apt_ext.adapters,
            apt_ext.adapter_parameters,
            apt_ext.shrink,
            lambda m: get_apt_model(m, APTConfig()),
            lambda m: apt_ext.plan(m, APTConfig()),
            lambda m: apt_ext.export(m, "never-made"),
        ):
            with refused("model", TypeError):
                call(bad)
    for bad in (nn.Sequential(), nn.Linear(3, 3)):
        with refused("model", ValueError):
            get_apt_model(bad, APTConfig(r=2))


def test_what_a_plan_refuses():
    for bad in NO_INT:
        if bad is not None:  # not given
            with refused("batch", TypeError):
                apt_ext.plan(model(), APTConfig(), batch=bad)
            with refused("length", TypeError):
                apt_ext.plan(model(), APTConfig(), length=bad)
    for bad in (0, -1):
        with refused("batch", ValueError):
            apt_ext.plan(model(), APTConfig(), batch=bad)
    for bad in ("heads=2", 3, [("heads", 2)]):
        with refused("keep", TypeError):
            apt_ext.plan(model(), APTConfig(), keep=bad)
    with refused("config", TypeError):
        apt_ext.plan(model(), {"r": 2})
    with refused("model", ValueError):
        apt_ext.plan(get_apt_model(model(), APTConfig(r=2)), APTConfig())
    assert apt_ext.plan(model(), APTConfig(r=2), batch=1 << 62).dense.flops is None


def test_block_names_that_are_no_names():
    apt = get_apt_model(model(), APTConfig(r=2))
    for bad in (None, 3, [], {}, torch.ones(2)):
        with refused("name", TypeError):
            apt.get_block_mask(bad)
        with refused("name", TypeError):
            apt.set_block_mask(bad, torch.ones(2))


def test_hold_pruned_on_nothing():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    used_up = apt_ext.adapters(get_apt_model(model(), APTConfig(r=2)))
    list(used_up)
    for bad in ([], {}, used_up):
        with refused("adapters", ValueError):
            hold_pruned(optimizer, bad)
    for bad in (None, 3, torch.tensor(2), torch.ones(2), "adapter"):
        with refused("adapters", TypeError):
            hold_pruned(optimizer, bad)


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    apt = get_apt_model(model(), APTConfig(r=2))
    for call in (
        apt.save_pretrained,
        lambda path: APTModel.from_pretrained(model(), path),
        lambda path: apt_ext.export(apt, path),
        apt_ext.load_export,
    ):
        for bad in NO_PATH:
            with refused("path", TypeError):
                call(bad)
        for bad in ("", "a\0b"):
            with refused("path", ValueError):
                call(bad)
    assert not list(tmp_path.iterdir())


def test_states_that_hold_something_else():
    one = adapter()
    state = one.state_dict()
    before = copy.deepcopy(state)
    for name, bad, error in (
        *((name, bad, TypeError) for name in ("lora_A", "mask_in", "rank", "merged") for bad in (None, 3, [1.0], "x")),
        ("lora_A", state["lora_A"].to(torch.complex64), TypeError),
        ("lora_B", state["lora_B"].int(), TypeError),
        ("rank", torch.tensor(1.5), TypeError),
        ("rank", torch.tensor(float("nan")), TypeError),
        ("rank", torch.ones(3, dtype=torch.int64), ValueError),
        ("merged", torch.ones(3), ValueError),
    ):
        with refused(name, error):
            one.load_state_dict({**state, name: bad})
        for key, value in one.state_dict().items():
            assert torch.equal(value, before[key]), key


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=20, vocab_size=20, max_position_embeddings=8
    )
    return get_apt_model(transformers.BertForSequenceClassification(config), APTConfig(r=2))


def test_a_model_without_values(tmp_path):
    apt = bert().to("meta")
    for call in (apt.cut, lambda: apt_ext.shrink(apt), lambda: apt.save_pretrained(tmp_path / "new")):
        with refused("meta", RuntimeError):
            call()
    assert not (tmp_path / "new").exists()


def test_what_was_shrunk_in_inference_mode_trains():
    apt = bert()
    with torch.inference_mode():
        small = apt_ext.shrink(apt)
    small(input_ids=torch.randint(0, 20, (2, 4)), labels=torch.tensor([0, 1])).loss.backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_no_blocks_come_back_after_merge_and_unload():
    apt = bert()
    apt.merge_and_unload()
    assert apt.cut() is apt and apt.blocks == {}
    with pytest.raises(ValueError, match=r"name: .*got '0.neurons', but it has none \(after merge_and_unload\(\) none are left\)"):
        apt.set_block_mask("0.neurons", torch.ones(20))


def test_a_block_mask_without_values():
    apt = bert()
    with refused("mask of block '0.heads'", ValueError):
        apt.set_block_mask("0.heads", torch.ones(2, device="meta"))
    assert bool((apt.get_block_mask("0.heads") == 1).all())


def test_every_message_is_in_words():
    """The helper above would pass an error that names the argument by chance; this one is the whole sentence."""
    with pytest.raises(TypeError, match=re.escape("scaling must be a number, got NoneType")):
        APTAdapter(6, 4, 2, scaling=None)
