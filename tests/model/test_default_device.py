"""Under `torch.set_default_device` and `set_default_dtype` what belongs on the host stays there, in float32; meta stands for any device."""

import io

import pytest
import torch
from families import FAMILIES
from small_adapter import expected, make, masks
from torch import nn

import apt_ext
from apt_ext import APTAdapter, APTConfig, APTModel, Controller, adapter_parameters, get_apt_model
from apt_ext.method import Distiller, one_shot

FAMILY = FAMILIES["bert"]


@pytest.fixture
def elsewhere():
    with torch.device("meta"):
        yield


def test_an_adapter(elsewhere):
    with torch.device("cpu"):
        adapter, x, (m_in, m_out) = make(), torch.randn(3, 10, dtype=torch.float64), masks()
    adapter.compact()
    adapter.set_masks(m_in, m_out)
    adapter.increase_rank(5)
    torch.testing.assert_close(adapter(x), expected(adapter, x))
    state = adapter.state_dict()
    assert {value.device.type for value in state.values()} == {"cpu"}
    with torch.device("cpu"):
        other = APTAdapter.from_linear(nn.Linear(10, 7, dtype=torch.float64), 1)
    other.load_state_dict(state)
    other.merge_weights()
    torch.testing.assert_close(other.base_layer(x), adapter(x))
    assert APTAdapter(4, 4, 2).lora_A.is_meta  # which asks for the default


def built(**config):
    with torch.device("cpu"):
        return get_apt_model(FAMILY.model(), APTConfig(r=2, **config))


@pytest.fixture
def batch():
    return {**FAMILY.inputs(), "labels": torch.tensor([0, 1, 2])}


def logits(model, batch):
    with torch.device("cpu"):
        return model(**batch).logits.detach()


def test_a_model(batch, tmp_path, elsewhere):
    apt = built()
    with torch.device("cpu"):
        heads, hidden = torch.tensor([1.0, 0.0, 0.5]), torch.arange(24).clamp(max=4) / 4
    first = apt.state_dict()
    apt.set_block_mask("0.heads", heads)
    apt.set_block_mask("hidden", hidden)
    assert torch.equal(apt.get_block_mask("0.heads"), heads)
    want = logits(apt, batch)
    with torch.device("cpu"):
        plain = FAMILY.model()
    apt_ext.plan(plain, APTConfig(r=2), keep={"heads": 2})
    apt.save_pretrained(tmp_path)
    assert torch.equal(logits(APTModel.from_pretrained(plain, tmp_path).eval(), batch), want)
    small = apt_ext.shrink(apt)
    torch.testing.assert_close(logits(small, batch), want)
    buffer = io.BytesIO()
    torch.save(apt.state_dict(), buffer)
    apt.load_state_dict(first)
    apt.load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))
    apt.compact(chain=True)
    torch.testing.assert_close(logits(apt, batch), want)
    torch.testing.assert_close(logits(apt.cut(), batch), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_masks_are_float32_whatever_the_default_dtype_is(dtype):
    apt = built()
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = [apt.get_block_mask(name) for name in apt.blocks]
        apt.set_block_mask("hidden", found[-1] * 0.3)
        found.append(apt.get_block_mask("hidden"))
    finally:
        torch.set_default_dtype(default)
    assert {mask.dtype for mask in found} == {torch.float32} and bool((found[-1] == torch.tensor(0.3)).all())


def test_the_method(batch, elsewhere):
    apt = built(round_to=1, density=0.6, prune=["heads", "neurons", "hidden"])
    optimizer = torch.optim.AdamW(adapter_parameters(apt), lr=1e-3)
    distiller = Distiller(apt, "self", quarters=2)
    controller = Controller(apt, optimizer, 8, schedule={"start": 1, "end": 6, "events": 2})
    for _ in range(8):
        with torch.device("cpu"):
            outputs = apt(**batch, **distiller.asks)
        distiller.loss(batch, outputs, 0.5).backward()
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
    assert controller.done and controller.density <= 0.6
    controller.load_state_dict(controller.state_dict())
    with torch.device("cpu"):
        apt = built(round_to=1)
    scored = one_shot(apt, [batch], {"neurons": 3})
    assert [int(mask.sum()) for mask in scored.values()] == [3, 3]
