"""Rows that users register: what they find in a model, what they leave out, and the exports of what was cut by them."""

import json
import pathlib
import stat
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, close, keep_first
from rows import bart, electra, forget, mt5, olmo2, table, tokens_for  # noqa: F401

import apt_ext
from apt_ext import (
    APTConfig,
    Architecture,
    BlockRule,
    Layers,
    Side,
    Stream,
    export,
    get_apt_model,
    load_export,
    plan,
    register_architecture,
    shrink,
)
from apt_ext.method import block_scores
from apt_ext.method.select.groups import groups_of
from apt_ext.pruning.architectures import lookup
from apt_ext.pruning.architectures.lookup import find_blocks
from apt_ext.pruning.cut import alike
from apt_ext.storage import atomic_dir
from apt_ext.storage.per_layer import MANIFEST

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("table")


def logits(model):
    with torch.no_grad():
        return [model(**tokens_for(model)).logits]


def drawn(apt):
    """The same with factors that are not at their start."""
    with torch.no_grad():
        for _, adapter in apt_ext.adapters(apt):
            adapter.lora_B.normal_(0, 0.2)
    return apt.eval()


# -- stacks, layers, roles ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["MT5ForConditionalGeneration", "MT5EncoderModel"])
def test_layers_without_a_prefix_are_alike_by_stack(kind):
    apt = get_apt_model(mt5(kind), APTConfig(r=2))
    two = kind != "MT5EncoderModel"
    stacks = {"encoder.": ["heads"], "decoder.": ["heads", "cross_heads"]} if two else {"": ["heads"]}
    together = [[f"{stack}{layer}.{part}" for layer in (0, 1)] for stack, parts in stacks.items() for part in parts]
    places = {name: (block.stack, block.layer, block.part) for name, block in apt.blocks.items()}
    assert all(places[f"{stack}{layer}.{part}"] == (stack, layer, part) for stack in stacks for layer in (0, 1) for part in stacks[stack])
    assert alike(apt.model, apt.blocks) == together
    groups = [list(group.blocks) for group in groups_of(apt, apt.blocks, 1, False, 0) if group.kind == "heads"]
    assert groups == together
    if two:
        inputs = tokens_for(apt.model)
        found = block_scores(apt, ["heads"], [{**inputs, "labels": inputs["input_ids"]}])
        for first, second in together:
            assert torch.equal(found[first], found[second]) and bool(found[first].any())
        assert not torch.equal(found["encoder.0.heads"], found["decoder.0.heads"])


def test_layers_that_must_be_alike_are_checked_without_a_prefix():
    apt = drawn(get_apt_model(mt5(), APTConfig(r=2)))
    apt.set_block_mask("encoder.1.heads", torch.tensor([1.0, 0, 1]))
    with pytest.raises(ValueError, match=r"encoder.1.heads: expected the same heads of encoder.0.heads"):
        shrink(apt)
    apt.set_block_mask("encoder.0.heads", torch.tensor([1.0, 0, 1]))
    close(logits(shrink(apt)), logits(apt))  # the decoder keeps all of its own
    apt.set_block_mask("decoder.0.cross_heads", torch.tensor([1.0, 0, 1]))
    with pytest.raises(ValueError, match=r"decoder.1.cross_heads: expected the number of heads of decoder.0.cross_heads"):
        shrink(apt)


def test_two_blocks_of_one_name_are_refused():
    model = electra()
    rule = BlockRule("neurons", "intermediate_size", (Side("intermediate.dense", "out"), Side("output.dense", "in", scales=True)))
    apt_ext.register_architecture(Architecture(("electra",), (Layers(r"encoder\.layer\.(\d+)", (rule, rule)),)))
    with pytest.raises(ValueError, match=r"expected one block named '0.neurons', got two, the second in electra.encoder.layer.0"):
        find_blocks(model)


def test_roles_are_given_or_follow_from_what_scales():
    model = electra()
    path = "electra.encoder.layer.0.attention.self"
    sides = {side.role: side.module for side in find_blocks(model)["0.heads"].sides}
    assert sides == {role: f"{path}.{name}" for role, name in zip("vqk", ("value", "query", "key"), strict=True)} | {
        "o": "electra.encoder.layer.0.attention.output.dense"
    }
    at = "attention.self"
    kinds = [Side(f"{at}.key", "out", role="k"), Side(f"{at}.query", "out"), Side(f"{at}.value", "out", scales=True)]
    rule = BlockRule("heads", "num_attention_heads", (Side("attention.output.dense", "in"), *kinds), owner=at, size="attention_head_size")
    apt_ext.register_architecture(Architecture(("electra",), (Layers(r"encoder\.layer\.(\d+)", (rule,)),)))
    block = find_blocks(model)["0.heads"]
    assert [side.role for side in block.sides] == ["o", "k", "q", "v"] and block.linear("q") == f"{path}.query"
    with pytest.raises(ValueError, match="role: expected one of .* for 'up' of neurons, got 'q'"):
        bad = BlockRule("neurons", "w", (Side("up", "out", role="q"), Side("down", "in", scales=True)))
        apt_ext.register_architecture(Architecture(("mine",), (Layers(r"layers\.(\d+)", (bad,)),)))


