"""What will be left of a model is known before it is trained: `plan` and a Controller search alike, and both say what can be exported."""

import logging
import math
from dataclasses import replace

import pytest
import torch
from families import FAMILIES
from torch import nn
from training import SHORT, built, train

from apt_ext import APTConfig, Controller, export, get_apt_model, plan, shrink
from apt_ext.exporting.directories import expressed
from apt_ext.method import Products, search
from apt_ext.method.oneshot import pruned_kinds
from apt_ext.method.outlook import Outlook, check_settings
from apt_ext.method.select.search import Group
from apt_ext.pruning.architectures.lookup import ARCHITECTURES
from apt_ext.pruning.cost import cost_of

QUICK = {"schedule": {"start": 0, "end": 3, "events": 3}}
KINDS = [["neurons"], ["heads", "neurons"], ["heads", "neurons", "hidden"]]


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
@pytest.mark.parametrize(("prune", "uniform"), [(KINDS[0], True), (KINDS[1], True), (KINDS[1], False), (KINDS[2], True)])
def test_a_plan_is_what_a_run_with_equal_scores_leaves(name, prune, uniform, monkeypatch):
    """Each block the same number, and the same class can write it."""
    family = FAMILIES[name]
    apt, optimizer = built(family, prune=prune, density=0.85, uniform=uniform)
    found = plan(family.model(), apt.apt_config, length=16)
    controller = Controller(apt, optimizer, 4, growth=1.0, kurtosis=0.0, **QUICK)
    monkeypatch.setattr(controller.scores, "scores", lambda: {name: torch.ones(block.count) for name, block in controller.blocks.items()})
    train(apt, optimizer, controller, family, 3)
    kept = {name: int(apt.get_block_mask(name).sum()) for name in apt.blocks}
    assert {name: count for left in found.left.values() for name, count in left.items()} == kept
    assert controller.density <= 0.85 and found.target.parameters < found.dense.parameters
    for kind, counts in found.left.items():
        same = len(set(counts.values())) == 1
        assert found.keep.get(kind) == (kept[next(iter(counts))] if same and kind in prune else None)
    small = shrink(apt)
    assert found.target.parameters == sum(parameter.numel() for parameter in small.parameters())
    try:
        loader = expressed(small, per_layer=False)[1]
    except ValueError as error:
        assert all(failure in str(error) for failure in found.exports["stock"]) and found.exports["stock"]
        assert found.exports.get("retyped") != []
    else:
        assert found.exports["stock" if loader == family.kind else "retyped"] == []


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2", "t5"])
def test_what_the_default_prunes_is_a_stock_model(name, caplog):
    """Of every row of the table."""
    family = FAMILIES[name]
    config = APTConfig(r=2, density=0.9, round_to=4)
    exports = plan(family.model(), config, length=16).exports
    assert exports["stock"] == [] or exports.get("retyped") == []
    apt = get_apt_model(family.model(), config)
    Controller(apt, torch.optim.SGD([p for p in apt.parameters() if p.requires_grad]), 16, export="stock", **SHORT).remove()
    chosen = Controller(apt, torch.optim.SGD([p for p in apt.parameters() if p.requires_grad]), 16, **SHORT).config.prune
    assert not caplog.records
    ties_heads = any(family.model().config.model_type in row.model_types and row.derives_head_size for row in ARCHITECTURES)
    assert chosen == (["neurons"] if ties_heads else ["heads", "neurons"])


@pytest.mark.parametrize(("name", "density"), [("bert", 0.5), ("gpt2", 0.25)])
def test_a_density_that_neurons_alone_do_not_reach_prunes_heads_too_and_says_so(name, density, caplog):
    family = FAMILIES[name]
    apt, optimizer = built(family, prune=None, density=density)
    with pytest.raises(ValueError, match=r"density: expected at least .* \['neurons'\] alone"):
        Controller(apt, optimizer, 16, prune=["neurons"], **SHORT)
    assert Controller(apt, optimizer, 16, **SHORT).config.prune == ["heads", "neurons"]
    assert "no stock config may be able to say what prune=['heads', 'neurons']" in caplog.text
    left = plan(family.model(), APTConfig(r=2, density=density, round_to=4), length=16)
    assert set(left.keep) == {"heads", "neurons"} and left.exports["stock"]


def test_one_shot_prunes_the_kinds_that_a_controller_would():
    apt, _ = built(FAMILIES["bert"], prune=None, density=1.0)
    assert pruned_kinds(apt, 0.9) == ["neurons"] and pruned_kinds(apt, 0.5) == ["heads", "neurons"]


REFUSED = [
    ("bert", ["heads", "neurons"], True, r"BertConfig makes heads of .*; prune=\['neurons'\] would pass, and so would export='per_layer'"),
    ("gpt2", ["heads"], True, r"GPT2Config makes heads of .*; prune=\['neurons'\] with uniform=True would pass"),
    ("distilbert", ["hidden", "neurons"], True, r"DistilBertConfig makes heads of .*; prune=\['neurons'\] with uniform=True would pass"),
    ("mistral", ["neurons"], False, r"one width for all layers .*; uniform=True would pass, and so would"),
    ("t5", ["heads", "neurons"], False, r"one width for all layers .*; uniform=True would pass, and so would"),
]


