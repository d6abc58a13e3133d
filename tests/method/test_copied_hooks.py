"""Copies of a model to which a Controller listens: they have none of its hooks, and saving them works."""

import copy
import io
import pickle

import pytest
import torch
from families import FAMILIES
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from training import SHORT, batch_for, built

from apt_ext import Controller, shrink
from apt_ext.wrapping.module_hooks import ModuleHook


def saved(model):
    """torch.save and torch.load."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(model):
    return pickle.loads(pickle.dumps(model))  # noqa: S301


COPIES = pytest.mark.parametrize("copied", [saved, copy.deepcopy, pickled])


def hooks(model):
    """All of them, and what torch notes beside them."""
    registries = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
    return [hook for module in model.modules() for name in registries for hook in getattr(module, name).values()]


def ours(model):
    return [hook for hook in hooks(model) if isinstance(hook, ModuleHook)]


def listened(name="llama", **config):
    apt, optimizer = built(FAMILIES[name], prune=["heads", "neurons", "hidden"], **config)
    controller = Controller(apt, optimizer, 16, **SHORT)
    assert len(ours(apt)) > 5
    return apt, optimizer, controller


@COPIES
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_a_copy_of_the_model_has_no_hooks_and_computes_the_same(name, copied):
    apt, _, controller = listened(name)
    batch = batch_for(FAMILIES[name], 0)
    other = copied(apt)
    assert hooks(other) == []
    other(**batch).loss.backward()
    assert not controller.scores.salience.heard
    loss = apt(**batch).loss
    assert torch.equal(loss, other(**batch).loss)
    loss.backward()
    assert controller.scores.salience.heard
    optimizer = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.1)
    assert Controller(other, optimizer, 16, **SHORT).listening and len(ours(other)) == len(ours(apt))


@COPIES
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_what_shrink_gives_has_no_hooks(name, copied):
    apt, _, controller = listened(name)
    apt.set_block_mask("hidden", (torch.arange(24) != 3).float())
    small = shrink(apt)
    assert hooks(small) == []
    batch = batch_for(FAMILIES[name], 0)
    assert torch.equal(copied(small)(**batch).loss, small(**batch).loss) and not controller.scores.salience.heard
    assert b"apt_ext.wrapping.module_hooks" not in pickle.dumps(small)


@COPIES
@pytest.mark.parametrize("part", ["", "model", "model.layers.0.mlp.down_proj"])
def test_a_part_copied_alone_is_heard_by_nobody(part, copied):
    """Hooks that came with it do nothing and are gone after its first call."""
    apt, _, controller = listened()
    other = copied(apt.model.get_submodule(part))
    if part.endswith("down_proj"):
        other(torch.randn(2, 3, other.in_features, dtype=torch.float64)).sum().backward()
    else:
        other(**FAMILIES["llama"].inputs())[0].sum().backward()
    assert not controller.scores.salience.heard and ours(other) == []
    apt(**batch_for(FAMILIES["llama"], 0)).loss.backward()
    assert controller.scores.salience.heard


def test_hooks_of_others_go_along():
    apt, _, _ = listened()
    apt.model.model.norm.register_forward_pre_hook(print_nothing)
    other = copy.deepcopy(apt)
    assert list(other.model.model.norm._forward_pre_hooks.values()) == [print_nothing] and not ours(other)


def print_nothing(module, args):
    return None


@COPIES
def test_inside_a_compiled_model(copied):
    apt, _, controller = listened("bert")
    other = copied(torch.compile(apt, backend="eager"))
    assert ours(other) == [] and ours(apt)
    other._orig_mod(**batch_for(FAMILIES["bert"], 0)).loss.backward()
    assert not controller.scores.salience.heard


@COPIES
def test_inside_ddp(copied, tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        apt, _, controller = listened("bert", max_rank=4)
        wrapped = DistributedDataParallel(apt, find_unused_parameters=True)
        other = copied(wrapped)
        assert ours(other) == [] and ours(wrapped)
        other(**batch_for(FAMILIES["bert"], 0)).loss.backward()
        assert not controller.scores.salience.heard
        wrapped(**batch_for(FAMILIES["bert"], 0)).loss.backward()
        assert controller.scores.salience.heard
    finally:
        dist.destroy_process_group()
