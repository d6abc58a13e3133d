"""What blocks cost, and which of them are within a budget: the search equals trying everything."""

import re

import pytest
import torch
from families import EMPTY_HEADS, EVERY, FAMILIES, keep_first
from hypothesis import given
from hypothesis import strategies as st

from apt_ext import APTConfig, get_apt_model, plan, shrink
from apt_ext.method import Group, Latency, Products, cost_of, measure_latency, search
from apt_ext.method.select.groups import groups_of

transformers = pytest.importorskip("transformers")


# -- cost ---------------------------------------------------------------------------------------------------------------------------------


def on_meta(kind, config, **sizes):
    with torch.device("meta"):
        model = getattr(transformers, kind)(getattr(transformers, config)(**sizes))
    return get_apt_model(model, APTConfig(target_modules=r".*\.(query|q_proj|q)"))


def weights_only(cost):
    """Without biases and norms, as the paper counts."""
    return Products({blocks: value for blocks, value in cost.terms.items() if len(blocks) == 2})


@pytest.mark.parametrize(
    ("kind", "config", "sizes", "paper", "code"),
    [
        ("RobertaModel", "RobertaConfig", {}, (196_608, 1_536, 110_592), (196_800, 1_537, 110_664)),
        ("LlamaModel", "LlamaConfig", {}, (2_097_152, 12_288, 1_581_056), (2_097_152, 12_288, 1_581_120)),
        (
            "T5ForConditionalGeneration",
            "T5Config",
            {
                "d_model": 768,
                "d_kv": 64,
                "d_ff": 2048,
                "num_layers": 12,
                "num_heads": 12,
                "feed_forward_proj": "gated-gelu",
                "tie_word_embeddings": False,
            },
            (196_608, 2_304, 258_048),
            None,
        ),
    ],
    ids=["roberta-base", "llama-2-7b", "t5-v1.1-base"],
)
def test_golden_block_sizes(kind, config, sizes, paper, code):
    """Parameters of a head, a neuron, a dimension (method 1.6): by the paper's formula, and with biases and norms."""
    apt = on_meta(kind, config, **sizes)
    counts = {name: block.count for name, block in apt.blocks.items()}
    first = {kind: next(name for name, block in apt.blocks.items() if block.kind == kind) for kind in ("heads", "neurons", "hidden")}
    cost = cost_of(apt.model, apt.blocks)
    for expected, found in ((paper, weights_only(cost)), (code, cost)):
        if expected is not None:
            marginal = found.marginal(counts)
            assert tuple(marginal[first[kind]] for kind in ("heads", "neurons", "hidden")) == expected


def test_golden_size_of_the_layers():
    apt = on_meta("RobertaModel", "RobertaConfig")
    counts = {name: block.count for name, block in apt.blocks.items()}
    assert cost_of(apt.model, apt.blocks).total(counts) == 85_054_464
    assert weights_only(cost_of(apt.model, apt.blocks)).total(counts) == 84_934_656
    assert cost_of(apt.model, apt.blocks, "memory").total(counts) == 4 * 85_054_464


@EVERY
def test_the_cost_is_what_a_cut_leaves_in_the_layers(family):
    heads = 1 if family.sizes.get("num_key_value_heads") == 1 else 2
    apt = keep_first(get_apt_model(family.model(), APTConfig(r=2)), heads=heads, neurons=7)
    if "hidden" in apt.blocks:
        keep_first(apt, hidden=20)
    counts = {name: int(apt.get_block_mask(name).sum()) for name in apt.blocks}
    predicted = cost_of(apt.model, apt.blocks).total(counts)
    small = shrink(apt)
    numbered = [module for name, module in small.named_modules() if re.search(r"(layer|layers|h|block)\.\d+$", name)]
    inside = {module for layer in numbered for module in layer.modules() if not isinstance(module, torch.nn.Embedding)}
    assert predicted == sum(p.numel() for module in inside for p in module.parameters(recurse=False))


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_flops_are_those_of_the_plan(name):
    """Of the layers alone, so the difference to a smaller model is the same."""
    family, length = FAMILIES[name], 16
    keep = {"heads": 2, "neurons": 8}
    planned = plan(family.model(), APTConfig(r=2), keep=keep, batch=1, length=length)
    apt = get_apt_model(family.model(), APTConfig(r=2))
    cost = cost_of(apt.model, apt.blocks, "flops", length)
    full = {name: block.count for name, block in apt.blocks.items()}
    cut = {name: keep.get(block.kind, block.count) for name, block in apt.blocks.items()}
    assert length * (cost.total(full) - cost.total(cut)) == planned.dense.flops - planned.target.flops


