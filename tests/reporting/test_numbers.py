"""The numbers of a report are those of the model, of what was before it, and of what shrink makes."""

import pytest
import torch
from families import EVERY, FAMILIES, ONE_EACH, adapted, keep_first, mask_all, some
from reports import numbers_of
from torch.utils.flop_counter import FlopCounterMode
from training import built, finished, train

import apt_ext
from apt_ext import APTConfig, Controller, adapters, get_apt_model
from apt_ext.common import clock
from apt_ext.pruning.architectures.lookup import find_blocks
from apt_ext.reporting import figures
from apt_ext.reporting.twins import stock_twin

pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """One picture for all, and rounds that last no time."""
    png = figures.as_png(figures.before_and_after([]), figures.LIGHT)
    monkeypatch.setattr(figures, "as_png", lambda draw, theme: png)
    monkeypatch.setattr(clock, "_ROUND", 0.0)


def counted(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ONE_EACH)
def test_sizes_are_those_before_the_first_cut_and_after_shrink(name, tmp_path):
    family = FAMILIES[name]
    apt = mask_all(adapted(family), some(family, find_blocks(family.model()), ("heads", "neurons"), "hard"))
    stock, small = family.model(), apt_ext.shrink(apt)
    for _ in ("masked", "cut"):
        sizes = numbers_of(tmp_path, apt)["sizes"]
        assert sizes["before"]["parameters"] == counted(stock) and sizes["after"]["parameters"] == counted(small)
        assert sizes["before"]["bytes"] == 8 * counted(stock) and sizes["after"]["bytes"] == 8 * counted(small)
        assert 0 < sizes["after"]["flops"] < sizes["before"]["flops"]
        apt.cut()


def test_flops_are_those_that_torch_counts(tmp_path):
    apt = keep_first(adapted(FAMILIES["bert"], dtype=torch.float32), heads=1, neurons=8)
    found = numbers_of(tmp_path, apt)["sizes"]
    assert found["flops_of"] == "one forward pass of 1 x 32"  # which has 32 positions
    for when, model in (("before", FAMILIES["bert"].model(torch.float32)), ("after", apt_ext.shrink(apt))):
        model.set_attn_implementation("eager")  # torch counts no fused attention of a CPU
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 32, dtype=torch.long))
        assert found[when]["flops"] == counter.get_total_flops()


@EVERY
def test_the_model_before_its_first_cut_is_the_stock_one(family):
    apt = mask_all(adapted(family), some(family, find_blocks(family.model()), ("heads", "neurons", "hidden"), "hard"))
    keys = [(name, id(parameter)) for name, parameter in apt.named_parameters()]
    apt.cut()
    state = torch.random.get_rng_state()
    twin, blocks = stock_twin(apt, full=True, device="cpu")
    assert torch.equal(state, torch.random.get_rng_state())
    stock = family.model()
    assert type(twin) is type(stock) and [type(m) for m in twin.modules()] == [type(m) for m in stock.modules()]
    shapes = {name: (value.shape, value.dtype) for name, value in stock.state_dict().items()}
    assert {name: (value.shape, value.dtype) for name, value in twin.state_dict().items()} == shapes
    assert {name: block.count for name, block in blocks.items()} == apt.blocks.full
    assert torch.isfinite(twin(**family.inputs()).logits).all()
    assert keys == [(name, id(parameter)) for name, parameter in apt.named_parameters()]
    assert not {"save_pretrained", "push_to_hub"} & vars(twin).keys() and "save_pretrained" in vars(apt.model)


