"""to_peft: stock PEFT and transformers load the two directories and compute the same."""

import json
import warnings

import pytest
import torch
from families import FAMILIES, adapted, keep_first, mask_all, outputs
from peft_checks import WARNINGS, check, config_in, loaded

from apt_ext import APTConfig, APTModel, adapters, get_apt_model, to_peft

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.usefixtures("loaded_here"), WARNINGS]

EVERY_KIND = ("bert", "distilbert", "llama", "llama-tied", "qwen3", "gpt2", "t5-gated")
# Hidden dimensions that are left, with as many heads as stock configs then need.
HIDDEN = {"hidden": 16, "heads": 2}
HIDDEN_TIED = {"hidden": 16, "heads": 4}


@pytest.mark.parametrize("name", ["bert", "llama-tied", "gpt2", "t5-gated"])
def test_an_adapter_alone_goes_onto_the_base_that_it_was_trained_on(name, tmp_path):
    family = FAMILIES[name]
    check(adapted(family), tmp_path / "out", family)
    assert [child.name for child in tmp_path.iterdir()] == ["out"]
    assert {child.name for child in (tmp_path / "out").iterdir()} == {"adapter"}
    assert {child.name for child in (tmp_path / "out" / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "apt_export.json",
    }  # fmt: skip


@pytest.mark.parametrize("name", EVERY_KIND)
def test_a_cut_base_goes_with_it(name, tmp_path):
    family = FAMILIES[name]
    apt = keep_first(adapted(family), neurons=8)
    model = check(apt, tmp_path / "out", family)
    assert {child.name for child in (tmp_path / "out").iterdir()} == {"adapter", "base"}
    assert config_in(tmp_path / "out")["base_model_name_or_path"] == str(tmp_path / "out" / "base")
    assert model.get_base_model().num_parameters() < adapted(family).model.num_parameters()


@pytest.mark.parametrize("name", ["bert", "llama", "gemma", "gpt2", "t5", "llama-tied"])
def test_hidden_dimensions_are_cut(name, tmp_path):
    family = FAMILIES[name]
    check(keep_first(adapted(family), **(HIDDEN_TIED if name == "llama-tied" else HIDDEN)), tmp_path / "out", family, within=1e-5)


@pytest.mark.parametrize(
    ("name", "heads", "kind"), [("llama", 2, "LlamaForCausalLM"), ("llama", 1, "LlamaForCausalLM"), ("qwen3", 1, None), ("t5", 2, None)]
)
def test_heads_are_cut(name, heads, kind, tmp_path):
    family = FAMILIES[name]
    check(keep_first(adapted(family), heads=heads, neurons=12), tmp_path / "out", family, kind)
    assert json.loads((tmp_path / "out" / "base" / "config.json").read_text())["intermediate_size" if name != "t5" else "d_ff"] == 12


def test_a_base_that_only_another_class_can_say(tmp_path):
    family = FAMILIES["llama"]
    apt = keep_first(adapted(family, num_attention_heads=6, num_key_value_heads=6), heads=5)
    check(apt, tmp_path / "out", family, "MistralForCausalLM")
    assert "from transformers import MistralForCausalLM" in (tmp_path / "out" / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("reserved", [None, 6], ids=["as_it_is", "max_rank"])
def test_ranks_and_scalings_of_their_own(reserved, tmp_path):
    family = FAMILIES["llama"]
    config = APTConfig(r=2, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj"], rank_pattern={"v_proj": 3}, max_rank=reserved)
    apt = adapted(family, config)
    grown = dict(adapters(apt))["model.layers.1.self_attn.q_proj"]
    grown.increase_rank(5)
    with torch.no_grad():
        grown.Wb.normal_()
    check(apt, tmp_path / "out", family)
    found = config_in(tmp_path / "out")
    assert (found["r"], found["use_rslora"], found["target_modules"]) == (2, False, ["down_proj", "q_proj", "v_proj"])
    names = {name: adapter for name, adapter in adapters(apt) if adapter.rank}
    theirs = peft.LoraConfig.from_pretrained(tmp_path / "out" / "adapter")
    ours = APTConfig.from_peft(theirs)
    assert {name: (ours.rank_of(name), ours.scaling_of(name)) for name in names} == {name: (a.rank, a.scaling) for name, a in names.items()}
    assert all(key.startswith("^model") for key in (*found["rank_pattern"], *found["alpha_pattern"]))
    again = APTModel.from_peft(family.model(), tmp_path / "out" / "adapter").eval()
    torch.testing.assert_close(outputs(again, family.inputs())[0], outputs(apt, family.inputs())[0])


@pytest.mark.parametrize("state", ["merged", "compact", "disabled before", "training", "inference mode"])
def test_any_state_of_the_model_is_written_and_stays(state, tmp_path):
    family = FAMILIES["llama"]
    apt = keep_first(adapted(family), neurons=8)
    if state == "merged":
        for _, adapter in adapters(apt):
            adapter.merge_weights()
    elif state == "compact":
        apt.compact()
    elif state == "training":
        apt.train()
        to_peft(apt, tmp_path / "out")
        assert apt.training and all(module.training for module in apt.modules())
        apt.eval()
    elif state == "disabled before":
        with apt.disable_adapter():
            pass
    elif state == "inference mode":
        with torch.inference_mode():
            to_peft(apt, tmp_path / "out")
    check(apt, tmp_path / "out", family)
    assert all(adapter.merged == (state == "merged") and adapter.compacted == (state == "compact") for _, adapter in adapters(apt))


def test_a_model_that_was_cut_before_has_a_base_too(tmp_path):
    family = FAMILIES["llama"]
    apt = keep_first(adapted(family), neurons=8).cut()
    check(apt, tmp_path / "out", family)
    assert (tmp_path / "out" / "base").exists()


def test_one_that_the_stock_class_needs_stays_with_zeros(tmp_path, caplog):
    family = FAMILIES["gpt2"]
    apt = adapted(family)
    check(
        mask_all(apt, {name: torch.zeros(block.count) for name, block in apt.blocks.items() if block.kind == "neurons"}),
        tmp_path / "out",
        family,
    )
    assert "one stays, with output weights of zero" in caplog.text


def test_the_lines_of_the_card_load_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    family = FAMILIES["llama"]
    apt = keep_first(adapted(family), neurons=8)
    assert to_peft(apt, "out") == "out"
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    names = {}
    exec(card.partition("```python")[2].partition("```")[0], names)  # noqa: S102
    torch.testing.assert_close(outputs(names["model"].eval(), family.inputs())[0], outputs(apt, family.inputs())[0])


def test_a_block_that_is_gone_has_no_adapter(tmp_path):
    family = FAMILIES["llama"]
    apt = adapted(family)
    masks = {name: torch.zeros(block.count) for name, block in apt.blocks.items() if block.kind == "neurons"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element")
        check(mask_all(apt, masks), tmp_path / "out", family)
    assert "down_proj" not in str(config_in(tmp_path / "out")["target_modules"])


def test_zeros_that_were_set_by_hand_are_in_the_base(tmp_path):
    family = FAMILIES["bert"]
    apt = adapted(family)
    pooler = dict(adapters(apt))["bert.pooler.dense"]
    pooler.set_masks((torch.arange(24) % 3 > 0).float(), (torch.arange(24) % 2 > 0).float())
    check(apt, tmp_path / "out", family)
    assert (tmp_path / "out" / "base").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_float32_factors_and_heads_over_their_base(dtype, tmp_path):
    family = FAMILIES["bert"]
    apt = adapted(family, APTConfig(r=2, float32_factors=True), dtype)
    keep_first(apt, neurons=8)
    to_peft(apt, tmp_path / "out")
    found = outputs(loaded(tmp_path / "out", family), family.inputs())[0]
    torch.testing.assert_close(found, outputs(apt, family.inputs())[0].to(found), rtol=5e-2, atol=5e-2 if dtype == torch.bfloat16 else 1e-5)


def test_a_model_of_no_library_has_an_adapter_alone(tmp_path):
    def made():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).double()

    apt = get_apt_model(made(), APTConfig(r=2, modules_to_save=[]))
    with torch.no_grad():
        for _, adapter in adapters(apt):
            adapter.Wb.normal_()
    to_peft(apt, tmp_path / "out")
    x = torch.randn(5, 6, dtype=torch.float64)
    model = peft.PeftModel.from_pretrained(made(), tmp_path / "out" / "adapter")
    torch.testing.assert_close(model(x), apt(x))
    assert "transformers" not in (tmp_path / "out" / "adapter" / "README.md").read_text()
    dict(adapters(apt))["0"].set_masks(mask_out=(torch.arange(8) > 2).float())
    with pytest.raises(TypeError, match="expected a model of transformers inside, got Sequential"):
        to_peft(apt, tmp_path / "out")
