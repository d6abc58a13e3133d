"""States of models that were cut: any of them brings an uncut model to its sizes, or changes nothing."""

import copy
import io
import json

import pytest
import torch
from families import FAMILIES, close, outputs
from low_rank_pair import bits
from training import SCHEDULE, all_of, assert_equal, batch_for, built, train

import apt_ext
from apt_ext import APTModel, Controller, Growth, adapters
from apt_ext.pruning import cut_in_place

NAMES = ["bert", "llama"]
CONFIG = {
    "bert": {"prune": ["heads", "neurons", "hidden"], "density": 0.4},
    "llama": {"uniform": False, "round_to": 1, "density": 0.5},
}
OPTIONS = {"bert": {"joint": False}, "llama": {"growth": Growth(3.0), "kurtosis": 1.0}}


def fresh(name, mode, seed=0, optimizer=None):
    """A model that was never trained, with other random factors, an optimizer, and its Controller."""
    apt, its = built(FAMILIES[name], **CONFIG[name])
    torch.manual_seed(seed)
    with torch.no_grad():
        for _, adapter in adapters(apt):
            adapter.Wa.normal_()
    its = its if optimizer is None else optimizer(apt)
    return apt, its, Controller(apt, its, 16, shrink=mode, **SCHEDULE, **OPTIONS[name])


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