def test_latency_is_read_from_tables():
    kinds = {"0.heads": "heads", "0.neurons": "neurons", "1.neurons": "neurons", "hidden": "hidden"}
    tables = {"heads": {0: 0.0, 4: 4.0}, "neurons": {0: 1.0, 8: 5.0, 16: 4.0}, "hidden": {0: 0.0, 10: 2.0}}
    cost = Latency(kinds, tables)
    full = {"0.heads": 4, "0.neurons": 16, "1.neurons": 16, "hidden": 10}
    assert cost.total(full) == 4 + 5 + 5  # sixteen neurons are never faster than eight
    assert cost.total({**full, "0.neurons": 4, "hidden": 5}) == (4 + 3 + 5) / 2
    assert cost.marginal(full)["0.neurons"] == (5 - 1) / 16
    with pytest.raises(ValueError, match="latency: expected two or more {number of heads kept: seconds}"):
        Latency(kinds, {**tables, "heads": {4: 1.0}})


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
def test_latency_is_measured_for_every_kind(name):
    apt = get_apt_model(FAMILIES[name].model(torch.float32), APTConfig(r=2))
    tables = measure_latency(apt, tokens=16, points=3, rounds=2)
    assert tables.keys() == {"heads", "neurons", "hidden"}
    for kind, table in tables.items():
        count = next(block.count for block in apt.blocks.values() if block.kind == kind)
        assert max(table) == count and all(seconds > 0 for kept, seconds in table.items() if kept) and list(table) == sorted(table)
    cost = Latency({name: block.kind for name, block in apt.blocks.items()}, tables)
    full = {name: block.count for name, block in apt.blocks.items()}
    assert cost.total({**full, "hidden": 6}) <= cost.total(full)


# -- search -------------------------------------------------------------------------------------------------------------------------------


@st.composite
def problems(draw):
    """Two layers of heads and neurons and a residual stream, in groups of one or two blocks; scores with ties, zeros and NaN."""
    counts = {"0.a": draw(st.integers(1, 3)), "1.a": 0, "0.b": draw(st.integers(1, 7)), "1.b": 0, "h": draw(st.integers(1, 6))}
    counts |= {"1.a": counts["0.a"], "1.b": counts["0.b"]}
    values = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0, 10.0, float("nan")])
    scores = {name: torch.tensor(draw(st.lists(values, min_size=n, max_size=n))) for name, n in counts.items()}
    alive = st.sampled_from([True, True, True, False])
    live = {name: torch.tensor(draw(st.lists(alive, min_size=n, max_size=n))) for name, n in counts.items()}
    live["h"][0] = True
    terms = {("0.a", "h"): 4.0, ("1.a", "h"): 4.0, ("0.b", "h"): 2.0, ("1.b", "h"): 2.0, ("h",): 3.0, ("0.b",): 1.0, (): 5.0}
    together, chunk, floor = draw(st.booleans()), draw(st.integers(1, 3)), draw(st.integers(0, 1))
    names = [("0.a", "1.a"), ("0.b", "1.b")] if together else [("0.a",), ("1.a",), ("0.b",), ("1.b",)]
    groups = [Group(n, n[0][-1], 1 if n[0][-1] == "a" else chunk, floor) for n in names] + [Group(("h",), "h", chunk, 1)]
    cost = Products(terms)
    return scores, live, groups, cost, counts, draw(st.floats(0, 1)) * cost.total(counts), draw(st.booleans())


