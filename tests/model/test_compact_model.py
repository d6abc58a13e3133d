"""APTModel.compact: families, chains, and models that train, save, cut and shrink while they compute on kept lanes."""

import copy
import pickle
import warnings

import pytest
import torch
import torch._dynamo.testing
from families import EVERY, FAMILIES, adapted, close, mask_all, outputs, some
from problems import assert_accurate
from small_adapter import expected
from torch import nn

import apt_ext
from apt_ext import APTAdapter, APTConfig, adapters, get_apt_model
from apt_ext.adapter.compact import Chain
from apt_ext.adapter.packed_weight import width


@EVERY
def test_a_compacted_model_is_the_same_function(family):
    kinds = ("heads", "neurons", "hidden")
    apt = adapted(family)
    apt.compact()
    for how in ("none", "soft", "hard", "one"):
        masks_ = some(family, apt.blocks, kinds if how != "soft" else kinds[:2], how)
        got = outputs(mask_all(apt, masks_), family.inputs())
        apt.compact(False)
        close(got, outputs(apt, family.inputs()), 1e-6 if "Gemma" in family.kind else 1e-9)
        apt.compact()
    assert all(adapter.compacted for _, adapter in adapters(apt) if type(adapter) is APTAdapter)


@EVERY
def test_a_chained_model_is_the_same_function_and_hands_over_kept_lanes(family):
    apt = adapted(family)
    apt.compact(chain=True)
    handed = []
    for name, block in apt.blocks.items():
        if block.kind == "neurons":
            reader = apt.model.get_submodule(next(side.module for side in block.sides if side.side == "in"))
            reader.register_forward_pre_hook(lambda module, args, name=name: handed.append((name, args[0].shape[-1])))
    for how in ("none", "soft", "hard", "one", "empty", "none"):
        mask_all(apt, some(family, apt.blocks, ("heads", "neurons"), how))
        del handed[:]
        got = outputs(apt, family.inputs())
        for name, channels in handed:
            count = apt.blocks[name].count
            assert channels == min(width(int(apt.get_block_mask(name).count_nonzero()), count), count)
        assert handed
        if how == "hard":
            del handed[:]
            close(outputs(copy.deepcopy(apt), family.inputs()), got, 1e-12)
            assert handed and all(channels < apt.blocks[name].count for name, channels in handed)
        apt.compact(False)
        close(got, outputs(apt, family.inputs()), 1e-6 if "Gemma" in family.kind else 1e-9)
        apt.compact(chain=True)


def test_a_chain_is_closed_where_not_all_of_it_takes_part():
    family = FAMILIES["llama"]
    apt = adapted(family)
    mask_all(apt, some(family, apt.blocks, ("neurons",), "hard"))
    want = outputs(apt, family.inputs())
    apt.compact(chain=True)
    up, gate, down = (apt.model.get_submodule(f"model.layers.0.mlp.{name}_proj") for name in ("up", "gate", "down"))
    assert up.packing.chain_out is gate.packing.chain_out is down.packing.chain_in and down.packing.chain_in.is_open()
    for adapter in (up, down):
        adapter.merge_weights()
        assert not down.packing.chain_in.is_open()
        close(outputs(apt, family.inputs()), want)
        adapter.unmerge_weights()
        adapter.compact(False)
        assert not down.packing.chain_in.is_open()
        close(outputs(apt, family.inputs()), want)
        adapter.compact()
        assert down.packing.chain_in.is_open()
    m_in = down.mask_in.roll(1)  # as many lanes, but others
    down.set_masks(m_in)
    assert not down.packing.chain_in.is_open()
    got = outputs(apt, family.inputs())
    apt.compact(False)
    close(got, outputs(apt, family.inputs()))
    mask_all(apt, some(family, apt.blocks, ("neurons",), "hard"))
    apt.compact(chain=True)
    other = pickle.loads(pickle.dumps(apt))  # noqa: S301
    assert other.model.get_submodule("model.layers.0.mlp.up_proj").packing.chain_out.is_open()
    close(outputs(other, family.inputs()), outputs(apt, family.inputs()))
    alone = copy.deepcopy(up)
    assert alone(torch.ones(1, 24, dtype=torch.float64)).shape == (1, 20)
    before = outputs(apt, family.inputs())
    apt.cut()
    close(outputs(apt, family.inputs()), before)


