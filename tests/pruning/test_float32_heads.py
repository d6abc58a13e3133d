"""Under float32_factors all that trains is float32: heads, modules that train whole, lone and tied Parameters."""

import copy
import pickle
from typing import NamedTuple

import pytest
import torch
from families import FAMILIES, keep_first, outputs
from torch import nn

from apt_ext import APTConfig, APTModel, adapter_parameters, adapters, get_apt_model, shrink
from apt_ext.method.distillation import frozen_copy

transformers = pytest.importorskip("transformers")
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
EXACT = APTConfig(r=2, float32_factors=True)

# a family, and what trains whole beside the factors
SAVED = {
    "a linear": ("bert", None),
    "a head of several layers": ("roberta", None),
    "linears in blocks": ("bert", ["classifier", "layer.1.output.dense", "layer.0.intermediate"]),
    "an embedding and a norm": ("bert", ["word_embeddings", "embeddings.LayerNorm", "classifier"]),
    "one within another": ("bert", ["encoder.layer.1", "layer.1.output", "classifier"]),
    "a tied output layer": ("llama-tied", ["lm_head"]),
    "a tied output layer with a bias": ("distilbert-mlm", ["vocab_projector", "vocab_transform"]),
    "an output layer": ("llama", ["lm_head"]),
    "norms of its own kind": ("llama", ["norm", "layers.0.input_layernorm", "layers.1"]),
}


def built(case, dtype, config=EXACT):
    name, saved = SAVED[case]
    config = APTConfig(**{**config.to_dict(), "modules_to_save": saved})
    return FAMILIES[name], get_apt_model(FAMILIES[name].model(dtype), config)


def loss_of(family, apt):
    inputs = family.inputs()
    logits = apt(**inputs).logits
    return logits, logits.float().square().mean()


def close(a, b, dtype):
    """Within the rounding of a 16-bit model."""
    rounding = {torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    torch.testing.assert_close(a.float(), b.float(), rtol=rounding, atol=rounding * float(b.detach().float().abs().max()))


def hooks(model):
    return [hook for module in model.modules() for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())]


@pytest.mark.parametrize(
    ("dtype", "cast"),
    [(torch.float16, False), (torch.float16, True), (torch.bfloat16, False)],
    ids=["float16", "float16-autocast", "bfloat16"],
)
@pytest.mark.parametrize("case", SAVED)
def test_all_that_trains_is_float32_and_the_rest_does_not_notice(case, dtype, cast):
    family, apt = built(case, dtype)
    stock = family.model(dtype)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    optimizer = torch.optim.AdamW(adapter_parameters(apt), lr=1e-3)
    assert {parameter.dtype for parameter in adapter_parameters(apt)} == {torch.float32}
    with torch.autocast("cpu", dtype, enabled=cast):
        logits, loss = loss_of(family, apt)
        expected = outputs(stock, family.inputs())[0]
    assert logits.dtype == expected.dtype == dtype
    close(logits, expected, dtype)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in adapter_parameters(apt))
    scaler.step(optimizer)
    assert {value.dtype for state in optimizer.state.values() for value in state.values()} == {torch.float32}
    frozen = dict(apt.named_parameters())
    assert {p.dtype for p in frozen.values() if not p.requires_grad and p.numel()} == {dtype}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.float16) for case in SAVED), ("linears in blocks", torch.bfloat16)],
)
def test_the_models_own_dtype_comes_back_and_no_hook_stays(case, dtype, tmp_path):
    family, apt = built(case, dtype)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_parameters(apt):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    keep_first(apt.eval(), neurons=8)
    if "hidden" in apt.blocks:
        apt.set_block_mask("hidden", torch.where(torch.arange(24) == 5, 0.5, 1.0))  # wraps embeddings, norms and heads
    expected = outputs(apt, family.inputs())[0]
    apt.save_pretrained(tmp_path)
    again = APTModel.from_pretrained(family.model(dtype), tmp_path).eval()
    assert again.state_dict().keys() == apt.state_dict().keys()
    assert all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(again.state_dict().values(), apt.state_dict().values(), strict=True)
    )
    assert torch.equal(outputs(again, family.inputs())[0], expected)
    for copied in (copy.deepcopy(apt), pickle.loads(pickle.dumps(apt)), frozen_copy(apt)):  # noqa: S301
        assert torch.equal(outputs(copied, family.inputs())[0], expected)
    small = shrink(apt)
    assert {p.dtype for p in small.parameters()} == {dtype} and hooks(small) == hooks(family.model(dtype))
    close(outputs(small, family.inputs())[0], expected, dtype)
    assert torch.equal(outputs(apt, family.inputs())[0], expected)
    keys = {name: p.dtype for name, p in family.model(dtype).state_dict().items()}
    plain = again.merge_and_unload()
    assert {name: value.dtype for name, value in plain.state_dict().items()} == keys and hooks(plain) == []
    close(outputs(plain, family.inputs())[0], expected, dtype)


