"""plan: what it predicts is what happens, and what it says can be exported can."""

import json

import pytest
import torch
from cases import crossed, turn
from families import EMPTY_HEADS, EVERY, FAMILIES, ONE_EACH, adapted, keep_first
from torch.utils.flop_counter import FlopCounterMode

import apt_ext
from apt_ext import APTConfig, adapter_parameters, export, get_apt_model, plan, shrink
from apt_ext.pruning.on_meta import positions
from apt_ext.tools.cli import main

transformers = pytest.importorskip("transformers")


def flops(model, batch, length):
    # sdpa has no formula for a CPU: the plain products do
    model.set_attn_implementation("eager")
    tokens = torch.randint(2, 50, (batch, length))
    inputs = {"input_ids": tokens, **({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops()


@EVERY
def test_parameters_bytes_and_flops_are_those_of_the_cut(family):
    model = family.model(torch.float32)
    keep = {"heads": min(2, family.sizes.get("num_key_value_heads", 2)), "neurons": 7, "hidden": 16}
    config = APTConfig(r=2)
    found = plan(model, config, keep=keep, batch=3, length=7)
    small = shrink(keep_first(get_apt_model(family.model(torch.float32), config), **keep))
    for size, real in ((found.dense, model), (found.target, small)):
        assert size.parameters == sum(p.numel() for p in real.parameters())
        assert size.bytes == 4 * size.parameters
        assert size.flops == flops(real.eval(), 3, 7)
    apt = get_apt_model(family.model(torch.float32), config)
    assert found.trainable == sum(p.numel() for p in adapter_parameters(apt))
    assert found.adapters == {name: adapter.rank for name, adapter in apt_ext.adapters(apt) if adapter.rank}
    assert found.saved == apt.saved
    extra = sum(p.numel() for p in adapter_parameters(apt)) - sum(
        p.numel() for name in apt.saved for p in apt.get_submodule(f"model.{name}").parameters()
    )
    assert found.training_bytes == found.dense.bytes + 4 * (extra + 3 * found.trainable)  # factors, their gradients, two moments
    blocks = {name: count for group in found.blocks.values() for name, count in group.items()}
    assert blocks == {name: block.count for name, block in apt.blocks.items()}


@EVERY
def test_it_changes_nothing_and_needs_no_weights(family):
    model = family.model(torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = [(name, id(module)) for name, module in model.named_modules()]
    config = APTConfig(r=2, prune=["heads", "neurons"], density=0.6, round_to=4)
    here = plan(model, config, length=16)
    assert names == [(name, id(module)) for name, module in model.named_modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(not module._forward_pre_hooks for module in model.modules())
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert plan(empty, config, length=16) == here
    assert here.dense.flops is not None and here.target.flops < here.dense.flops


KEPT = [{"heads": 1}, {"neurons": 7}, {"hidden": 16}, {"heads": 2, "hidden": 16}, {"heads": 2, "hidden": 20}]


@pytest.mark.usefixtures("loaded_here")
@pytest.mark.parametrize(
    ("name", "keep"),
    crossed(FAMILIES, KEPT, daily=lambda name, keep: name in ONE_EACH or keep in (turn(name, FAMILIES, KEPT), KEPT[-1])),
)
def test_what_it_says_can_be_exported_can(name, keep, tmp_path):
    family = FAMILIES[name]
    if keep.get("heads", 1) > family.sizes.get("num_key_value_heads", 3):
        pytest.skip("fewer heads")
    found = plan(family.model(), APTConfig(r=2), keep=keep)
    apt = keep_first(adapted(family), **keep)
    formats = [name for name, failures in found.exports.items() if not failures]
    if formats[0] == "per layer":
        with pytest.raises(ValueError) as error:
            export(apt, tmp_path / "small")
        assert all(failure in str(error.value) for failure in found.exports["stock"])
    loader = export(apt, tmp_path / "small", per_layer=True)
    assert {"stock": family.kind, "retyped": "MistralForCausalLM", "per layer": "apt_ext.load_export"}[formats[0]] == loader


def test_seven_of_nine_heads_are_a_mistral():
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=576, intermediate_size=64, num_hidden_layers=1, num_attention_heads=9, num_key_value_heads=9
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    found = plan(model, APTConfig(r=2), keep={"heads": 7})
    assert found.exports["retyped"] == []
    assert found.exports["stock"] == ["num_attention_heads of LlamaConfig must divide hidden_size, got 7 and 576; 6 heads would pass"]
    assert found.heads == {n: (["stock"] if 576 % n == 0 else []) + ["retyped", "per layer"] for n in range(1, 10)}
    assert "heads kept: 1, 2, 3, 4, 6, 8, 9 -> stock; 5, 7 -> retyped" in str(found)


@EMPTY_HEADS
def test_a_head_that_has_to_stay_is_said():
    family = FAMILIES["llama"]
    found = plan(family.model(), APTConfig(r=2), keep={"heads": 0})
    assert found.target.parameters == sum(p.numel() for p in shrink(keep_first(adapted(family), heads=0)).parameters())
    assert found.notes == ["0.heads: one stays, with output weights of zero: the stock class cannot run with nothing there"]


def test_an_input_that_the_model_does_not_take_leaves_the_flops_open():
    model = FAMILIES["bert"].model()
    model.config.max_position_embeddings = 64  # which its table has not
    found = plan(model, APTConfig(r=2), batch=2, length=33)
    assert found.dense.flops is None and found.notes == ["FLOPs are unknown: the model does not take token ids of shape [2, 33] alone"]
    assert "GFLOPs                 unknown" in str(found)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "roberta"])
def test_a_length_beyond_the_positions_is_refused(family):
    model = FAMILIES[family].model()
    most = positions(model)
    for options in ({}, {"gpus": 1, "batch": 1}):
        words = f"length: expected at most the {most} positions of {type(model).__name__}, got {most + 1}"
        with pytest.raises(ValueError, match=words):
            plan(model, APTConfig(r=2), length=most + 1, **options)
        assert plan(model, APTConfig(r=2), length=most, **options).length == most
    assert plan(model, APTConfig(r=2)).length == most and plan(model, APTConfig(r=2)).dense.flops
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        plan(model, APTConfig(r=2), length=0)


def test_without_a_most_any_length_is_planned():
    model = FAMILIES["t5"].model()
    assert positions(model) is None and plan(model, APTConfig(r=2)).length == 128
    assert plan(model, APTConfig(r=2), length=4000).length == 4000


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ({"layers": 1}, "expected heads, neurons, hidden, got 'layers'"),
        ({"heads": 4}, "expected 0 to 3 heads, got 4"),
        ({"hidden": 0}, "1 to 24"),
    ],
)
def test_it_refuses_in_words(keep, words):
    with pytest.raises(ValueError, match=f"keep: .*{words}"):
        plan(FAMILIES["bert"].model(), APTConfig(r=2), keep=keep)


def test_an_unknown_architecture_has_a_plan_without_blocks():
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
    found = plan(model, APTConfig(r=2))
    assert found.blocks == {} and found.adapters == {"0": 2, "2": 2} and found.exports["per layer"]
    with pytest.raises(ValueError, match=r"declare it with apt_ext.register_architecture.*0 \[6, 6\], 2 \[2, 6\]"):
        plan(model, APTConfig(r=2), keep={"neurons": 3})
    with pytest.raises(ValueError, match=r"prune: .* declare Sequential \(model_type None\) with apt_ext.register_architecture"):
        plan(model, APTConfig(r=2, density=0.5))


def test_names_that_match_nothing_are_refused_as_by_get_apt_model():
    with pytest.raises(ValueError, match="target_modules: expected names .*nearest: query"):
        plan(FAMILIES["bert"].model(), APTConfig(target_modules=["qery"]))
    for build in (plan, get_apt_model):  # a rank, too, before anything is wrapped
        with pytest.raises(ValueError, match=r"0\.attention\.self\.query: rank must be at most min.* = 24, got 25"):
            build(FAMILIES["bert"].model(), APTConfig(target_modules=["query"], r=25))


def test_the_command(tmp_path, capsys):
    FAMILIES["bert"].model(torch.float32).config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BertForSequenceClassification"]}))
    assert main(["plan", str(tmp_path), "--keep", "heads=2", "hidden=16", "--json", "--batch", "2", "--length", "9", "--rank", "3"]) == 0
    said = json.loads(capsys.readouterr().out)
    expected = plan(FAMILIES["bert"].model(torch.float32), APTConfig(r=3), keep={"heads": 2, "hidden": 16}, batch=2, length=9)
    assert said == json.loads(json.dumps(expected.to_dict()))
    assert main(["plan", str(tmp_path), "--density", "0.6", "--prune", "heads", "neurons", "--target-modules", "query", "value"]) == 0
    text = capsys.readouterr().out
    assert "BertForSequenceClassification: 4 adapters of rank 8" in text and "export stock: no: BertConfig makes heads of" in text
    assert main(["plan", str(tmp_path), "--density", "0.9", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["keep"] == {"neurons": 8}
    for arguments, code, words in [
        ([str(tmp_path / "none")], 1, "expected a directory, a .gguf file or an installed package that holds one"),
        ([str(tmp_path), "--keep", "heads=9"], 1, "keep: expected 0 to 3 heads, got 9"),
        ([str(tmp_path), "--keep", "heads=2", "heads=1"], 2, "keep: expected each kind once"),
        ([str(tmp_path), "--density", "nan"], 2, "density: expected a finite number, got nan"),
        ([str(tmp_path), "--density", "0.5", "--prune", "neurons"], 1, "density: expected at least 0.8320"),
        ([str(tmp_path), "--rank", "25"], 1, "rank must be at most"),
    ]:
        assert main(["plan", *arguments]) == code
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", str(tmp_path), "--keep", "heads"])
    assert "expected KIND=NUMBER" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "config", "sizes", "module"),
    [
        ("BertLMHeadModel", "BertConfig", FAMILIES["bert-decoder"].sizes, "bert.encoder.layer.{}.crossattention"),
        ("GPT2LMHeadModel", "GPT2Config", FAMILIES["gpt2"].sizes, "transformer.h.{}.crossattention"),
    ],
)
def test_cross_attention_that_is_no_block_is_said(kind, config, sizes, module):
    model = getattr(transformers, kind)(getattr(transformers, config)(**sizes, add_cross_attention=True))
    found = plan(model, APTConfig(r=2), length=16)
    assert found.notes == [f"{module.format(layer)}: no block, it is not pruned" for layer in (0, 1)]
    assert found.notes[0] in str(found)
    with pytest.raises(ValueError, match="how these modules touch the residual stream: .*crossattention"):
        plan(model, APTConfig(r=2), keep={"hidden": 16})


@EVERY
def test_every_linear_of_a_layer_is_in_a_block(family):
    assert plan(family.model(), APTConfig(r=2), length=16).notes == []