@pytest.mark.parametrize("shrink", ["cut", "none"])
def test_a_run_shows_its_events_kept_and_ranks(shrink, tmp_path):
    apt, optimizer = built(FAMILIES["llama"])
    controller = Controller(apt, optimizer, 16, schedule={"start": 2, "end": 14, "events": 3}, shrink=shrink)
    start = dict(controller.ranks.initial)
    train(apt, optimizer, controller, FAMILIES["llama"], 16)
    found = numbers_of(tmp_path, apt, controller)
    density, last = found["density"], controller.history[-1]
    assert [event["step"] for event in density["events"]] == [event["step"] for event in controller.history]
    assert density["now"] == controller.density == last["density"] and density["target"] == 0.65 and density["initial"] == 1.0
    assert density["reached"] is True and density["total_steps"] == 16
    kept = found["kept"]
    assert {name: block["kept"] for name, block in kept["blocks"].items() if name in last["kept"]} == last["kept"]
    assert {name: block["of"] for name, block in kept["blocks"].items()} == apt.blocks.full
    assert kept["blocks"]["1.heads"]["original"] == controller.original("1.heads").tolist()
    (panel,) = kept["panels"]
    assert panel["columns"] == ["heads (KV groups)", "neurons"] and panel["layers"] == [0, 1]
    assert panel["cells"][1][1] == {"kept": last["kept"]["1.neurons"], "of": 20}
    (ranks,) = found["ranks"]["panels"]
    assert ranks["columns"] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert ranks["cells"][1][5] == last["ranks"]["model.layers.1.mlp.up_proj"]
    assert {name: entry["initial"] for name, entry in found["ranks"]["adapters"].items()} == start
    assert found["ranks"]["parameters"] == {"before": controller.ranks.parameters(start), "after": controller.adapter_parameters}


def test_heads_are_named_as_before_the_first_cut(tmp_path):
    apt = adapted(FAMILIES["bert"])
    apt.set_block_mask("1.heads", torch.tensor([0.0, 1.0, 1.0]))
    for mask in ([1.0, 1.0], [0.0, 1.0]):
        apt.cut()
        apt.set_block_mask("1.heads", torch.tensor(mask))
        original = numbers_of(tmp_path, apt)["kept"]["blocks"]["1.heads"]["original"]
        assert original == [place for place, kept in zip([1, 2], mask, strict=True) if kept]
        apt.set_block_mask("1.heads", torch.ones(2))


def test_stacks_have_panels_of_their_own(tmp_path):
    found = numbers_of(tmp_path, adapted(FAMILIES["t5-gated"]))
    encoder, decoder = found["kept"]["panels"]
    assert (encoder["stack"], encoder["columns"]) == ("encoder", ["heads", "neurons"])
    assert (decoder["stack"], decoder["columns"]) == ("decoder", ["heads", "cross heads", "neurons"])
    encoder, decoder = found["ranks"]["panels"]
    assert encoder["columns"] == ["q", "k", "v", "o", "wi_0", "wi_1", "wo"] and "EncDecAttention.q" in decoder["columns"]
    assert all(rank == 2 for panel in (encoder, decoder) for row in panel["cells"] for rank in row)


def test_hidden_dimensions(tmp_path):
    apt = keep_first(adapted(FAMILIES["bert"]), hidden=10)
    assert numbers_of(tmp_path, apt)["kept"]["hidden"] == {"kind": "hidden", "kept": 10, "of": 24}
    apt.cut()
    assert numbers_of(tmp_path, apt)["kept"]["hidden"] == {"kind": "hidden", "kept": 10, "of": 24}


def test_speed_and_memory_are_of_both_models_with_their_spread(tmp_path):
    apt = keep_first(adapted(FAMILIES["bert"], hidden_size=48, intermediate_size=4096), neurons=16)
    found = numbers_of(tmp_path, apt, rounds=3)
    speed = found["speed"]
    for measure in ("seconds", "memory") if speed["memory"] is not None else ("seconds",):
        for when in ("before", "after"):
            one = speed[measure][when]
            assert 0 < one["low"] <= one["median"] <= one["high"] and len(one["rounds"]) == 3
    pairs = zip(speed["seconds"]["before"]["rounds"], speed["seconds"]["after"]["rounds"], strict=True)
    assert speed["ratio"]["rounds"] == pytest.approx([before / after for before, after in pairs])
    assert speed["inputs"] == {"input_ids": [1, 32]} and speed["rounds"] == 3 and speed["device"] == "CPU"
    if speed["memory"] is not None:
        assert speed["memory"]["after"]["median"] >= found["sizes"]["after"]["bytes"]
        assert speed["memory"]["before"]["median"] > 2 * speed["memory"]["after"]["median"]