def brute_force(scores, live, groups, cost, counts, budget, joint):
    """Every beginning of the order in turn, in plain Python: {block: the indices that stay}."""

    def value(name, i):
        return 0.0 if scores[name][i].isnan() else scores[name][i].item()

    def ranked(name):
        found = (i for i in range(len(scores[name])) if live[name][i])
        return sorted(found, key=lambda i: (bool(scores[name][i].isnan()), -value(name, i), i))

    order = {name: ranked(name) for group in groups for name in group.blocks}
    unit = cost.marginal({**counts, **{name: len(own) for name, own in order.items()}})
    chunks = []
    for group in groups:
        length, worth = min(len(order[name]) for name in group.blocks), float("inf")
        for start in range(0, length, group.chunk):
            size = min(group.chunk, length - start)
            score = sum(value(name, i) for name in group.blocks for i in order[name][start : start + size])
            worth = min(worth, score / (size * sum(unit[name] for name in group.blocks)))
            chunks.append({"group": group, "size": size, "forced": start < group.floor * group.chunk, "key": -worth})
    if not joint:
        for kind in {group.kind for group in groups}:
            own = sorted((c for c in chunks if c["group"].kind == kind), key=lambda c: (not c["forced"], 0 if c["forced"] else c["key"]))
            for i, chunk in enumerate(own):
                chunk["share"] = i / len(own)
        for chunk in chunks:
            chunk["key"] = chunk["share"]
    line = sorted(chunks, key=lambda c: (not c["forced"], 0 if c["forced"] else c["key"]))
    least = max(sum(c["forced"] for c in chunks), min(1, len(chunks)))
    best = None
    for number in range(least, len(line) + 1):
        kept = dict.fromkeys(order, 0)
        for chunk in line[:number]:
            for name in chunk["group"].blocks:
                kept[name] += chunk["size"]
        if best is None or cost.total({**counts, **kept}) <= budget:
            best = {name: set(order[name][:n]) for name, n in kept.items()}
    return best


@given(problems())
def test_search_equals_brute_force(problem):
    found = {name: set(keep.nonzero().flatten().tolist()) for name, keep in search(*problem).keep.items()}
    assert found == brute_force(*problem)


@given(problems(), st.floats(0, 1))
def test_search_never_exceeds_the_budget_is_monotone_and_deterministic(problem, share):
    scores, live, groups, cost, counts, budget, joint = problem
    floors = search(scores, live, groups, cost, counts, -1.0, joint).keep
    less = search(scores, live, groups, cost, counts, share * budget, joint).keep
    more = search(*problem).keep
    again = search(*problem).keep

    def total(keep):
        return cost.total({**counts, **{name: int(kept.sum()) for name, kept in keep.items()}})

    assert total(more) <= max(budget, total(floors)) and total(more) >= total(less)
    for name, kept in more.items():
        assert torch.equal(kept, again[name]) and not bool((less[name] & ~kept).any()) and not bool((kept & ~live[name]).any())
    for group in groups:
        numbers = {int(more[name].sum()) for name in group.blocks}
        whole = min(int(live[name].sum()) for name in group.blocks)
        assert len(numbers) == 1 and (numbers == {whole} or numbers.pop() % group.chunk == 0)


def setup(name, **options):
    apt = get_apt_model(FAMILIES[name].model(), APTConfig(r=2))
    blocks = apt.blocks
    counts = {name: block.count for name, block in blocks.items()}
    groups = groups_of(apt.model, blocks, **{"round_to": 4, "uniform": False, "floor": 0, **options})
    live = {name: torch.ones(block.count, dtype=torch.bool) for name, block in blocks.items()}
    return apt, groups, live, counts, cost_of(apt.model, blocks)


@pytest.mark.parametrize("joint", [True, False])
def test_at_density_1_everything_stays(joint):
    apt, groups, live, counts, cost = setup("t5")
    scores = {name: torch.rand(count) for name, count in counts.items()}
    found = search(scores, live, groups, cost, counts, cost.total(counts), joint)
    assert all(bool(keep.all()) for keep in found.keep.values())


@pytest.mark.parametrize("name", ["t5", "t5-gated"])
def test_the_top_cross_attention_keeps_its_best_head(name):
    """Without it the decoder would be cut off from the encoder; also without floors, and also if it scores nothing."""
    apt, groups, live, counts, cost = setup(name)
    scores = {name: torch.rand(count) + 1 for name, count in counts.items()}
    cross = [name for name in counts if name.endswith("cross_heads")]
    scores |= {name: torch.tensor([0.0, 2e-9, 1e-9]) for name in cross}
    keep = search(scores, live, groups, cost, counts, 0.3 * cost.total(counts)).keep
    assert keep[cross[-1]].tolist() == [False, True, False]


