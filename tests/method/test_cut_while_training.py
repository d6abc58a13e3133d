"""A Controller that cuts: the run is the masked one, what is out costs nothing, and shares are of the sizes before the first cut."""

import copy

import pytest
import torch
from cases import crossed
from families import FAMILIES, close, outputs
from training import SCHEDULE, all_of, assert_equal, batch_for, built, state_of, train

import apt_ext
from apt_ext import Controller, Growth, adapters, shrink
from apt_ext.pruning import cut_in_place
from apt_ext.pruning.cost import cost_of
from apt_ext.pruning.cut import selected

KINDS = {"blocks": ["heads", "neurons"], "hidden": ["heads", "neurons", "hidden"]}
CONFIG = {"t5": {"uniform": False}, "gpt2": {"uniform": False}}
OPTIONS = {"bert": {"joint": False}, "llama": {"growth": Growth(3.0, limit=12)}, "t5": {"kurtosis": 1.0}}


def run(name, mode, kinds=("heads", "neurons"), steps=16, config=None, **options):
    """(model, optimizer, Controller, losses)"""
    family = FAMILIES[name]
    apt, optimizer = built(family, prune=list(kinds), **{**CONFIG.get(name, {}), **(config or {})})
    controller = Controller(apt, optimizer, 16, **{**SCHEDULE, **OPTIONS.get(name, {}), **options}, shrink=mode)
    losses = []
    for step in range(steps):
        loss = apt(**batch_for(family, step)).loss
        loss.backward()
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
        losses.append(loss.item())
    return apt, optimizer, controller, losses


def same_events(ours, theirs):
    assert len(ours.history) == len(theirs.history) == 3
    for one, other in zip(ours.history, theirs.history, strict=True):
        assert {**one, "threshold": 0, "density": 0} == {**other, "threshold": 0, "density": 0}
        assert one["density"] == pytest.approx(other["density"], rel=1e-12)
        assert (one["threshold"] or 0) == pytest.approx(other["threshold"] or 0, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "kinds"),
    crossed(FAMILIES, KINDS, daily=lambda name, kinds: name in ("bert", "llama", "t5") or (name == "gpt2" and kinds == "hidden")),
)
def test_a_cut_run_is_the_masked_run(name, kinds):
    """Losses, events, what is selected in the first numbering, and the model that comes of it."""
    config = {"density": 0.4} if kinds == "hidden" else {}
    masked, _, one, expected = run(name, "none", KINDS[kinds], config=config)
    apt, _, controller, losses = run(name, "cut", KINDS[kinds], config=config)
    same_events(controller, one)
    for name_, block in masked.blocks.items():
        kept = masked.get_block_mask(name_).nonzero().flatten()
        assert torch.equal(controller.original(name_), kept) and torch.equal(one.original(name_), kept)
        assert apt.blocks[name_].count in (len(kept), 1) and apt.blocks.full[name_] == block.count
    tolerance = 1e-9 if FAMILIES[name].config in ("BertConfig", "GPT2Config") else 1e-5  # norms in float32
    masked.eval(), apt.eval()
    assert losses == pytest.approx(expected, rel=tolerance)
    close(outputs(apt, FAMILIES[name].inputs()), outputs(masked, FAMILIES[name].inputs()), 10 * tolerance)
    assert apt.density == pytest.approx(masked.density) and controller.density == pytest.approx(one.density)
    assert shrink(apt).config.to_dict() == shrink(masked).config.to_dict()
    assert sum(p.numel() for p in apt.parameters()) < sum(p.numel() for p in masked.parameters())


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_what_is_out_is_gone_after_each_event(name):
    """Weights, factors, optimizer state and masks have the sizes that are left; Parameters are the same objects."""
    family = FAMILIES[name]
    apt, optimizer = built(family, prune=["heads", "neurons", "hidden"], density=0.3)
    controller = Controller(apt, optimizer, 16, **SCHEDULE)
    assert controller.shrink == "cut"
    identities = [id(p) for p in apt.parameters()]
    entries, sizes = [], cost_of(apt.model, apt.blocks)
    for step in range(16):
        train(apt, optimizer, controller, family, 1, first=step)
        if step + 1 in controller.steps.events:
            entries.append(sum(p.numel() for p in apt.model.parameters() if not p.requires_grad))
            counts = {name: block.count for name, block in apt.blocks.items()}
            kept = controller.history[-1]["kept"]
            assert counts == kept
            assert controller.history[-1]["density"] == pytest.approx(sizes.total(kept) / sizes.total(apt.blocks.full))
            for _, adapter in adapters(apt):
                out, into = len(adapter.mask_out), len(adapter.mask_in)
                assert adapter.matrix.shape == (out, into) == (adapter.out_features, adapter.in_features)
                assert adapter.lora_A.shape[1] == into and adapter.lora_B.shape[0] == out
            for parameter, state in optimizer.state.items():
                assert all(value.shape == parameter.shape for key, value in state.items() if key != "step")
    assert entries[0] > entries[1] > entries[2] and [id(p) for p in apt.parameters()] == identities
    assert not any(adapter.compacted for _, adapter in adapters(apt)) and apt.target_reached
    assert controller.density <= 0.3