def test_an_example_is_what_is_timed(tmp_path):
    family = FAMILIES["t5"]
    example = {**family.inputs(), "labels": family.inputs()["decoder_input_ids"]}
    found = numbers_of(tmp_path, adapted(family), rounds=1, example=example)
    assert found["speed"]["inputs"] == {"input_ids": [3, 7], "attention_mask": [3, 7], "decoder_input_ids": [3, 5]}


def test_labels_are_timed_where_the_decoders_inputs_come_of_them(tmp_path):
    family = FAMILIES["t5"]
    labels = family.inputs().pop("decoder_input_ids")
    found = numbers_of(tmp_path, adapted(family), rounds=1, example={"input_ids": family.inputs()["input_ids"], "labels": labels})
    assert found["speed"]["inputs"] == {"input_ids": [3, 7], "labels": [3, 5]}


def test_adapters_that_are_merged(tmp_path):
    """The masks stay with the adapters; of `merge_and_unload` nothing but the sizes is left."""
    apt = keep_first(adapted(FAMILIES["bert"]), neurons=8)
    before = numbers_of(tmp_path, apt, rounds=1)
    for _, adapter in adapters(apt):
        adapter.merge_weights()
    merged = numbers_of(tmp_path, apt, rounds=1)
    assert merged["sizes"] == before["sizes"] and merged["kept"] == before["kept"]
    apt.merge_and_unload()
    found = numbers_of(tmp_path, apt, rounds=1)
    assert found["sizes"]["before"] == found["sizes"]["after"] == before["sizes"]["before"]
    assert found["notes"][0].startswith("merge_and_unload() was")


def test_a_compacted_model_whose_weights_are_in_host_memory(tmp_path):
    apt = keep_first(adapted(FAMILIES["llama"]), neurons=8)
    before = numbers_of(tmp_path, apt)["sizes"]
    apt.compact(dense="cpu")
    found = numbers_of(tmp_path, apt, rounds=1)
    assert found["sizes"] == before and found["speed"]["ratio"]["median"] > 0


def test_what_holds_the_model_stands_for_it(tmp_path):
    apt = adapted(FAMILIES["bert"])
    assert numbers_of(tmp_path, torch.nn.Sequential(apt))["sizes"] == numbers_of(tmp_path, apt)["sizes"]


def test_the_model_is_as_before(tmp_path):
    apt, controller, _ = finished("bert")
    state = {name: value.clone() for name, value in apt.state_dict().items()}
    modes, random = [module.training for module in apt.modules()], torch.random.get_rng_state()
    numbers_of(tmp_path, apt, controller, rounds=1)
    assert all(torch.equal(value, state[name]) for name, value in apt.state_dict().items())
    assert modes == [module.training for module in apt.modules()] and torch.equal(random, torch.random.get_rng_state())


def test_a_run_that_is_not_finished_says_so(tmp_path):
    apt, optimizer = built(FAMILIES["bert"])
    controller = Controller(apt, optimizer, 16, schedule={"start": 2, "end": 14, "events": 3})
    train(apt, optimizer, controller, FAMILIES["bert"], 7)
    found = numbers_of(tmp_path, apt, controller)
    assert found["density"]["reached"] is False and found["notes"][0].startswith("Not finished: the Controller, whose target is")
    assert "<strong>Not finished.</strong>" in (tmp_path / "of.html").read_text()
    assert found["sizes"]["after"]["parameters"] < found["sizes"]["before"]["parameters"]


def test_nothing_pruned(tmp_path):
    found = numbers_of(tmp_path, adapted(FAMILIES["gpt2"]))
    assert found["sizes"]["before"] == found["sizes"]["after"] and found["title"] == "GPT2LMHeadModel, not pruned"
    assert found["density"] | {"events": 0} == {
        "now": 1.0, "target": None, "budget": "parameters", "reached": None, "initial": None, "total_steps": None, "events": 0
    }  # fmt: skip