@EMPTY_HEADS
def test_without_floors_a_layer_may_go_but_never_the_model():
    apt, groups, live, counts, cost = setup("bert")
    scores = {name: torch.rand(count) for name, count in counts.items()}
    for name in counts:
        scores[name] *= 1e-9 if name.startswith("1.") else 1
    keep = search(scores, live, groups, cost, counts, 0.3 * cost.total(counts)).keep
    assert not keep["1.heads"].any() and not keep["1.neurons"].any() and keep["0.neurons"].any() and keep["hidden"].any()
    nothing = search(scores, live, groups, cost, counts, 0.0).keep
    assert int(nothing["hidden"].sum()) == 4
    alone = [group for group in groups if group.kind == "neurons"]
    least = search(scores, live, alone, cost, counts, 0.0).keep
    assert sum(int(kept.sum()) for kept in least.values()) == 4


@EVERY
def test_groups_follow_the_stock_config(family):
    """Uniform: all that one entry of the config counts; else each block alone, but T5's stacks keep the same heads."""
    apt = get_apt_model(family.model(), APTConfig(r=2))
    uniform = groups_of(apt.model, apt.blocks, 8, True, 1)
    free = groups_of(apt.model, apt.blocks, 8, False, 1)
    assert (
        sorted(name for group in free for name in group.blocks)
        == sorted(name for group in uniform for name in group.blocks)
        == sorted(apt.blocks)
    )
    assert len(uniform) == len({(block.kind, block.count) for block in apt.blocks.values()})
    sizes = {len(group.blocks) for group in free if group.kind == "heads"}
    assert sizes == ({2} if family.alike else {1})
    assert all(group.chunk == (1 if group.kind == "heads" else 8) for group in free)


def test_ties_are_broken_by_the_order_of_blocks_and_index():
    cost = Products({("a",): 1.0, ("b",): 1.0})
    live = {name: torch.ones(3, dtype=torch.bool) for name in "ab"}
    scores = {name: torch.ones(3) for name in "ab"}
    groups = [Group(("b",), "x", 1, 0), Group(("a",), "x", 1, 0)]
    keep = search(scores, live, groups, cost, {"a": 3, "b": 3}, 4).keep
    assert keep["b"].tolist() == [True, True, True] and keep["a"].tolist() == [True, False, False]


def test_kinds_compete_by_salience_for_their_cost_or_keep_the_same_share():
    cost = Products({("cheap",): 1.0, ("dear",): 10.0})
    live = {name: torch.ones(4, dtype=torch.bool) for name in ("cheap", "dear")}
    scores = {"cheap": torch.full((4,), 1.0), "dear": torch.full((4,), 5.0)}
    groups = [Group((name,), name, 1, 0) for name in live]
    counts = {"cheap": 4, "dear": 4}
    joint, apart = (search(scores, live, groups, cost, counts, 22.0, together).keep for together in (True, False))
    assert [int(joint[name].sum()) for name in counts] == [4, 1]
    assert [int(apart[name].sum()) for name in counts] == [2, 2]


def test_what_rounding_makes_of_equal_chunks_does_not_change_their_order():
    """The last, shorter one never comes first: what is kept stays a multiple of the chunk."""
    live, groups = {"a": torch.ones(8, dtype=torch.bool)}, [Group(("a",), "neurons", 3, 0)]
    for unit in range(1, 50):
        cost = Products({("a",): 0.1 * unit})
        keep = search({"a": torch.full((8,), 0.7)}, live, groups, cost, {"a": 8}, 0.35 * unit).keep
        assert keep["a"].nonzero().flatten().tolist() == [0, 1, 2], unit


@pytest.mark.parametrize("huge", [1000, 2**62, 2**100])
def test_a_chunk_or_floor_of_more_than_all_is_all(huge):
    cost, live = Products({("a",): 1.0, ("b",): 1.0}), {"a": torch.tensor([True, False, True, True]), "b": torch.ones(2, dtype=torch.bool)}
    scores = {"a": torch.arange(4.0), "b": torch.full((2,), 9.0)}
    for chunk, floor, budget, kept in ((huge, 0, 4.0, 0), (huge, 0, 5.0, 3), (1, huge, 0.0, 3)):
        groups = [Group(("b",), "x", 1, 0), Group(("a",), "x", chunk, floor)]
        assert int(search(scores, live, groups, cost, {"a": 4, "b": 2}, budget).keep["a"].sum()) == kept