def test_a_lone_parameter_trains_in_float32(tmp_path):
    """The bias of a tied output layer, and one that is added to features before any linear."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=40)).save_pretrained(tmp_path / "bert")
    model = transformers.BertForMaskedLM.from_pretrained(tmp_path / "bert", dtype=torch.float16).eval()
    tokens = torch.arange(2, 12).view(2, 5)
    expected = model(input_ids=tokens).logits
    apt = get_apt_model(model, EXACT)
    assert "cls.predictions.bias" in apt.saved and apt.cls.predictions.bias.dtype == torch.float32
    assert apt.cls.predictions.decoder.weight.dtype == torch.float16
    found = apt(input_ids=tokens).logits
    close(found, expected, torch.float16)
    found.float().sum().backward()
    assert apt.cls.predictions.bias.grad.dtype == torch.float32 and bool(apt.cls.predictions.bias.grad.any())
    with pytest.raises(RuntimeError):
        apt.cls.predictions.decoder(torch.ones(2, 3).half())
    assert "bias" not in vars(apt.cls.predictions.decoder)  # also after an error
    plain = apt.merge_and_unload()
    assert {p.dtype for p in plain.parameters()} == {torch.float16} and hooks(plain) == []


@DTYPES
def test_a_model_that_is_cast_as_a_whole_goes_on(dtype):
    family, apt = built("a head of several layers", dtype)
    expected = outputs(apt, family.inputs())[0]
    for to in (torch.float32, torch.float16, torch.bfloat16, torch.float32):
        apt.to(to)
        found = outputs(apt, family.inputs())[0]
        assert found.dtype == to
        close(found, expected, torch.bfloat16)
    assert {p.dtype for p in shrink(apt).parameters()} == {torch.float32}


def test_a_value_beyond_float16_is_refused_before_anything_changes():
    _, apt = built("a linear", torch.float16)
    with torch.no_grad():
        apt.classifier.weight[0, 0] = 1e5
    for end in (apt.merge_and_unload, lambda: shrink(apt)):
        with pytest.raises(RuntimeError, match="^classifier.weight: expected values that torch.float16 can hold"):
            end()
    assert apt.classifier.weight.dtype == torch.float32 and float(apt.classifier.weight[0, 0].detach()) == 1e5
    assert not any(adapter.merged for _, adapter in adapters(apt)) and len(hooks(apt)) == 2


def test_an_error_while_building_leaves_dtypes_values_and_hooks(tmp_path):
    family, apt = built("a linear", torch.float16)
    apt.save_pretrained(tmp_path)
    model = FAMILIES["bert"].model(torch.float16, num_labels=5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="classifier"):
        APTModel.from_pretrained(model, tmp_path)
    assert all(value.dtype == before[name].dtype and torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert hooks(model) == []


def test_a_scaler_that_will_refuse_is_said_once(caplog):
    def said(dtype, **fields):
        caplog.clear()
        get_apt_model(FAMILIES["bert"].model(dtype), APTConfig(r=2, **fields))
        return [record.getMessage() for record in caplog.records if record.name == "apt_ext"]

    (text,) = said(torch.float16)
    assert "GradScaler" in text and "float32_factors=True" in text
    assert said(torch.float16, float32_factors=True) == said(torch.bfloat16) == said(torch.float32) == []


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


def test_outputs_of_every_kind_are_cast(dtype=torch.float16):
    """A module of the user's that takes keywords and returns a mapping, a named tuple and a list, with a buffer of its own."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("scale", torch.ones(4))

        def forward(self, x, *, more):
            y = self.linear(x * self.scale + more["one"])
            return {"y": y, "list": [y, None], "ids": y.argmax(-1), "named": Pair(y, y)}

    model = nn.ModuleDict({"body": nn.Linear(4, 4), "own": Own()}).half()
    apt = get_apt_model(model, APTConfig(r=2, modules_to_save=["own"], float32_factors=True))
    own = apt.model["own"]
    assert own.scale.dtype == own.linear.weight.dtype == torch.float32
    x = torch.ones(2, 4, dtype=dtype)
    found = own(apt.model["body"](x), more={"one": x})
    assert type(found["named"]) is Pair and found["named"].first.dtype == dtype
    assert found["y"].dtype == found["list"][0].dtype == dtype and found["list"][1] is None and found["ids"].dtype == torch.long
    assert {value.dtype for value in shrink(apt).state_dict().values()} == {dtype}


def test_a_compiled_model_has_the_same_outputs():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).bfloat16()
    apt = get_apt_model(model, APTConfig(r=2, modules_to_save=["2"], float32_factors=True))
    x = torch.linspace(-1, 1, 8).view(2, 4).bfloat16()
    found = torch.compile(apt, backend="eager", fullgraph=True)(x)
    assert found.dtype == torch.bfloat16 and torch.equal(found, apt(x))