# -- exports -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("loaded_here")
@pytest.mark.parametrize("made", [electra, bart, mt5])
@pytest.mark.parametrize("keep", [{"neurons": 7}, {"heads": 2}])
def test_a_plan_says_what_both_exports_do(made, keep, tmp_path, monkeypatch):
    found = plan(made(), APTConfig(r=2), keep=keep).exports
    apt = keep_first(drawn(get_apt_model(made(), APTConfig(r=2))), **keep)
    expected = logits(apt)
    if found["stock"]:
        with pytest.raises(ValueError) as error:
            export(apt, tmp_path / "stock")
        assert all(failure in str(error.value) for failure in found["stock"])
    else:
        assert export(apt, tmp_path / "stock") == type(apt.model).__name__
        close(logits(type(apt.model).from_pretrained(tmp_path / "stock", dtype="auto")), expected)
    assert bool(found["stock"]) == (keep == {"heads": 2} and made is not mt5)
    assert found["per layer"] == []
    first = next(name for name in apt.blocks if name.endswith("neurons"))
    apt.set_block_mask(first, (torch.arange(20) < 3).float())  # widths that no stock config says
    expected = logits(apt)
    assert export(apt, tmp_path / "own", per_layer=True) == "apt_ext.load_export"
    forget(monkeypatch)
    close(logits(load_export(tmp_path / "own")), expected)


def test_the_constraints_are_those_of_the_rows_own_entries():
    found = plan(bart(), APTConfig(r=2), keep={"heads": 2}).exports["stock"]
    assert [words.split(", got")[0] for words in found] == [
        f"BartConfig makes heads of hidden_size / {stack}_attention_heads channels" for stack in ("encoder", "decoder")
    ]
    assert "3 heads in every layer or hidden_size 16 with these heads would pass" in found[0]


def test_a_flag_that_a_row_lacks_is_found_before_anything_is_written(tmp_path):
    model = electra(derives_head_size=False)
    words = r"ElectraForSequenceClassification makes of these sizes .*query.weight \[24, 24\] instead of \[16, 24\]"
    (failure,) = plan(model, APTConfig(r=2), keep={"heads": 2}).exports["stock"]
    with pytest.raises(ValueError, match=words) as error:
        export(keep_first(get_apt_model(model, APTConfig(r=2)), heads=2), tmp_path / "small")
    assert failure in str(error.value) and list(tmp_path.iterdir()) == []


def test_a_fresh_process_needs_no_registered_row(tmp_path, monkeypatch):
    """The process that export starts has registered nothing."""
    apt = drawn(get_apt_model(electra(), APTConfig(r=2)))
    apt.set_block_mask("0.heads", torch.tensor([1.0, 0, 1]))
    assert export(apt, tmp_path / "small", per_layer=True) == "apt_ext.load_export"  # which compares what another process loads
    forget(monkeypatch)
    again = get_apt_model(load_export(tmp_path / "small"), APTConfig(r=2))
    with pytest.raises(ValueError, match="declare it with apt_ext.register_architecture"):
        again.set_block_mask("0.heads", torch.ones(2))