def test_ranks_grow_beyond_what_is_left_and_come_back(tmp_path):
    """Limits and the budget are of the linears as they were; drawn rows are those of a masked run."""
    growth = Growth(8.0, limit=14)
    config = {"density": 0.35, "round_to": 1}
    masked, _, one, _ = run("bert", "none", config=config, growth=growth)
    apt, _, controller, _ = run("bert", "cut", config=config, growth=growth)
    same_events(controller, one)
    above = [name for name, adapter in adapters(apt) if adapter.rank > min(adapter.in_features, adapter.out_features)]
    assert above
    plain = dict(adapters(masked))
    for name, adapter in adapters(apt):
        lanes = plain[name].mask_in != 0
        torch.testing.assert_close(adapter.lora_A, plain[name].lora_A[:, lanes], rtol=1e-9, atol=1e-12)
    name = above[0]
    with pytest.raises(ValueError, match="new_rank must lie between"):  # by hand it is the linear of now that counts
        dict(adapters(apt))[name].increase_rank(dict(adapters(apt))[name].rank + 1)
    apt.save_pretrained(tmp_path)
    again = apt_ext.APTModel.from_pretrained(FAMILIES["bert"].model(), tmp_path)
    fresh, _ = built(FAMILIES["bert"])
    fresh.load_state_dict(apt.state_dict())
    for model in (again, fresh):
        assert {name: a.rank for name, a in adapters(model)} == {name: a.rank for name, a in adapters(apt)}


@pytest.mark.parametrize("budget", ["parameters", "flops", "memory"])
def test_shares_of_a_new_controller_are_of_the_sizes_before_the_first_cut(budget):
    """Density, floors, uniform, every budget, rank limits and the parameter budget: the same in both modes."""
    family, found = FAMILIES["llama"], []
    for mode in ("none", "cut"):
        apt, optimizer, first, _ = run("llama", mode, config={"density": 0.8}, budget=budget, growth=2.0)
        first.remove()
        before = first.density
        second = Controller(apt, optimizer, 16, density=0.4, budget=budget, growth=1.5, shrink=mode, **SCHEDULE)
        assert second.density == before > 0.4
        assert second.adapter_parameters == first.adapter_parameters == first.history[-1]["adapter_parameters"]
        train(apt, optimizer, second, family, 16)
        assert second.density <= 0.4
        found.append(second)
    same_events(*found)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_a_cut_by_hand_is_followed(name):
    """Between two events, of what is pruned and of what others have masked; and the masked run's events are the same."""
    family = FAMILIES[name]
    first = "encoder.0.heads" if name == "t5" else "0.heads"
    runs = []
    for cuts in (False, True):
        apt, optimizer = built(family, prune=["neurons"], uniform=False, density=0.85)
        controller = Controller(apt, optimizer, 16, **SCHEDULE, shrink="none", kurtosis=1.0)
        train(apt, optimizer, controller, family, 7)
        for other in [other for other in apt.blocks if other.rpartition(".")[2] == "heads" and other.split(".")[0] == first.split(".")[0]]:
            apt.set_block_mask(other, torch.tensor([1.0] * (apt.blocks[other].count - 1) + [0.0]))
        if cuts:
            apt.cut(optimizer)
        train(apt, optimizer, controller, family, 9, first=7)
        runs.append((apt, controller))
    (masked, one), (apt, controller) = runs
    same_events(controller, one)
    assert all(torch.equal(controller.original(block), one.original(block)) for block in masked.blocks)
    assert apt.blocks[first].count == masked.blocks[first].count - 1