@pytest.mark.parametrize(("name", "prune", "uniform", "words"), REFUSED, ids=[row[0] for row in REFUSED])
def test_a_stock_export_that_may_not_be_is_refused_before_training(name, prune, uniform, words, caplog):
    apt, optimizer = built(FAMILIES[name], prune=prune, density=0.85, uniform=uniform)
    before = dict(apt.named_modules())
    with pytest.raises(ValueError, match=f"export: expected settings of which a stock config .* got prune=.*uniform={uniform}: {words}"):
        Controller(apt, optimizer, 16, export="stock", **SHORT)
    assert before == dict(apt.named_modules()) and not optimizer._optimizer_step_post_hooks and not caplog.records
    Controller(apt, optimizer, 16, export="per_layer", **SHORT).remove()
    assert not caplog.records
    with caplog.at_level(logging.WARNING, logger="apt_ext"):
        Controller(apt, optimizer, 16, **SHORT).remove()
    (record,) = caplog.records
    assert "no stock config may be able to say" in record.getMessage() and "per_layer=True" in record.getMessage()


@pytest.mark.parametrize("name", ["llama", "t5", "gemma"])
def test_what_a_stock_class_or_its_twin_can_say_passes(name):
    """Heads alone, and kinds that compete: LLaMA's as Mistral, where they do not divide."""
    for prune in (["heads", "neurons"], ["heads", "neurons", "hidden"]):
        apt, optimizer = built(FAMILIES[name], prune=prune)
        Controller(apt, optimizer, 16, export="stock", **SHORT).remove()


def test_only_some_scores_leave_what_cannot_be_said():
    """With biases LLaMA has no twin, and 2 of 3 heads of 8 channels divide 24 where 2 of 5 do not."""
    sizes = {"num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 20, "head_dim": 4, "attention_bias": True}
    family = FAMILIES["llama"]
    apt, optimizer = built(family, prune=["heads", "neurons"], density=0.6, sizes=sizes)
    found = plan(family.model(**sizes), apt.apt_config, length=16)
    assert found.keep["heads"] == 1 and found.exports["stock"] == []  # of equal scores
    assert any("other scores may leave what no stock config can say" in note and "got 3 and 20" in note for note in found.notes)
    with pytest.raises(ValueError, match=r"num_attention_heads of LlamaConfig must divide hidden_size, got 3 and 20"):
        Controller(apt, optimizer, 16, export="stock", **SHORT)


def test_what_is_masked_already_counts():
    """Heads that one-shot pruning has taken, where a Controller prunes neurons."""
    apt, optimizer = built(FAMILIES["bert"], prune=["neurons"], density=0.7)
    for name in ("0.heads", "1.heads"):
        apt.set_block_mask(name, torch.tensor([1.0, 1.0, 0.0]))
    with pytest.raises(ValueError, match="export: .*BertConfig makes heads"):
        Controller(apt, optimizer, 16, export="stock", **SHORT)
    with pytest.raises(ValueError, match="export: .*BertConfig makes heads"):
        Controller(apt, optimizer, 16, density=1.0, export="stock", **SHORT)


@pytest.mark.parametrize(
    ("value", "words"),
    [("onnx", "export must be 'stock' or 'per_layer', got 'onnx'"), (True, "export must be 'stock' or 'per_layer', got True")],
)
def test_other_formats_are_refused(value, words):
    apt, optimizer = built(FAMILIES["bert"])
    with pytest.raises(ValueError, match=words):
        Controller(apt, optimizer, 16, export=value, **SHORT)


def test_a_model_that_is_not_of_transformers_cannot_be_exported():
    apt = get_apt_model(nn.Sequential(nn.Linear(6, 6)), APTConfig(r=2))
    optimizer = torch.optim.SGD([p for p in apt.parameters() if p.requires_grad])
    with pytest.raises(TypeError, match="model: expected a model of transformers inside, got Sequential"):
        Controller(apt, optimizer, 16, density=1.0, export="per_layer", **SHORT)
    Controller(apt, optimizer, 16, density=1.0, **SHORT)


@pytest.mark.usefixtures("loaded_here")
def test_a_run_whose_export_was_promised_is_exported(tmp_path):
    apt, optimizer = built(FAMILIES["llama"])
    controller = Controller(apt, optimizer, 4, export="stock", **QUICK)
    train(apt, optimizer, controller, FAMILIES["llama"], 3)
    assert export(apt, tmp_path / "small") in ("LlamaForCausalLM", "MistralForCausalLM")


# -- what is said -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "given", "said"),
    [
        ({}, {}, True),
        ({}, {"density": 1.0}, False),
        ({}, {"density": 0.7}, False),
        ({"density": 0.7}, {}, False),
        ({"density": 0.7}, {"density": 1.0}, False),
    ],
)
def test_a_density_that_nobody_gave_is_said(config, given, said, caplog):
    apt, optimizer = built(FAMILIES["llama"], **{"density": 1.0, **config})
    Controller(apt, optimizer, 16, **given, **SHORT)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * said
    assert not said or "density is 1.0, its default, so nothing will be pruned; give density=0.5" in caplog.text


