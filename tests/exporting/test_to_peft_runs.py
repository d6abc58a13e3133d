"""From PEFT, a run that prunes and lets ranks grow, and back to PEFT."""

import pytest
import torch
from families import FAMILIES, outputs
from peft_checks import WARNINGS, check, config_in
from training import SCHEDULE, train

import apt_ext
from apt_ext import APTConfig, APTModel, Controller, Growth, adapters

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.usefixtures("loaded_here"), WARNINGS, pytest.mark.filterwarnings("ignore:.*fan_in_fan_out:UserWarning")]

RUNS = {
    "llama": (["q_proj", "v_proj", "up_proj", "down_proj"], {"prune": ["heads", "neurons"], "density": 0.65}),
    "bert": (["query", "value", "intermediate.dense"], {"prune": ["neurons"], "density": 0.8}),
    "gpt2": (["c_attn", "mlp.c_fc"], {"prune": ["neurons"], "density": 0.8}),
    "gemma": (["q_proj", "down_proj"], {"prune": ["hidden", "neurons"], "density": 0.6}),
}


def peft_trained(name):
    """A PeftModel whose factors are not at their start."""
    torch.manual_seed(3)
    task = "SEQ_CLS" if name == "bert" else "CAUSAL_LM"
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=RUNS[name][0], use_rslora=True, layers_to_transform=[0, 1], task_type=task)
    model = peft.get_peft_model(FAMILIES[name].model(), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize("given", [False, True], ids=["config=None", "config"])
@pytest.mark.parametrize("name", RUNS)
def test_from_peft_through_a_run_and_back(name, given, tmp_path):
    family, model = FAMILIES[name], peft_trained(name)
    options = RUNS[name][1]
    config = APTConfig.from_peft(model.peft_config["default"], **options) if given else None
    apt = APTModel.from_peft(family.model(), model, config)
    torch.testing.assert_close(outputs(apt.eval(), family.inputs())[0], outputs(model, family.inputs())[0], rtol=1e-5, atol=1e-5)
    optimizer = torch.optim.AdamW(apt_ext.adapter_parameters(apt), lr=1e-3)
    more = {} if given else options
    controller = Controller(apt, optimizer, 16, export="stock", round_to=4, growth=Growth(3.0, limit=8), **SCHEDULE, **more)
    before = {n: adapter.rank for n, adapter in adapters(apt)}
    train(apt.train(), optimizer, controller, family, 16)
    apt.eval()
    assert controller.shrink == "cut" and apt.target_reached and apt.density < 0.9
    assert any(adapter.rank > before[n] for n, adapter in adapters(apt))
    back = check(apt, tmp_path / "out", family, within=1e-5)
    assert (tmp_path / "out" / "base").exists() and config_in(tmp_path / "out")["rank_pattern"]
    again = APTModel.from_peft(
        type(apt.model).from_pretrained(tmp_path / "out" / "base", dtype="auto"), tmp_path / "out" / "adapter"
    ).eval()
    torch.testing.assert_close(outputs(again, family.inputs())[0], outputs(back, family.inputs())[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shrink", ["none", "compact"])
def test_masks_that_were_never_cut_are(shrink, tmp_path):
    family = FAMILIES["llama"]
    apt = APTModel.from_peft(family.model(), peft_trained("llama"))
    optimizer = torch.optim.AdamW(apt_ext.adapter_parameters(apt), lr=1e-3)
    controller = Controller(apt, optimizer, 16, export="stock", shrink=shrink, round_to=4, **SCHEDULE, **RUNS["llama"][1])
    train(apt.train(), optimizer, controller, family, 16)
    check(apt.eval(), tmp_path / "out", family, within=1e-5)
    assert (tmp_path / "out" / "base").exists()