def test_what_the_model_alone_knows(tmp_path):
    """Without a Controller: the target, kept and ranks; of a stock model or an export what is left."""
    apt, controller, _ = finished("bert")
    found = numbers_of(tmp_path, apt)
    assert found["density"]["target"] == 0.65 and found["density"]["reached"] is True and not found["density"]["events"]
    small = apt_ext.shrink(apt)
    alone = numbers_of(tmp_path, small, rounds=1)
    assert alone["sizes"] == {**found["sizes"], "before": None} and alone["density"]["now"] is None and alone["ranks"]["adapters"] == {}
    assert alone["speed"]["ratio"] is None and alone["speed"]["seconds"].keys() == {"after"}
    small.save_pretrained(tmp_path / "export")
    read = numbers_of(tmp_path, tmp_path / "export")
    assert read["sizes"] == alone["sizes"] and read["kept"]["panels"] == alone["kept"]["panels"]
    assert read["exported"]["directory"] == str(tmp_path / "export") and read["exported"]["loads"] == "apt_ext.load_export"


def test_an_export_of_a_stock_class(tmp_path):
    apt = keep_first(adapted(FAMILIES["bert"], dtype=torch.float32), neurons=8)
    apt_ext.shrink(apt).save_pretrained(tmp_path / "export")
    exported = numbers_of(tmp_path, apt, exported=tmp_path / "export")["exported"]
    files = [file for file in (tmp_path / "export").iterdir() if file.is_file()]
    assert exported["class"] == "BertForSequenceClassification" and exported["files"] == len(files)
    assert exported["loads"] == "transformers.BertForSequenceClassification.from_pretrained"
    assert exported["bytes"] == sum(file.stat().st_size for file in files)
    read = numbers_of(tmp_path, str(tmp_path / "export"))
    assert read["sizes"]["after"]["parameters"] == counted(apt_ext.shrink(apt))


def test_an_architecture_that_is_not_in_the_table(tmp_path):
    from transformers import ElectraConfig, ElectraForSequenceClassification

    sizes = {"vocab_size": 50, "embedding_size": 16, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    stock = ElectraForSequenceClassification(ElectraConfig(intermediate_size=20, **sizes))
    apt = get_apt_model(stock, APTConfig(r=2, target_modules=["query", "value"]))
    found = numbers_of(tmp_path, apt, rounds=1)
    assert found["kept"]["panels"] == [] and found["ranks"]["panels"] == []
    assert found["ranks"]["outside"] == {name: 2 for name, _ in adapters(apt)}
    assert found["sizes"]["after"] == found["sizes"]["before"] and found["speed"]["ratio"]["median"] > 0


def test_layers_that_cannot_be_cut_are_said(tmp_path):
    """T5's layers share one position bias: other heads in each are masked, and no stock model can have them."""
    apt = adapted(FAMILIES["t5"])
    apt.set_block_mask("encoder.0.heads", torch.tensor([1.0, 0.0, 0.0]))
    found = numbers_of(tmp_path, apt, rounds=1)
    assert found["sizes"]["after"] is None and found["sizes"]["before"]["parameters"] and found["speed"] is None
    assert any("cannot be cut as its masks are" in note for note in found["notes"])
    assert any("not measured: shrink did not succeed" in note for note in found["notes"])


def test_a_model_of_other_inputs_is_not_timed(tmp_path, monkeypatch):
    """And the page says what to give."""
    apt = adapted(FAMILIES["bert"])
    monkeypatch.setattr("apt_ext.reporting.timing.inputs_for", lambda *_: {"input_values": torch.zeros(1, 8, device="meta")})
    found = numbers_of(tmp_path, apt, rounds=1)
    assert found["speed"] is None and any("did not take random inputs by its config" in note for note in found["notes"])