def test_kinds_that_the_model_does_not_have_are_said(caplog):
    """A decoder with attention to an encoder that no row speaks of has no hidden dimensions to prune."""
    family = FAMILIES["bert-decoder"]
    apt, optimizer = built(family, sizes={"add_cross_attention": True}, prune=["neurons", "hidden"], density=0.95)
    Controller(apt, optimizer, 16, **SHORT).remove()
    assert "prune names ['hidden'], of which BertLMHeadModel has no blocks" in caplog.text
    with pytest.raises(
        ValueError, match=r"prune: .*\['heads', 'neurons'\], got \['hidden'\]; its row .* bert.encoder.layer.0.crossattention"
    ):
        Controller(apt, optimizer, 16, prune=["hidden"], **SHORT)


@pytest.mark.parametrize("kind", ["Electra", "Albert"])
def test_an_architecture_that_is_not_in_the_table_is_named_with_the_remedy(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "embedding_size": 16,
    }
    model = getattr(transformers, f"{kind}ForSequenceClassification")(getattr(transformers, f"{kind}Config")(**sizes))
    config = APTConfig(r=2, density=0.6)
    got = r"model has, \[\], got \['heads', 'neurons'\]; declare "
    words = rf"{got}{kind}.* \(model_type '{kind.lower()}'\) with apt_ext.register_architecture"
    with pytest.raises(ValueError, match=words):
        plan(model, config)
    apt = get_apt_model(model, config)
    with pytest.raises(ValueError, match=words):
        Controller(apt, torch.optim.SGD([p for p in apt.parameters() if p.requires_grad]), 16, **SHORT)


def test_after_a_merge_there_is_nothing_to_prune():
    apt, optimizer = built(FAMILIES["bert"])
    apt.merge_and_unload()
    with pytest.raises(ValueError, match=r"prune: .*; after merge_and_unload\(\) it has none"):
        Controller(apt, optimizer, 16, **SHORT)


# -- the search ---------------------------------------------------------------------------------------------------------------------------


def test_a_chunk_is_worth_what_each_of_it_is_worth():
    """Not more because it is larger: of four neurons of 1 each and one head of 2, at the same cost, the head stays."""
    cost, counts = Products({("head",): 1.0, ("neurons",): 1.0}), {"head": 1, "neurons": 6}
    groups = [Group(("neurons",), "neurons", 4, 0), Group(("head",), "heads", 1, 0)]
    live = {name: torch.ones(count, dtype=torch.bool) for name, count in counts.items()}
    scores = {"head": torch.tensor([2.0]), "neurons": torch.ones(6)}
    keep = search(scores, live, groups, cost, counts, 4.0).keep
    assert keep["head"].all() and not keep["neurons"].any()
    found = search({**scores, "head": torch.tensor([0.9])}, live, groups, cost, counts, 6.0)
    assert not found.keep["head"].any() and found.keep["neurons"].all() and found.threshold == 1.0  # also the shorter, last one


def test_a_density_that_is_the_floor_to_rounding_is_reached():
    apt = get_apt_model(FAMILIES["bert"].model(), APTConfig(r=1, prune=["neurons"], density=0.5))
    cost = cost_of(apt.model, apt.blocks)
    live = {name: torch.ones(block.count, dtype=torch.bool) for name, block in apt.blocks.items()}

    def outlook(density):
        return Outlook(apt.model, apt.blocks, replace(apt.apt_config, density=density), cost, live)

    share = cost.total(outlook(0.5).left(cost=-1.0)) / cost.total({name: block.count for name, block in apt.blocks.items()})
    outlook(math.nextafter(share, 0.0)).check_density()
    with pytest.raises(ValueError, match="density: expected at least"):
        outlook(share * (1 - 1e-9)).check_density()


def test_what_a_stock_config_can_store_is_asked_of_settings_that_name_no_kinds():
    """Not told is a kind that nobody asked for."""
    model = FAMILIES["bert"].model()
    settings = (16, "stock", "parameters", 128, 1, True)
    assert check_settings(model, APTConfig(density=0.9, round_to=4), *settings).prune == ["neurons"]
    with pytest.raises(ValueError, match=r"density: expected at least 0\.\d+.* \['neurons'\] alone are pruned, got 0\.45"):
        check_settings(model, APTConfig(density=0.45, round_to=4), *settings)
    with pytest.raises(ValueError, match="export: "):
        check_settings(model, APTConfig(density=0.5, round_to=4, prune=["heads", "neurons"]), *settings)