@pytest.mark.parametrize("mode", ["cut", "compact", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_stopping_at_any_step_changes_nothing(name, mode):
    """From state_dicts, into the uncut model. The events are at 6, 10 and 14."""
    family, saved, reached = FAMILIES[name], {}, {}
    whole = fresh(name, mode)
    for step in range(16):
        saved[step] = through_a_file([part.state_dict() for part in whole])
        train(*whole, family, 1, first=step)
        reached[step + 1] = {key: value.clone() for key, value in all_of(*whole).items()}
    for stop in range(16):
        apt, optimizer, controller = fresh(name, mode, 1 + stop)
        for part, state in zip((apt, optimizer, controller), saved[stop], strict=True):
            part.load_state_dict(state)
        assert bits(controller.state_dict()) == bits(saved[stop][2])
        for step in range(stop, 16 if stop in (7, 13) else stop + 1):
            train(apt, optimizer, controller, family, 1, first=step)
            assert_equal(all_of(apt, optimizer, controller), reached[step + 1])
    cut = [any(key.startswith("original.") for key in saved[step][0]) for step in range(16)]
    assert cut == [mode == "cut" and step >= 6 for step in range(16)]


@pytest.mark.parametrize("base", ["uncut", "cut less", "cut alike"])
@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on_from_a_directory(tmp_path, name, base):
    """save_pretrained and Controller.save in one directory; and into models that were cut less, or alike, before."""
    family = FAMILIES[name]
    apt, optimizer, controller = fresh(name, "cut")
    train(apt, optimizer, controller, family, 6)
    less = copy.deepcopy(apt)
    train(apt, optimizer, controller, family, 5, first=6)
    apt.save_pretrained(tmp_path)
    controller.save(tmp_path)
    kept = through_a_file(optimizer.state_dict())
    assert {"controller.json", "controller.safetensors", "apt_config.json"} <= {file.name for file in tmp_path.iterdir()}
    if base == "uncut":
        again = APTModel.from_pretrained(built(family)[0].merge_and_unload(), tmp_path).train()
    else:
        again = copy.deepcopy(less if base == "cut less" else apt)
        with torch.no_grad():
            for _, adapter in adapters(again):
                adapter.Wa.normal_()
        again.load_state_dict(through_a_file(apt.state_dict()))
    its = torch.optim.AdamW(apt_ext.adapter_parameters(again), lr=1e-3)
    second = Controller(again, its, 16, **SCHEDULE, **OPTIONS[name])
    its.load_state_dict(kept)
    second.load(tmp_path)
    assert second.history == controller.history and second.density == controller.density
    train(apt, optimizer, controller, family, 5, first=11)
    train(again, its, second, family, 5, first=11)
    assert_equal(all_of(again, its, second), all_of(apt, optimizer, controller))


def test_a_base_that_was_cut_alike_by_other_means_is_taken(tmp_path):
    """And what there was before is what the state says."""
    family = FAMILIES["bert"]
    apt, _ = built(family, uniform=False)
    apt.set_block_mask("0.neurons", (torch.arange(20) % 3 != 0).float())
    apt.set_block_mask("1.heads", torch.tensor([1.0, 0.0, 1.0]))
    apt.cut()
    apt.save_pretrained(tmp_path)
    other, _ = built(family)
    for name, left in apt.blocks.origin.left.items():
        other.set_block_mask(name, left.float())
    again = APTModel.from_pretrained(other.cut().merge_and_unload(), tmp_path)
    close(outputs(again.eval(), family.inputs()), outputs(apt.eval(), family.inputs()))
    assert again.density == apt.density < 1 and again.blocks.full == apt.blocks.full


def everything(apt):
    """What must be as before: values, shapes, objects, sizes that modules and configs say."""
    sizes = ("in_features", "out_features", "num_attention_heads", "all_head_size", "num_heads", "normalized_shape", "embedding_dim")
    return (
        {name: (id(p), p.detach().clone(), None if p.grad is None else p.grad.clone()) for name, p in apt.named_parameters()},
        {name: buffer.clone() for name, buffer in apt.named_buffers()},
        {(name, size): getattr(m, size) for name, m in apt.named_modules() for size in sizes if size in vars(m)},
        apt.config.to_dict(),
        {name: block.count for name, block in apt.blocks.items()},
        [(name, type(module)) for name, module in apt.named_modules()],
    )


def assert_unchanged(before, apt):
    now = everything(apt)
    assert now[2:] == before[2:] and now[0].keys() == before[0].keys() and now[1].keys() == before[1].keys()
    for name, (identity, value, grad) in before[0].items():
        mine = now[0][name]
        assert mine[0] == identity and torch.equal(mine[1], value), name
        assert (grad is None) == (mine[2] is None) and (grad is None or torch.equal(mine[2], grad)), name
    assert all(torch.equal(now[1][name], value) for name, value in before[1].items())


def wrong_size(state):
    key = next(key for key in state if key.endswith("mask_out"))
    return {**state, key: torch.ones(3)}


def missing_key(state):
    return {key: value for key, value in state.items() if not key.endswith("value.lora_A")}


def bad_mask(state):
    key = next(key for key in state if key.endswith("query.mask_out"))
    return {**state, key: torch.full_like(state[key], 2.0)}


def one_entry_less(state):
    return {key: value for key, value in state.items() if key != "original.1.heads"}


def of_floats(state):
    return {**state, "original.1.heads": torch.ones(3)}


def longer(state):
    return {**state, "original.1.neurons": torch.ones(21, dtype=torch.bool)}


def nothing_hidden(state):
    return {**state, "original.hidden": torch.zeros(24, dtype=torch.bool)}


@pytest.mark.parametrize(
    ("damage", "kind", "words"),
    [
        (wrong_size, ValueError, "mask_out must have shape"),
        (missing_key, (RuntimeError, ValueError), "Missing|must hold both|lora_A"),
        (bad_mask, ValueError, "must hold values in"),
        (one_entry_less, ValueError, r"original\.\*: expected an entry for each block of this model, got others: 1.heads"),
        (of_floats, TypeError, r"original.1.heads must be a Tensor of torch.bool, got torch.float32"),
        (longer, ValueError, r"original.1.neurons must have shape \[20\]"),
        (nothing_hidden, ValueError, "original.hidden must leave at least one dimension"),
    ],
)
def test_a_state_that_is_refused_leaves_the_model_uncut(tmp_path, damage, kind, words):
    family = FAMILIES["bert"]
    cut, optimizer, controller = fresh("bert", "cut")
    train(cut, optimizer, controller, family, 11)
    apt, _, _ = fresh("bert", "none", 3)
    apt(**batch_for(family, 0)).loss.backward()
    before, expected = everything(apt), outputs(apt.eval(), family.inputs())
    with pytest.raises(kind, match=words):
        apt.load_state_dict(damage(cut.state_dict()))
    assert_unchanged(before, apt)
    close(outputs(apt, family.inputs()), expected, 0)
    apt.load_state_dict(cut.state_dict())
    close(outputs(apt, family.inputs()), outputs(cut.eval(), family.inputs()), 0)


def test_a_file_that_is_refused_leaves_the_base_uncut(tmp_path, monkeypatch):
    """Found after the cut: the factors of one adapter have another rank than it can have."""
    family = FAMILIES["bert"]
    cut, optimizer, controller = fresh("bert", "cut")
    train(cut, optimizer, controller, family, 11)
    with torch.no_grad():
        _, adapter = next((name, a) for name, a in adapters(cut) if a.rank)
        adapter.lora_A.set_(torch.ones(40, adapter.in_features, dtype=torch.float64))
        adapter.lora_B.set_(torch.ones(adapter.out_features, 40, dtype=torch.float64))
        adapter.take_rank(40)
    cut.save_pretrained(tmp_path)
    base = built(family)[0].merge_and_unload()
    before = {name: (id(p), p.detach().clone()) for name, p in base.named_parameters()}, base.config.to_dict()
    with pytest.raises(ValueError, match=r"apt_model.safetensors: .*lora_A: expected shape"):
        APTModel.from_pretrained(base, tmp_path)
    assert base.config.to_dict() == before[1]
    assert all(before[0][name][0] == id(p) and torch.equal(before[0][name][1], p) for name, p in base.named_parameters())
    assert [type(module).__name__ for module in base.modules() if "APT" in type(module).__name__] == []


def test_a_state_that_was_cut_less_is_refused():
    """With its entries, and without any (of the model before its cut); what a cut took does not come back."""
    family = FAMILIES["bert"]
    apt, optimizer, controller = fresh("bert", "cut")
    start = copy.deepcopy(apt.state_dict())
    train(apt, optimizer, controller, family, 6)
    less = copy.deepcopy(apt.state_dict())
    train(apt, optimizer, controller, family, 5, first=6)
    before = everything(apt)
    for state in (start, less):
        with pytest.raises(ValueError, match=r"expected a state that was cut at least as far as this model, got one that keeps \d+ of the"):
            apt.load_state_dict(state)
        assert_unchanged(before, apt)


def test_short_memory_while_a_state_cuts_leaves_the_model_uncut(monkeypatch):
    family = FAMILIES["bert"]
    cut, optimizer, controller = fresh("bert", "cut")
    train(cut, optimizer, controller, family, 11)
    apt, _, _ = fresh("bert", "none", 3)
    before, calls = everything(apt), []

    def short(value, dims):
        calls.append(value)
        if len(calls) == 9:
            raise torch.OutOfMemoryError("no memory")
        return selected(value, dims)

    selected = cut_in_place.selected
    monkeypatch.setattr(cut_in_place, "selected", short)
    with pytest.raises(torch.OutOfMemoryError):
        apt.load_state_dict(cut.state_dict())
    assert_unchanged(before, apt)


def test_a_parent_of_the_model_loads_it_too():
    """torch's recursion, as of a LightningModule."""
    family = FAMILIES["llama"]
    cut, optimizer, controller = fresh("llama", "cut")
    train(cut, optimizer, controller, family, 11)
    apt, _, _ = fresh("llama", "none", 3)
    parent = torch.nn.ModuleDict({"inner": apt})
    parent.load_state_dict({f"inner.{key}": value for key, value in cut.state_dict().items()})
    close(outputs(apt.eval(), family.inputs()), outputs(cut.eval(), family.inputs()), 0)
    assert apt.density == cut.density and apt.target == cut.target


def test_a_copy_of_the_model_inside_saves_what_was_cut(tmp_path):
    """Taken before and after a cut; it has lost its APTModel."""
    family = FAMILIES["bert"]
    apt, optimizer, controller = fresh("bert", "cut")
    train(apt, optimizer, controller, family, 11)
    inside = copy.deepcopy(apt.model)
    inside.save_pretrained(tmp_path)
    again = APTModel.from_pretrained(built(family)[0].merge_and_unload(), tmp_path)
    assert again.blocks.full == apt.blocks.full and again.target == apt.target and not again.target_reached
    close(outputs(again.eval(), family.inputs()), outputs(apt.eval(), family.inputs()), 0)


# -- Controller.save and load -------------------------------------------------------------------------------------------------------------


def test_files_of_a_controller_hold_its_state_bit_for_bit(tmp_path):
    """As safetensors and JSON; an older save is replaced, and other files stay."""
    apt, optimizer, controller = fresh("llama", "cut")
    (tmp_path / "notes.txt").write_text("mine")
    controller.save(tmp_path)
    train(apt, optimizer, controller, FAMILIES["llama"], 8)
    controller.save(tmp_path)
    model, its, second = fresh("llama", "cut", 2)
    model.load_state_dict(apt.state_dict())
    its.load_state_dict(optimizer.state_dict())
    second.load(tmp_path)
    assert bits(second.state_dict()) == bits(controller.state_dict()) and second.history == controller.history
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert json.loads((tmp_path / "controller.json").read_text())["format"] == 1


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("controller.json", lambda text: text.replace(b'"step"', b'"stop"'), "controller.json: expected content with SHA-256"),
        ("controller.safetensors", lambda data: data[:-1], r"controller.safetensors: expected \d+ bytes"),
        ("controller_manifest.json", lambda _: b"{}", "controller_manifest.json"),
        ("controller.json", None, "controller.json"),
    ],
)
def test_damaged_files_of_a_controller_are_refused(tmp_path, name, change, words):
    apt, optimizer, controller = fresh("bert", "none")
    train(apt, optimizer, controller, FAMILIES["bert"], 3)
    controller.save(tmp_path)
    before = str(controller.state_dict())
    if change is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=words):
        controller.load(tmp_path)
    assert str(controller.state_dict()) == before
    with pytest.raises(ValueError, match="path|controller_manifest"):
        controller.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="path: expected a directory or a missing one"):
        (tmp_path / "file").write_text("")
        controller.save(tmp_path / "file")


def test_files_of_another_run_say_the_file_and_what_differs(tmp_path):
    apt, optimizer, controller = fresh("bert", "none")
    train(apt, optimizer, controller, FAMILIES["bert"], 3)
    controller.save(tmp_path)
    _, _, other = fresh("llama", "none")
    with pytest.raises(ValueError, match=r"controller.json: state: expected the (schedule|ranks)"):
        other.load(tmp_path)
