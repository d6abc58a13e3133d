"""APTAdapter.compact(dense=...): the whole weight in host memory."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from families import FAMILIES, adapted, close, mask_all, outputs, some
from small_adapter import make, masks, outcome

import apt_ext
from apt_ext import APTAdapter, APTConfig, adapters, get_apt_model

AWAY = pytest.mark.parametrize("dense", ["cpu"])


def put_away(dense, device="cpu", **options):
    """(a compacted adapter whose weight is away, a twin that computes what it must)"""
    adapter = make(device, **options)
    adapter.set_masks(*masks(device))
    twin = copy.deepcopy(adapter)
    adapter.compact(dense=dense)
    assert torch.isnan(adapter.weight).all() and adapter.weight.untyped_storage().nbytes() == adapter.weight.element_size()
    return adapter, twin


@AWAY
def test_a_weight_that_is_away_changes_nothing(device, dense):
    adapter, twin = put_away(dense, device, max_rank=6)
    x = torch.randn(4, 10, dtype=torch.float64, device=device, requires_grad=True)
    m_in, m_out = masks(device)
    m_in[0], m_out[1] = 0, 0
    for change in ({}, {"mask_in": m_in * 0.5}, {"mask_out": m_out}, {"mask_in": m_in * 0, "mask_out": m_out}):
        for one in (adapter, twin):
            one.set_masks(**change)
        for got, want in zip(outcome(adapter, x), outcome(twin, x), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for one in (adapter, twin):
        one.set_masks(*masks(device))
    with pytest.raises(RuntimeError, match="needs the whole weight"):
        adapter(x, mask_in=m_in)
    with pytest.raises(RuntimeError, match="needs the whole weight"):
        adapter.set_disabled(True)
    torch.testing.assert_close(adapter(x), twin(x))
    adapter.compact(False)
    torch.testing.assert_close(adapter(x), twin(x))
    if dense == "cpu":
        assert torch.equal(adapter.weight, twin.weight)


@AWAY
def test_nothing_holds_the_memory_of_a_weight_that_is_away(dense):
    adapter = make()
    memory = weakref.ref(adapter.weight.untyped_storage())
    adapter.compact()
    adapter(torch.ones(10, dtype=torch.float64))
    adapter.compact(dense=dense)
    gc.collect()
    assert memory() is None
    with pytest.raises(RuntimeError, match="another weight in the place of the base layer's needs the whole weight"):
        torch.func.functional_call(adapter, {"base_layer.weight": torch.ones(7, 10, dtype=torch.float64)}, torch.ones(10).double())


@AWAY
def test_a_placeholder_that_shares_a_version_counter_is_no_other_weight(dense):
    """As a teacher's Parameter does: what becomes of one does not reach the other."""
    adapter, twin = put_away(dense)
    x = torch.randn(4, 10, dtype=torch.float64)
    alias = adapter.weight.detach()
    with torch.no_grad():
        alias.set_(torch.zeros(3, 3, dtype=torch.float64))
    torch.testing.assert_close(adapter(x), twin(x))
    whole = make()
    other = copy.deepcopy(whole, {id(whole.weight): torch.nn.Parameter(whole.weight.detach(), requires_grad=False)})
    want = other(x)
    other.compact(dense=dense)
    whole.merge_weights()
    whole.unmerge_weights()
    torch.testing.assert_close(other(x), want)
    torch.testing.assert_close(whole(x), want)