def test_what_the_other_process_reports_is_shown_whole(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text(
        textwrap.dedent("""\
        #!/bin/sh
        printf '[transformers] \\033[1mElectraModel LOAD REPORT\\033[0m from: there\\nquery.weight | MISMATCH\\n' >&2
        printf 'Traceback (most recent call last):\\n  File "x.py", line 1\\nRuntimeError: see the above report!\\nor not\\n' >&2
        exit 1
        """)
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    small = shrink(get_apt_model(electra(), APTConfig(r=2)))
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(ValueError) as error:
        export(small, tmp_path / "small")
    _, _, said = str(error.value).partition("but it does not: ")
    report = "[transformers] ElectraModel LOAD REPORT from: there\nquery.weight | MISMATCH"
    assert said == f"RuntimeError: see the above report!\nor not\n{report}"


# -- Parameters that no rule speaks of ---------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [plan, get_apt_model])
def test_a_norm_over_all_heads_has_to_be_named(call):
    model = olmo2(norms=False)
    before = [(name, id(module)) for name, module in model.named_modules()]
    words = (
        r"name every Parameter .* model.layers.0.self_attn.q_norm.weight \[24\] \(block '0.heads'\), .*k_norm.weight.*add a Side for each"
    )
    with pytest.raises(ValueError, match=words):
        call(model, APTConfig(r=2))
    assert before == [(name, id(module)) for name, module in model.named_modules()]


def test_a_norm_over_all_heads_that_is_named_is_cut(tmp_path):
    apt = drawn(get_apt_model(olmo2(num_key_value_heads=3), APTConfig(r=2)))
    apt.set_block_mask("0.heads", torch.tensor([1.0, 0, 0.5]))
    apt.set_block_mask("1.heads", torch.tensor([0.0, 1, 1]))
    small = shrink(apt)
    assert small.model.layers[0].self_attn.q_norm.weight.shape == (16,)
    close(logits(small), logits(apt))
    with pytest.raises(RuntimeError, match="heads of block '0.heads', over which a norm runs, are pruned"):
        apt.merge_and_unload()
    apt.save_pretrained(tmp_path)
    again = apt_ext.APTModel.from_pretrained(olmo2(num_key_value_heads=3), tmp_path)
    close(logits(again.eval()), logits(apt))
    apt.cut()
    close(logits(apt), logits(small))


def test_a_table_of_position_biases_has_to_be_named():
    """One in a layer, and one that all layers share."""
    with pytest.raises(ValueError, match=r"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight \[32, 3\]"):
        get_apt_model(mt5(tables=False), APTConfig(r=2))
    at = "attention.attn"
    sides = (Side(f"{at}.v", "out", scales=True), Side(f"{at}.q", "out"), Side(f"{at}.k", "out"), Side(f"{at}.o", "in"))
    counts = {"counts": ("num_attention_heads",), "totals": ("all_head_size",)}
    rule = BlockRule("heads", "num_attention_heads", sides, owner=at, size="attention_head_size", **counts)
    stream = Stream(adds=r"\w+_embeddings|attn\.o|output\.dense", reads=r"attn\.[qkv]|intermediate\.dense", norms="LayerNorm", apart=".*")
    row = Architecture(("mpnet",), (Layers(r"encoder\.layer\.(\d+)", (rule,)),), stream, derives_head_size=True)
    apt_ext.register_architecture(row)
    sizes = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 20}
    model = transformers.MPNetModel(transformers.MPNetConfig(**sizes))
    with pytest.raises(ValueError, match=r"not name encoder.relative_attention_bias.weight \[32, 3\] \(block '0.heads'\)"):
        plan(model, APTConfig(r=2))


def test_widths_that_coincide_by_chance_are_no_fault():
    """Norms over a residual stream as wide as Q; norms of one head whose size is the number of heads, or of KV heads."""
    assert get_apt_model(electra(), APTConfig(r=2)).blocks
    llama = next(row for row in lookup.ARCHITECTURES if "qwen3" in row.model_types)
    sizes = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 4}
    for heads, shared in ((4, 2), (8, 4), (2, 1)):
        config = transformers.Qwen3Config(**sizes, num_attention_heads=heads, num_key_value_heads=shared)
        model = transformers.Qwen3ForCausalLM(config)
        assert get_apt_model(model, APTConfig(r=2)).blocks["0.heads"].count == shared
        apt_ext.register_architecture(Architecture(("qwen3",), llama.layers, decoder=True))  # the next is tried as a registered one


def test_where_the_model_cannot_be_run_a_parameter_in_the_attention_is_named(monkeypatch):
    def broken(*_, **__):
        raise NotImplementedError("of values")

    good, bad = electra(), olmo2(norms=False)
    for model in (good, bad):
        monkeypatch.setattr(type(model), "forward", broken)
    assert get_apt_model(good, APTConfig(r=2)).blocks
    with pytest.raises(ValueError, match=r"self_attn.q_norm.weight \[24\] .* each is as wide as what a cut makes narrower"):
        get_apt_model(bad, APTConfig(r=2))


def test_attributes_that_a_row_forgets_are_found():
    own = next(row for row in lookup.ARCHITECTURES if "gpt2" in row.model_types)
    model = FAMILIES["gpt2"].model()
    heads, neurons = own.layers[0].blocks

    def register(**changes):
        layers = replace(own.layers[0], blocks=(replace(heads, **changes), neurons))
        apt_ext.register_architecture(replace(own, layers=(layers,)))

    register()
    assert get_apt_model(FAMILIES["gpt2"].model(), APTConfig(r=2)).blocks
    for changes, words in [
        ({"totals": ()}, "with half of its blocks this GPT2LMHeadModel does not run: .*compare the row's sides, counts and totals"),
        (
            {"size": "heads"},
            "size: expected the owner of heads to have a number of channels as 'heads', got None of 'transformer",
        ),
        ({"sides": (*heads.sides, Side("ln_1", "out", parts=5))}, "expected sides of '0.heads' to have a multiple of 15 channels, got 24"),
    ]:
        register(**changes)
        for call in (plan, get_apt_model):
            with pytest.raises(ValueError, match=words):
                call(model, APTConfig(r=2))


