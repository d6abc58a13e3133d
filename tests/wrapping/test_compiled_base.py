"""A base model that torch.compile has wrapped: the module inside is taken, and names, classes and states are the stock ones."""

import pytest
import torch
from families import FAMILIES

from apt_ext import APTConfig, APTModel, adapters, export, get_apt_model, plan, shrink

transformers = pytest.importorskip("transformers")
CONFIG = APTConfig(r=2)


def compiled_root(model):
    return torch.compile(model, backend="eager")


def compiled_layers(model):
    layers = model.model.layers if hasattr(model, "lm_head") else model.bert.encoder.layer
    for i in range(len(layers)):
        layers[i] = torch.compile(layers[i], backend="eager")
    return model


def compiled_everywhere(model):
    return torch.compile(compiled_layers(model), backend="eager")


WAYS = [compiled_root, compiled_layers, compiled_everywhere]


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "apt_ext"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_module_inside_is_taken_and_states_interchange(name, way, tmp_path, caplog):
    family = FAMILIES[name]
    stock = family.model()
    wrapped = way(family.model())
    before = [module for module, _ in wrapped.named_modules()]
    dry = plan(wrapped, CONFIG)
    assert [module for module, _ in wrapped.named_modules()] == before and dry.model == type(stock).__name__
    assert any("torch.compile" in note for note in dry.notes)
    apt = get_apt_model(wrapped, CONFIG)
    (text,) = said(caplog)
    assert "torch.compile(apt_model)" in text
    assert type(apt.model) is type(stock) and type(shrink(apt)) is type(stock)
    plain = get_apt_model(stock, CONFIG)
    assert apt.state_dict().keys() == plain.state_dict().keys() and dry.adapters.keys() <= dict(adapters(apt)).keys()
    assert list(apt.blocks) == list(plain.blocks)
    plain.load_state_dict(apt.state_dict())
    apt.save_pretrained(tmp_path)
    caplog.clear()
    again = APTModel.from_pretrained(family.model(), tmp_path)
    assert said(caplog) == []
    inputs = family.inputs()
    with torch.no_grad():
        assert torch.equal(apt(**inputs).logits, again(**inputs).logits)
        base = way(family.model())
        back = APTModel.from_pretrained(base, tmp_path)
        assert torch.equal(back(**inputs).logits, again(**inputs).logits)


def test_an_error_leaves_the_wrappers_where_they_were():
    model = compiled_everywhere(FAMILIES["llama"].model())
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match="target_modules"):
        get_apt_model(model, APTConfig(target_modules=["nothing"]))
    assert [(name, id(module)) for name, module in model.named_modules()] == before


def test_it_exports_and_loads(tmp_path, loaded_here):
    model = compiled_root(FAMILIES["llama"].model(torch.float32))
    assert export(get_apt_model(model, CONFIG), tmp_path / "out") == "LlamaForCausalLM"


def test_modules_compiled_in_place_keep_their_names(caplog):
    """module.compile() leaves no wrapper: of a linear, which the adapter does not call, it has no effect."""
    family = FAMILIES["llama"]
    model = family.model(num_hidden_layers=1)
    plain = get_apt_model(family.model(num_hidden_layers=1), CONFIG)
    for module in (model.model.layers[0].mlp, model.model.layers[0].self_attn.q_proj):
        module.compile(backend="eager")
    apt = get_apt_model(model, CONFIG)
    assert said(caplog) == [] and apt.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(apt.state_dict())
    for each in (apt, plain):
        each.set_block_mask("0.neurons", (torch.arange(20) % 2).double())
    with torch.no_grad():
        expected = plain(**family.inputs()).logits
        torch.testing.assert_close(apt(**family.inputs()).logits, expected)
        torch.testing.assert_close(apt.merge_and_unload()(**family.inputs()).logits, expected)