@AWAY
@pytest.mark.parametrize("way", ["state_dict", "into it", "deepcopy", "pickle", "merge", "move", "grow", "Conv1D"])
def test_what_needs_the_whole_weight_gets_it(device, dense, way):
    adapter, twin = put_away(dense, device)
    x = torch.randn(4, 10, dtype=torch.float64, device=device)
    if way == "state_dict":
        state = adapter.state_dict()
        assert torch.equal(state["base_layer.weight"].to(device), twin.weight)
        fresh = make(device)
        fresh.load_state_dict(state)
        torch.testing.assert_close(fresh(x), twin(x))
    elif way == "into it":
        other = make(device)
        other.set_masks(torch.ones(10, device=device), torch.ones(7, device=device))
        adapter.load_state_dict(other.state_dict())
        twin.load_state_dict(other.state_dict())
        assert torch.isnan(adapter.weight).all()
        factors = {name: value for name, value in twin.state_dict().items() if "base_layer" not in name}
        adapter.load_state_dict(factors, strict=False)
        m_in, m_out = masks(device)
        for one in (adapter, twin):
            one.set_masks(m_in, m_out)
    elif way == "deepcopy":
        before, adapter = adapter, copy.deepcopy(adapter)
        before.set_masks(torch.zeros(10, device=device))
    elif way == "pickle":
        adapter = pickle.loads(pickle.dumps(adapter))  # noqa: S301
    elif way == "merge":
        for keep in ("device", "cpu"):
            adapter.merge_weights(keep)
            torch.testing.assert_close(adapter.base_layer(x), twin(x))
            other = copy.deepcopy(adapter)
            other.unmerge_weights()
            torch.testing.assert_close(other(x), twin(x))
            adapter.unmerge_weights()
    elif way == "move":
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            adapter.to(dtype)
            twin.to(dtype)
            assert adapter.weight.dtype == dtype and adapter.weight.untyped_storage().nbytes() == adapter.weight.element_size()
    elif way == "grow":
        adapter.increase_rank(5)
        twin.increase_rank(5)
        twin.load_state_dict({**adapter.state_dict(), "base_layer.weight": twin.weight})
    else:
        conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(7, 10).to(device).double()
        adapter = APTAdapter.from_linear(conv, 3)
        adapter.set_masks(*masks(device))
        twin = copy.deepcopy(adapter)
        adapter.compact(dense=dense)
        state = adapter.state_dict()["base_layer.weight"]
        kept = torch.outer(adapter.mask_in != 0, adapter.mask_out != 0)
        assert torch.equal(state.to(device)[kept], twin.weight[kept])
    torch.testing.assert_close(adapter(x), twin(x))
    assert adapter.compacted and torch.isnan(adapter.weight).all() and adapter.packing.store.place == dense


@pytest.mark.parametrize("dense", ["keep", "cpu"])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("of_merged", [False, True])
def test_a_merged_adapter_loads_the_weight_that_it_would_put_away(dense, assign, of_merged):
    source, adapter = make(), make()
    adapter.compact(dense=dense)
    adapter.merge_weights()
    x = torch.randn(4, 10, dtype=torch.float64)
    want = source(x)
    if of_merged:
        source.merge_weights()
    adapter.eval()  # a merged one that trains warns
    adapter.load_state_dict({key: value.clone() for key, value in source.state_dict().items()}, assign=assign)
    assert adapter.merged == of_merged and adapter.compacted
    torch.testing.assert_close(adapter(x), want)
    adapter.unmerge_weights()
    torch.testing.assert_close(adapter(x), want)
    assert adapter.packing.store.is_offloaded == (dense != "keep")


@AWAY
def test_weights_are_not_put_away_while_they_are_all_that_computes(dense):
    family = FAMILIES["bert-mlm"]
    apt = adapted(family)
    with apt.disable_adapter():
        plain = outputs(apt, family.inputs())
        with pytest.raises(RuntimeError, match=f"dense='{dense}' cannot offload the weight inside disable_adapter"):
            apt.compact(dense=dense)
        close(outputs(apt, family.inputs()), plain)
    assert not any(adapter.compacted for _, adapter in adapters(apt))


@AWAY
def test_a_whole_model_without_its_dense_weights(dense, tmp_path):
    family = FAMILIES["bert-mlm"]
    apt = adapted(family)
    mask_all(apt, some(family, apt.blocks, ("heads", "neurons"), "hard"))
    want = outputs(apt, family.inputs())
    apt.compact(dense=dense, chain=True)
    held = sum(p.untyped_storage().nbytes() for name, p in apt.named_parameters() if "base_layer" in name and p.dim() == 2)
    assert held < 8 * 20 * len(list(adapters(apt)))
    close(outputs(apt, family.inputs()), want)
    close(outputs(apt_ext.shrink(apt), family.inputs()), want)
    apt.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="disable_adapter needs the whole weight"), apt.disable_adapter():
        pass
    close(outputs(apt, family.inputs()), want)
    apt.cut()
    close(outputs(apt, family.inputs()), want)
    assert all(adapter.packing.store.is_offloaded for _, adapter in adapters(apt) if type(adapter) is APTAdapter)
    apt.compact(False)
    close(outputs(apt, family.inputs()), want)