def test_a_controllers_salience_is_the_same_in_a_chain():
    from apt_ext.method.score.salience import Salience

    family, scores = FAMILIES["bert"], []
    for chain in (False, True):
        apt = adapted(family).train()
        for module in apt.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        mask_all(apt, some(family, apt.blocks, ("heads", "neurons"), "hard"))
        apt.compact(chain, chain=chain)
        sites = {n: (apt.model.get_submodule(b.reader), b.count) for n, b in apt.blocks.items() if b.kind == "neurons"}
        salience = Salience(apt, sites)
        apt(**family.inputs(), labels=torch.tensor([0, 1, 2])).loss.backward()
        salience.update()
        kept = {name: apt.get_block_mask(name) != 0 for name in sites}
        scores.append({name: salience.scores[name][kept[name]] for name in sites})
    for name, score in scores[0].items():
        torch.testing.assert_close(score, scores[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_chain_compiles_once_more_and_no_more(backend):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = APTAdapter.from_linear(nn.Linear(24, 40), 2)
            self.down = APTAdapter.from_linear(nn.Linear(40, 16), 2)
            for adapter in (self.up, self.down):
                adapter.compact()
            Chain([self.up], self.down)

        def forward(self, x):
            return self.down(torch.nn.functional.gelu(self.up(x)))

    pair, frames = Pair(), torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(pair, fullgraph=True, backend=frames)
    generator = torch.Generator().manual_seed(0)
    for share in (0.5, 0.3, 0.7, 0.2, 0.6):
        mask = (torch.rand(40, generator=generator) < share).float()
        pair.up.set_masks(mask_out=mask)
        pair.down.set_masks(mask_in=mask)
        x = torch.randn(5, 24)
        got = torch.autograd.grad(compiled(x).square().sum(), (pair.up.lora_A, pair.down.lora_A))
        hidden = torch.nn.functional.gelu(expected(pair.up, x))
        want = torch.autograd.grad(expected(pair.down, hidden).square().sum(), (pair.up.lora_A, pair.down.lora_A))
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)
    assert frames.frame_count <= 2


def test_a_model_trains_saves_cuts_and_shrinks_compacted(tmp_path):
    family = FAMILIES["bert"]
    results = []
    for on in (False, True):
        apt = adapted(family, dtype=torch.float32)
        optimizer = torch.optim.AdamW(apt_ext.adapter_parameters(apt), lr=1e-2)
        apt_ext.hold_pruned(optimizer, adapters(apt))
        apt.compact(on)
        for step in range(4):
            mask_all(apt, some(family, apt.blocks, ("heads", "neurons"), "hard" if step else "soft", seed=step))
            optimizer.zero_grad()
            apt(**family.inputs(), labels=torch.tensor([0, 1, 2])).loss.backward()
            optimizer.step()
        apt.eval()
        apt.save_pretrained(tmp_path / str(on))
        small = apt_ext.shrink(apt)
        before = outputs(apt, family.inputs())
        torch.testing.assert_close(outputs(small, family.inputs()), before, rtol=1e-4, atol=1e-4)
        apt.cut(optimizer)
        assert all(adapter.compacted == on for _, adapter in adapters(apt) if type(adapter) is APTAdapter)
        torch.testing.assert_close(outputs(apt, family.inputs()), before, rtol=1e-4, atol=1e-4)
        optimizer.zero_grad()
        apt(**family.inputs(), labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
        results.append([*before, *outputs(apt, family.inputs())])
        loaded = apt_ext.APTModel.from_pretrained(family.model(torch.float32), tmp_path / str(on)).eval()
        torch.testing.assert_close(outputs(loaded, family.inputs()), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_a_model_is_compacted_whole_or_not_at_all():
    apt = adapted(FAMILIES["bert"])
    list(adapters(apt))[3][1].merge_weights()
    with pytest.raises(RuntimeError, match=r"encoder.*: compact: the weight is merged"):
        apt.compact()
    assert not any(adapter.compacted for _, adapter in adapters(apt))
    unmerged = adapted(FAMILIES["bert"])
    with pytest.raises(TypeError, match="chain must be a bool, got str"):
        unmerged.compact(chain="no")
    with pytest.raises(ValueError, match="chain must be False where on is False.*got True"):
        unmerged.compact(False, chain=True)
    assert not any(adapter.compacted for _, adapter in adapters(unmerged))
    unmerged.compact()
    unmerged.set_block_mask("0.neurons", torch.zeros(20))
    with unmerged.disable_adapter():
        pass
    merged = unmerged.merge_and_unload()
    assert not any(isinstance(module, APTAdapter) for module in merged.modules())


def test_16_bit_accuracy_within_a_model(device):
    linear = nn.Linear(200, 120, device=device, dtype=torch.bfloat16)
    adapter = APTAdapter.from_linear(linear, 8)
    with torch.no_grad():
        adapter.lora_B.normal_()
    adapter.set_masks((torch.rand(200) > 0.5).float().to(device), (torch.rand(120) > 0.5).float().to(device))
    adapter.compact()
    x = torch.randn(33, 200, device=device, dtype=torch.bfloat16)
    wide = copy.deepcopy(adapter).double()
    wide.compact(False)
    magnitude = expected(wide, x.double()).abs() + 10
    assert_accurate(adapter(x), wide(x.double()), magnitude, torch.bfloat16)


def test_get_apt_model_of_a_config_is_not_compacted():
    assert not any(a.compacted for _, a in adapters(get_apt_model(FAMILIES["bert"].model(), APTConfig(r=1))))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_masks_from_the_host_make_no_device_wait():
    """A step of soft masks, and one that changes what is kept; also the second look at masks that somebody else has written."""
    family = FAMILIES["llama"]
    apt = adapted(family).cuda()
    apt.compact(chain=True)
    kinds = ("heads", "neurons")
    mask_all(apt, some(family, apt.blocks, kinds, "soft"))  # from here on everything has been queued once
    soft, hard = some(family, apt.blocks, kinds, "soft"), some(family, apt.blocks, kinds, "hard", seed=5)
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        mask_all(apt, {name: mask.cpu() * 0.5 for name, mask in soft.items()})
        mask_all(apt, {name: mask.cpu() for name, mask in hard.items()})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, mask in hard.items():
        assert torch.equal(apt.get_block_mask(name).cpu(), mask.float().cpu())
    _, adapter = next(iter(adapters(apt)))
    before = adapter.host_mask("mask_in").clone()
    adapter.mask_in.fill_(0.25)
    assert bool((adapter.host_mask("mask_in") == 0.25).all()) and not torch.equal(before, adapter.host_mask("mask_in"))
