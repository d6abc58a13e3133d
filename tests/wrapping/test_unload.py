"""merge_and_unload checks every layer before it writes the first, and needs no memory of the order of the model."""

import signal
import threading
import warnings
from contextlib import contextmanager

import pytest
import torch
from families import FAMILIES, adapted
from tiny_bert import ALL, assert_same, batch, half, masked, snapshot, tiny_bert, trained

from apt_ext import APTConfig, adapters, get_apt_model, shrink
from apt_ext.adapter import merge
from apt_ext.common import interrupts
from apt_ext.wrapping import unload


@contextmanager
def waits():
    """A list that holds, once the context has ended, a warning for each wait for a device."""
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # that torch's way to tell is a prototype is one, too
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [one for one in caught if "called a synchronizing" in str(one.message)]


CUDA = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def last(apt):
    """The last adapter with a rank, and its name."""
    return [(name, adapter) for name, adapter in adapters(apt) if adapter.rank][-1]


def overflow(adapter):
    """A weight that fits and a product that fits, whose sum does not."""
    adapter.base_layer.weight.view(-1)[0] = 60000
    adapter.lora_A.fill_(50), adapter.lora_B.fill_(50)


SPOILT = {
    "a sum beyond float16": overflow,
    "Inf in B": lambda adapter: adapter.lora_B[0, 0].fill_(float("inf")),
    "NaN in the weight": lambda adapter: adapter.base_layer.weight[0, 0].fill_(float("nan")),
    "NaN in the bias": lambda adapter: adapter.base_layer.bias[1].fill_(float("nan")),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_fault_in_the_last_layer_leaves_every_bit(device, fault):
    apt = masked({"1.neurons": half() * 0.5}, torch.float16).to(device)
    next(adapter for _, adapter in adapters(apt) if adapter.rank).merge_weights()
    name, adapter = last(apt)
    with torch.no_grad():
        SPOILT[fault](adapter)
    before = snapshot(apt)
    of = "bias" if "bias" in fault else "weight"
    with pytest.raises(RuntimeError, match=rf"^{name}: merge_weights: the merged {of} would not be finite.*float16.* are unchanged"):
        apt.merge_and_unload()
    after = snapshot(apt)
    assert before[0] == after[0] and before[1] == after[1] and before[2].keys() == after[2].keys()
    for key, value in before[2].items():
        assert torch.equal(value.view(-1).view(torch.uint8), after[2][key].view(-1).view(torch.uint8)), key


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_the_whole_merge_is_that_of_each_adapter(device, dtype, family):
    """Bit for bit, with fractions, biases, Conv1D and tied heads."""
    apt, alone = (adapted(FAMILIES[family]).to(device, dtype) for _ in range(2))
    for model in (apt, alone):
        for name, block in model.blocks.items():
            if block.kind == "neurons":
                model.set_block_mask(name, torch.linspace(0, 1, block.count).round(decimals=1))
    for _, adapter in adapters(alone):
        adapter.merge_weights()
    kept = {name.replace(".base_layer", ""): value for name, value in alone.model.named_parameters() if "lora_" not in name}
    plain = apt.merge_and_unload()
    found = dict(plain.named_parameters())
    assert found.keys() == kept.keys() and not any(True for _ in adapters(plain))
    assert all(torch.equal(value, kept[name]) for name, value in found.items())


def test_adapters_that_were_merged_before_are_merged_once(device):
    apt = masked({"0.neurons": half()}).to(device)
    expected = apt(**{key: value.to(device) for key, value in batch().items()}).logits
    for index, (_, adapter) in enumerate(adapters(apt)):
        if index % 2:
            adapter.eval().merge_weights("cpu")
    plain = apt.merge_and_unload()
    assert torch.allclose(plain(**{key: value.to(device) for key, value in batch().items()}).logits, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dense", ["keep", "cpu"])
def test_a_compact_model_comes_back_whole_or_stays_compact(device, dense):
    apt = masked({"0.neurons": half(), "1.neurons": half()}, torch.float32).to(device)
    inputs = {key: value.to(device) for key, value in batch().items()}
    apt.compact(dense=dense)
    expected = apt(**inputs).logits.detach()
    name, adapter = last(apt)
    with torch.no_grad():
        spoilt = adapter.lora_B[0, 0].clone()
        adapter.lora_B[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=rf"^{name}: .*finite"):
        apt.merge_and_unload()
    assert all(adapter.packing.store.is_offloaded == (dense == "cpu") for _, adapter in adapters(apt) if adapter.compacted)
    with torch.no_grad():
        adapter.lora_B[0, 0] = spoilt
    assert torch.equal(apt(**inputs).logits, expected)
    torch.testing.assert_close(apt.merge_and_unload()(**inputs).logits, expected, rtol=0, atol=1e-5)


def test_two_adapters_over_one_memory_are_refused(device):
    apt = trained(tiny_bert(), ALL).to(device)
    (_, first), (name, second) = [found for found in adapters(apt) if found[0].endswith(("self.query", "self.key"))][:2]
    second.base_layer.weight = first.base_layer.weight
    before = snapshot(apt)
    with pytest.raises(RuntimeError, match=rf"^{name}: merge_weights: this weight shares memory with that of .*query"):
        apt.merge_and_unload()
    assert_same(before, snapshot(apt))


def test_a_value_that_its_own_dtype_cannot_hold_is_refused_before_the_merge():
    apt = get_apt_model(tiny_bert(dtype=torch.float16), APTConfig(r=4, modules_to_save=["classifier"], float32_factors=True))
    with torch.no_grad():
        apt.model.classifier.weight[0, 0] = 1e6
    before = snapshot(apt)
    with pytest.raises(RuntimeError, match=r"classifier.*weight: expected values that torch.float16 can hold"):
        apt.merge_and_unload()
    assert_same(before, snapshot(apt))


def test_memory_beside_the_model_on_the_cpu():
    """All that is allocated, freed or not, is less than one weight."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 8}
    apt = get_apt_model(FAMILIES["llama"].model(torch.float32, **sizes), ALL)
    for name, block in apt.blocks.items():
        if block.kind == "neurons":
            apt.set_block_mask(name, half(block.count))
    largest = max(parameter.nbytes for parameter in apt.parameters())
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        apt.merge_and_unload()
    assert 0 < sum(max(event.self_cpu_memory_usage, 0) for event in profile.function_events) < largest


@pytest.mark.parametrize("layers", [2, pytest.param(6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("_", [pytest.param("cuda", marks=CUDA)])
def test_memory_and_waits_on_a_device(layers, _):
    """Less than a weight beside the model, and as many waits however many layers there are."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}
    counts = []
    for number in (1, layers):
        apt = get_apt_model(FAMILIES["llama"].model(torch.bfloat16, num_hidden_layers=number, **sizes).cuda(), ALL)
        largest = max(parameter.nbytes for parameter in apt.parameters())
        for name, block in apt.blocks.items():
            if block.kind == "neurons":
                apt.set_block_mask(name, half(block.count))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with waits() as found:
            apt.merge_and_unload()
        assert torch.cuda.max_memory_allocated() - before < largest
        counts.append(len(found))
    assert counts[0] == counts[1] >= 1


# -- interrupts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupt_waits_until_all_is_written(monkeypatch, moment):
    apt = masked({"0.neurons": half()})
    expected = apt(**batch()).logits
    real = merge.merge_for_good

    def interrupted(found):
        if moment == "after":
            real(found)
        signal.raise_signal(signal.SIGINT)
        if moment == "before":
            real(found)

    monkeypatch.setattr(unload, "merge_for_good", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        apt.merge_and_unload()
    assert signal.getsignal(signal.SIGINT) is handler
    assert not any(True for _ in adapters(apt.model))
    assert torch.allclose(apt.model(**batch()).logits, expected, rtol=0, atol=1e-12)


def test_an_interrupt_and_an_error_leave_the_error_to_be_seen():
    with pytest.raises(KeyboardInterrupt) as caught, interrupts.held():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("refused")
    assert isinstance(caught.value.__context__, ValueError)


def test_in_another_thread_nothing_is_held():
    handler, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with interrupts.held():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [handler]


def test_shrink_names_the_layer_too():
    apt = adapted(FAMILIES["llama"])
    name, adapter = last(apt)
    with torch.no_grad():
        adapter.lora_B[0, 0] = float("inf")
    with pytest.raises(RuntimeError, match=rf"^{name}: .*finite"):
        shrink(apt)


@pytest.mark.parametrize("_", [pytest.param("cuda", marks=CUDA)])
@pytest.mark.parametrize("max_rank", [None, 6])
def test_a_state_of_a_model_waits_once(_, max_rank):
    apt = trained(tiny_bert(), APTConfig(r=4, max_rank=max_rank)).cuda()
    apt.set_block_mask("0.neurons", half())
    for state in (apt.state_dict, apt.own_state):
        with waits() as found:
            state()
        assert len(found) == (1 if max_rank is None else 2)