def test_what_others_have_masked_is_not_cut_at_an_event():
    """It may come back."""
    family = FAMILIES["bert"]
    apt, optimizer = built(family, prune=["neurons"], density=0.85)
    controller = Controller(apt, optimizer, 16, **SCHEDULE)
    apt.set_block_mask("0.heads", torch.tensor([1.0, 0.0, 1.0]))
    train(apt, optimizer, controller, family, 16)
    assert apt.blocks["0.heads"].count == 3 and apt.blocks["0.neurons"].count < 20
    apt.set_block_mask("0.heads", torch.ones(3))


def test_a_cut_between_a_backward_and_observe_is_an_error_that_says_what_to_do():
    """And the run goes on with the next backward."""
    family = FAMILIES["bert"]
    apt, optimizer = built(family)
    controller = Controller(apt, optimizer, 16, **SCHEDULE, shrink="none")
    train(apt, optimizer, controller, family, 7)
    apt(**batch_for(family, 7)).loss.backward()
    apt.cut(optimizer)
    with pytest.raises(RuntimeError, match="observe: the model was cut between a backward and this call.* cut between step"):
        controller.observe()
    optimizer.zero_grad()
    train(apt, optimizer, controller, family, 9, first=7)
    assert controller.done and controller.now == 16


@pytest.mark.parametrize("place", [1, 7, 14])
def test_short_memory_at_an_event_is_made_up_for_by_the_next_step(monkeypatch, place):
    """The cut is made whole or not at all."""
    family, calls = FAMILIES["bert"], []
    expected = run("bert", "cut", growth=2.0)[0]
    apt, optimizer = built(family)
    controller = Controller(apt, optimizer, 16, **SCHEDULE, **OPTIONS["bert"], growth=2.0)
    train(apt, optimizer, controller, family, 5)
    apt(**batch_for(family, 5)).loss.backward()
    controller.observe()
    optimizer.step()
    optimizer.zero_grad()

    def short(*args):
        calls.append(args)
        if len(calls) == place:
            raise torch.OutOfMemoryError("no memory")
        return selected(*args)

    monkeypatch.setattr(cut_in_place, "selected", short)
    shapes = [p.shape for p in apt.parameters()]
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        controller.step()
    assert [p.shape for p in apt.parameters()] == shapes and controller.now == 5 and not controller.history
    outputs(apt, family.inputs())
    controller.step()
    assert controller.now == 6 and [p.shape for p in apt.parameters()] != shapes
    train(apt, optimizer, controller, family, 10, first=6)
    assert_equal(state_of(apt), state_of(expected))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_copies_are_whole_and_go_on_by_themselves(name):
    """deepcopy after a cut: the same function, its own sizes, and a Controller of its own."""
    apt, optimizer, controller, _ = run(name, "cut", steps=8)
    twin = copy.deepcopy(apt)
    before = outputs(twin, FAMILIES[name].inputs())
    train(apt, optimizer, controller, FAMILIES[name], 8, first=8)
    close(outputs(twin, FAMILIES[name].inputs()), before, 0)
    assert twin.density > apt.density
    its = torch.optim.AdamW(apt_ext.adapter_parameters(twin), lr=1e-3)
    second = Controller(twin, its, 16, density=0.6, **SCHEDULE)
    train(twin, its, second, FAMILIES[name], 16)
    assert second.density <= 0.6 and all_of(twin, its, second)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("hidden", [False, True])
def test_memory_of_a_step_falls_with_each_event(hidden):
    """What the allocator holds between steps, and its peak within one."""
    family = FAMILIES["llama"]
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    apt, _ = built(family, sizes=sizes, prune=["heads", "neurons", *["hidden"] * hidden], density=0.3)
    apt.to("cuda", torch.float32)
    optimizer = torch.optim.AdamW(apt_ext.adapter_parameters(apt), lr=1e-4, fused=True)
    controller = Controller(apt, optimizer, 16, growth=1.0, **SCHEDULE)
    batch = {key: value.cuda() for key, value in batch_for(family, 0).items()}
    held, peaks, frozen = {}, {}, {}
    for step in range(1, 17):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        apt(**batch).loss.backward()
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        peaks[step] = torch.cuda.max_memory_allocated()
        controller.step()
        held[step] = torch.cuda.memory_allocated()
        frozen[step] = sum(p.nbytes for p in apt.parameters() if not p.requires_grad)
    for before, after in zip((5, 7, 11), (7, 11, 15), strict=True):
        gone = frozen[before] - frozen[after]
        assert gone > 0 and held[before] - held[after] >= 0.95 * gone and peaks[before] - peaks[after] >= 0.95 * gone