def test_the_documented_example(tmp_path):
    """The second block of docs/architectures.md is a whole row: hidden dimensions too."""
    text = (pathlib.Path(__file__).parents[2] / "docs" / "architectures.md").read_text()
    model = olmo2(norms=False, num_key_value_heads=3)
    blocks = text.split("```python\n")[1:]
    exec("from apt_ext import *\n" + blocks[1].split("```")[0], {})  # noqa: S102  # our own
    apt = drawn(get_apt_model(model, APTConfig(r=2)))
    assert plan(olmo2(), APTConfig(r=2), length=8).notes == []
    apt.set_block_mask("0.heads", torch.tensor([1.0, 0, 0.5]))
    apt.set_block_mask("1.neurons", (torch.arange(20) < 9).float())
    apt.set_block_mask("hidden", (torch.arange(24) != 5).float())
    close(logits(shrink(apt)), logits(apt), 1e-6)  # its norms compute in float32


# -- the row in a directory --------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path):
    apt = get_apt_model(electra(), APTConfig(r=2))
    apt.set_block_mask("0.heads", torch.tensor([1.0, 0, 1]))
    shrink(apt).save_pretrained(tmp_path / "small")
    return tmp_path / "small"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda row: row.pop("stream"), 'expected "row" with'),
        (lambda row: row.update(layers=3), '"layers" to be a list'),
        (lambda row: row["layers"][0].update(before="(a+)+$"), 'expected "widths" of the blocks'),
        (lambda row: row["layers"][0].update(after=7), '"after" to be text'),
        (lambda row: row["layers"][0]["blocks"][0].update(kind="lanes"), "of heads or neurons"),
        (lambda row: row["layers"][0]["blocks"][0].update(counts=["forward"]), "expected a number 'forward'"),
        (lambda row: row["layers"][0]["blocks"][0].update(size="forward"), "to have a number of channels as 'forward'"),
        (lambda row: row["layers"][0]["blocks"][0].update(name=[]), '"name" to be a text or null'),
        (lambda row: row["layers"][0]["blocks"][0]["sides"][0].update(parts=0), "each a part of its parts"),
        (lambda row: row["layers"][0]["blocks"][0]["sides"][0].update(scales=1), '"scales" to be bool'),
        (lambda row: row["layers"][0]["blocks"][0]["sides"][3].update(side="out"), "and an input"),
        (lambda row: row.update(derives_head_size="no"), '"derives_head_size" to be true or false'),
    ],
)
def test_a_row_from_a_file_is_not_trusted(directory, damage, words):
    said = json.loads((directory / "apt_widths.json").read_text())
    damage(said["row"])
    (directory / "apt_widths.json").write_text(json.dumps(said))
    (directory / MANIFEST).unlink()
    atomic_dir.seal(directory, MANIFEST)  # by somebody who means it
    with pytest.raises(ValueError, match=f"{directory / 'apt_widths.json'}.*{words}"):
        load_export(directory)


def test_a_directory_without_a_row_needs_the_table(directory, monkeypatch):
    """As earlier versions wrote it."""
    said = json.loads((directory / "apt_widths.json").read_text())
    del said["row"]
    (directory / "apt_widths.json").write_text(json.dumps(said))
    (directory / MANIFEST).unlink()
    atomic_dir.seal(directory, MANIFEST)
    assert load_export(directory).electra.encoder.layer[0].attention.self.query.out_features == 16
    forget(monkeypatch)
    with pytest.raises(ValueError, match=r"expected a row of the table for 'electra', got none.*apt_ext.register_architecture\(row\)"):
        load_export(directory)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"side": "inn"}, ValueError, r"side: expected 'in' or 'out' for 'output.dense' of neurons, got 'inn'"),
        ({"model_types": "electra"}, TypeError, r"model_types: expected a tuple of names, got 'electra'"),
    ],
)
def test_a_slip_in_a_row_is_named(change, kind, words):
    rule = BlockRule(
        "neurons", "intermediate_size", (Side("intermediate.dense", "out"), Side("output.dense", change.get("side", "in"), scales=True))
    )
    row = Architecture(change.get("model_types", ("electra",)), (Layers(r"encoder\.layer\.(\d+)", (rule,)),))
    before = list(lookup.ARCHITECTURES)
    with pytest.raises(kind, match=words):
        register_architecture(row)
    assert before == lookup.ARCHITECTURES
