"""Base models that are refused: PEFT's, and those with quantised linears, by name and before anything else is looked at."""

import pytest
import torch
from families import FAMILIES
from torch import nn

from apt_ext import APTConfig, APTModel, adapters, get_apt_model, plan

transformers = pytest.importorskip("transformers")
PEFT_WARNS = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
LAYER = "model.layers.1.self_attn.q_proj"


def wrapped(peft, model):
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))


def injected(peft, model):
    return peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)


def prompts(peft, model):
    return peft.get_peft_model(model, peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))


def saved_module(peft, model):
    """Only a copy of a module that trains whole is PEFT's."""
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])).base_model.model


WAYS = {
    "PeftModel": wrapped,
    "its inside": lambda peft, model: wrapped(peft, model).base_model.model,
    "injected": injected,
    "compiled": lambda peft, model: torch.compile(wrapped(peft, model), backend="eager"),
    "prompts": prompts,
    "saved module": saved_module,
    "in a module": lambda peft, model: nn.ModuleDict({"inner": wrapped(peft, model)}),
}


@PEFT_WARNS
@pytest.mark.parametrize("way", WAYS)
def test_a_model_of_peft_is_refused_and_left_alone(way, tmp_path):
    peft = pytest.importorskip("peft")
    get_apt_model(FAMILIES["llama"].model(torch.float32), APTConfig(r=2)).save_pretrained(tmp_path)
    model = WAYS[way](peft, FAMILIES["llama"].model(torch.float32))
    flags = [(name, p.requires_grad) for name, p in model.named_parameters()]
    calls = (
        lambda: get_apt_model(model, APTConfig(r=2)),
        lambda: plan(model, APTConfig(r=2)),
        lambda: APTModel.from_pretrained(model, tmp_path),
    )
    for call in calls:
        with pytest.raises(TypeError, match=r"model: expected a model without layers of PEFT.*merge_and_unload\(\).*from_peft"):
            call()
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == flags


@PEFT_WARNS
def test_a_model_that_peft_has_given_back_is_taken():
    peft = pytest.importorskip("peft")
    assert list(adapters(get_apt_model(wrapped(peft, FAMILIES["llama"].model(torch.float32)).merge_and_unload(), APTConfig(r=2))))


def linear4bit():
    """As bitsandbytes packs it: the weight is a column of bytes."""

    class Params4bit(nn.Parameter):
        pass

    class Linear4bit(nn.Linear):
        def __init__(self, base):
            super().__init__(base.in_features, base.out_features, bias=False)
            packed = torch.zeros(base.weight.numel() // 2, 1, dtype=torch.uint8)
            self.weight = Params4bit(packed, requires_grad=False)

    return Linear4bit


def linear8bit():
    class Linear8bitLt(nn.Linear):
        def __init__(self, base):
            super().__init__(base.in_features, base.out_features, bias=False)
            self.weight = nn.Parameter(torch.zeros_like(base.weight, dtype=torch.int8), requires_grad=False)

    return Linear8bitLt


def gptq():
    class TritonV2QuantLinear(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.register_buffer("qweight", torch.zeros(base.in_features // 8, base.out_features, dtype=torch.int32))

    return TritonV2QuantLinear


def awq():
    class WQLinear_GEMM(nn.Module):  # noqa: N801
        def __init__(self, base):
            super().__init__()
            self.in_features, self.out_features = base.in_features, base.out_features
            self.register_buffer("qweight", torch.zeros(base.in_features, base.out_features // 8, dtype=torch.int32))

    return WQLinear_GEMM


def hqq():
    class HQQLinear(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.in_features, self.out_features = base.in_features, base.out_features
            self.W_q = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)

    return HQQLinear


def torchao():
    """A plain nn.Linear whose weight is a subclass of Tensor."""

    class AffineQuantizedTensor(torch.Tensor):
        pass

    def make(base):
        base.weight = nn.Parameter(base.weight.detach().as_subclass(AffineQuantizedTensor), requires_grad=False)
        return base

    make.__name__ = "AffineQuantizedTensor"
    return make


def fp8():
    class FP8Linear(nn.Linear):
        def __init__(self, base):
            super().__init__(base.in_features, base.out_features, bias=False)
            self.weight = nn.Parameter(torch.zeros(base.weight.shape, dtype=torch.float8_e4m3fn), requires_grad=False)

    return FP8Linear


@pytest.mark.parametrize("make", [linear4bit, linear8bit, gptq, awq, hqq, torchao, fp8], ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    "config",
    [
        APTConfig(r=2, target_modules=["q_proj", "v_proj"]),
        APTConfig(r=2, target_modules=["o_proj"]),  # its masks reach the others
        APTConfig(r=1000),  # beyond every size
        APTConfig(r=2, rank_pattern={"q_proj": 1000}),
    ],
    ids=["target", "block", "r", "pattern"],
)
def test_quantised_comes_before_sizes_and_names_the_module_and_its_class(make, config):
    kind = make()
    model = FAMILIES["llama"].model(torch.float32)
    for i in (1, 0):
        model.model.layers[i].self_attn.q_proj = kind(model.model.layers[i].self_attn.q_proj)
    before = [(name, id(module)) for name, module in model.named_modules()]
    words = rf"^model.layers.0.self_attn.q_proj: expected a linear with a plain floating weight, got the quantised .*{kind.__name__}"
    for call in (get_apt_model, plan):
        with pytest.raises(TypeError, match=words):
            call(model, config)
    assert [(name, id(module)) for name, module in model.named_modules()] == before


def test_outside_the_table_a_quantised_linear_may_stay_beside_targets():
    quantised = linear8bit()(nn.Linear(8, 8))
    model = nn.ModuleDict({"first": nn.Linear(8, 8), "second": quantised})
    apt = get_apt_model(model, APTConfig(r=2, target_modules=["first"]))
    assert [name for name, _ in adapters(apt)] == ["first"] and apt.model["second"] is quantised
    with pytest.raises(TypeError, match="^second: .*quantised"):
        get_apt_model(nn.ModuleDict({"first": nn.Linear(8, 8), "second": linear8bit()(nn.Linear(8, 8))}), APTConfig(r=2))


def test_a_linear_whose_weight_is_computed_is_not_called_quantised():
    model = nn.ModuleDict({"only": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))})
    with pytest.raises(TypeError, match="^only: linear must be an nn.Linear"):
        get_apt_model(model, APTConfig(r=2))


def test_a_plain_linear_may_have_any_name():
    """torch's own attention has a NonDynamicallyQuantizableLinear."""

    class QuantFriendlyLinear(nn.Linear):
        pass

    assert list(adapters(get_apt_model(nn.ModuleDict({"only": QuantFriendlyLinear(4, 4)}), APTConfig(r=2))))


class Packed(nn.Module):
    """As GPTQ stores a linear: no `weight` at all."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", torch.zeros(linear.out_features, linear.in_features // 8, dtype=torch.int32))


Packed.__name__ = "QuantLinear"


@pytest.mark.parametrize("call", [get_apt_model, plan])
def test_linears_without_a_weight_are_named_before_blocks_are_looked_for(call):
    model = FAMILIES["llama"].model()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            model.set_submodule(name, Packed(module))
    with pytest.raises(TypeError, match=r"layers\.0\.self_attn\.q_proj: expected a linear with a plain floating weight"):
        call(model, APTConfig(r=2))