def test_a_tied_weight_is_kept():
    """Its other owner reads it."""
    model = FAMILIES["llama"].model()
    layers = model.model.layers
    layers[1].mlp.down_proj.weight = layers[0].mlp.down_proj.weight
    apt = get_apt_model(model, APTConfig(r=1, target_modules=["q_proj"])).eval()
    mask_all(apt, some(FAMILIES["llama"], apt.blocks, ("neurons",), "hard"))
    want = outputs(apt, FAMILIES["llama"].inputs())
    apt.compact(dense="cpu")
    assert not any(layer.mlp.down_proj.packing.store.is_offloaded for layer in layers)
    assert layers[0].mlp.up_proj.packing.store.is_offloaded
    layers[1].mlp.down_proj.compact(False)
    close(outputs(apt, FAMILIES["llama"].inputs()), want)


@AWAY
def test_scores_of_outliers_read_the_whole_weight(dense):
    from apt_ext.method.score.kurtosis import outliers, row_outliers

    adapter, twin = put_away(dense)
    torch.testing.assert_close(row_outliers(adapter, None), row_outliers(twin, None))
    torch.testing.assert_close(outliers(adapter, None, 10), outliers(twin, None, 10))


def test_a_linear_that_trains_whole_is_refused_and_passed_over():
    apt = adapted(FAMILIES["bert"])
    apt.set_block_mask("hidden", (torch.arange(24) > 3).double())
    whole = [adapter for _, adapter in adapters(apt) if type(adapter) is not APTAdapter]
    with pytest.raises(RuntimeError, match="this module trains whole"):
        whole[0].compact()
    apt.compact()
    assert whole and not any(adapter.compacted for adapter in whole)


@AWAY
def test_the_copy_counts_not_what_others_wrote_into_the_buffer(device, dense):
    """Masks that others wrote in place, and that are then set, fall or rise against what is held of the weight."""
    adapter, twin = put_away(dense, device)
    x = torch.randn(4, 10, dtype=torch.float64, device=device)
    fallen, risen = adapter.mask_in.clone(), adapter.mask_in.clone()
    fallen[fallen.nonzero()[0]] = 0
    risen[:] = 1
    moved = adapter.mask_in.clone()  # as many lanes, others
    moved[moved.nonzero()[0]], moved[(adapter.mask_in == 0).nonzero()[0]] = 0, 1
    for mask in (risen, moved):
        adapter.mask_in.copy_(mask)
        adapter.set_masks(mask_in=mask)
        twin.set_masks(mask_in=mask)
        torch.testing.assert_close(adapter(x), twin(x))
    adapter.mask_in.copy_(fallen)
    for one in (adapter, twin):
        one.set_masks(mask_in=fallen)
    torch.testing.assert_close(adapter(x), twin(x))


@AWAY
def test_a_buffer_that_was_replaced_is_the_adapters_again(device, dense):
    adapter, twin = put_away(dense, device)
    x = torch.randn(4, 10, dtype=torch.float64, device=device)
    adapter.mask_in = adapter.mask_in.clone()
    adapter.set_masks(mask_in=adapter.mask_in)
    torch.testing.assert_close(adapter(x), twin(x))


@AWAY
def test_another_weight_is_refused_by_a_change_of_masks(device, dense):
    adapter, _ = put_away(dense, device)
    before = adapter.mask_in.clone()
    adapter.base_layer.weight = torch.nn.Parameter(torch.randn_like(adapter.weight), requires_grad=False)
    with pytest.raises(RuntimeError, match="another weight in the place"):
        adapter.set_masks(mask_in=before * 0.5)
    assert torch.equal(adapter.mask_in, before)


@pytest.mark.parametrize("merged", [False, True])
def test_a_merged_state_that_cannot_be_merged_again_changes_nothing(merged):
    source, adapter = make(), make()
    source.merge_weights()
    state = source.state_dict()
    state["lora_A"], state["lora_B"] = state["lora_A"] * 1e200, state["lora_B"] * 1e200
    adapter.set_masks(*masks())
    adapter.compact(dense="cpu")
    adapter.eval()
    if merged:
        adapter.merge_weights()
    x = torch.randn(4, 10, dtype=torch.float64)
    want, before = adapter(x), {key: value.clone() for key, value in adapter.state_dict().items()}
    with pytest.raises(RuntimeError, match="would not be finite|not be finite"):
        adapter.load_state_dict(state)
    assert adapter.merged == merged and adapter.packing.store.is_offloaded != merged
    assert torch.equal(adapter(x), want)
    assert all(torch.equal(value, before[key]) for key, value in adapter.state_dict().items())
