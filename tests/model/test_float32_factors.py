"""APTConfig.float32_factors: what 16 bits would round away is learnt, and everything else is as with factors of the weight's dtype."""

import pytest
import torch
from families import FAMILIES, keep_first, outputs

from apt_ext import APTConfig, APTModel, adapter_parameters, adapters, get_apt_model, shrink

CONFIG = APTConfig(r=2, target_modules=["q_proj", "down_proj"], float32_factors=True)


def factors(apt):
    return [factor for _, adapter in adapters(apt) if adapter.rank for factor in (adapter.lora_A, adapter.lora_B)]


def step(apt, optimizer):
    inputs = FAMILIES["llama"].inputs()
    optimizer.zero_grad()
    apt(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("exact", [True, False])
def test_small_steps_are_not_lost(dtype, exact):
    apt = get_apt_model(FAMILIES["llama"].model(dtype), CONFIG if exact else APTConfig(r=2, target_modules=CONFIG.target_modules)).train()
    assert {p.dtype for p in apt.parameters()} == ({dtype, torch.float32} if exact else {dtype})
    with torch.no_grad():
        for factor in factors(apt):
            factor.fill_(0.125)
    before = outputs(apt, FAMILIES["llama"].inputs())
    optimizer = torch.optim.AdamW(adapter_parameters(apt), lr=1e-6, eps=1e-3, weight_decay=0.0)
    for _ in range(3):
        step(apt, optimizer)
    expected = torch.float32 if exact else dtype
    assert all(p.dtype == p.grad.dtype == optimizer.state[p]["exp_avg"].dtype == expected for p in factors(apt))
    assert all(bool((factor != 0.125).any()) == exact for factor in factors(apt))  # steps below half a digit of 16 bits
    assert before[0].dtype == dtype


def test_the_function_is_that_of_factors_rounded_once(tmp_path):
    """Through growth, masks, compaction, a checkpoint, a merge and a cut."""
    family = FAMILIES["llama"]
    apt = get_apt_model(family.model(torch.bfloat16), CONFIG).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for factor in factors(apt):
            factor.normal_(0.0, 0.2)
    optimizer = torch.optim.AdamW(adapter_parameters(apt), lr=1e-3)
    step(apt, optimizer)
    for _, adapter in adapters(apt):
        if adapter.rank:
            adapter.increase_rank(3, optimizer=optimizer)
    step(apt, optimizer)
    keep_first(apt, heads=2, neurons=9)
    plain = get_apt_model(family.model(torch.bfloat16), APTConfig(r=3, target_modules=CONFIG.target_modules, lora_alpha=24)).eval()
    plain.load_state_dict(apt.state_dict())
    expected = outputs(plain, family.inputs())[0]
    assert torch.equal(outputs(apt, family.inputs())[0], expected)

    apt.save_pretrained(tmp_path)
    again = APTModel.from_pretrained(family.model(torch.bfloat16), tmp_path).eval()
    assert again.apt_config == apt.apt_config and len(factors(again)) == len(factors(apt))
    assert all(torch.equal(a, b) and a.dtype == b.dtype == torch.float32 for a, b in zip(factors(apt), factors(again), strict=True))
    assert torch.equal(outputs(again, family.inputs())[0], expected)

    def near(model):
        return torch.testing.assert_close(outputs(model, family.inputs())[0], expected, rtol=0.05, atol=0.05 * expected.abs().max().item())

    small = shrink(apt)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    near(small)
    apt.compact()
    near(apt)
    near(apt.cut(optimizer))
    step(apt, optimizer)


def test_wider_weights_have_factors_of_their_own_dtype():
    for dtype in (torch.float32, torch.float64):
        assert {p.dtype for p in get_apt_model(FAMILIES["llama"].model(dtype), CONFIG).parameters()} == {dtype}
