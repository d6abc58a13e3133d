"""Salience: S~ = product of sums, its moving average, and hooks that hold nothing of the batch's size."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from apt_ext import APTAdapter
from apt_ext._C import channel_sums
from apt_ext.method import Salience


class Layer(nn.Module):
    """An FFN with a residual: the neurons' activation is the input of `down`."""

    def __init__(self, hidden: int = 6, neurons: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, neurons), nn.Linear(neurons, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self, checkpointed: bool | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.reentrant = checkpointed

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return x

    def sites(self, count: int = 8) -> dict[str, tuple[nn.Module, int]]:
        return {f"{i}.neurons": (layer.down, count) for i, layer in enumerate(self.layers)}


def model_of(**options: bool) -> Model:
    torch.manual_seed(0)
    return Model(**options).double()


def batch_of(batch: int = 3, length: int = 5) -> Tensor:
    return torch.randn(batch, length, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)


def loss_of(y: Tensor) -> Tensor:
    return y.pow(2).sum()


def direct(model: Model, x: Tensor, tokens: Tensor | None = None) -> list[Tensor]:
    """S~ of each layer by keeping every activation and its gradient."""
    kept = []
    y = x
    for layer in model.layers:
        h = torch.tanh(layer.up(y))
        kept.append(h)
        y = y + layer.down(h)
    grads = torch.autograd.grad(loss_of(y), kept)
    weight = torch.ones(x.shape[:2], dtype=x.dtype) if tokens is None else tokens.to(x.dtype)
    sums = [[torch.einsum("blc,bl->c", value.detach().abs(), weight) for value in pair] for pair in zip(kept, grads, strict=True)]
    return [activation * gradient for activation, gradient in sums]


@pytest.mark.parametrize("checkpointed", [None, False, True])
def test_salience_is_the_product_of_two_sums(checkpointed: bool | None) -> None:
    model, x = model_of(checkpointed=checkpointed), batch_of()
    salience = Salience(model, model.sites(), decay=0.0)
    loss_of(model(x)).backward()
    salience.update()
    for score, expected in zip(salience.scores.values(), direct(model, x), strict=True):
        torch.testing.assert_close(score, expected)


def test_a_block_of_several_channels_is_the_sum_of_its_channels() -> None:
    model, x = model_of(), batch_of()
    salience = Salience(model, model.sites(count=2), decay=0.0)
    loss_of(model(x)).backward()
    salience.update()
    for score, expected in zip(salience.scores.values(), direct(model, x), strict=True):
        torch.testing.assert_close(score, expected.view(2, 4).sum(1))


def test_padding_tokens_do_not_count() -> None:
    model, x = model_of(), batch_of()
    tokens = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    salience = Salience(model, model.sites(), decay=0.0)
    loss_of(model(x, attention_mask=tokens)).backward()  # this loss looks at padding too, so its gradient there is not zero
    salience.update()
    for score, expected in zip(salience.scores.values(), direct(model, x, tokens), strict=True):
        torch.testing.assert_close(score, expected)


def test_micro_batches_between_updates_are_one_batch() -> None:
    model, x = model_of(), batch_of(batch=4)
    whole, parts = Salience(model, model.sites()), Salience(model, model.sites())
    loss_of(model(x)).backward()
    whole.update()
    whole.remove()
    parts.forget()  # both listened to the whole batch
    for part in x.detach().requires_grad_().split(1):
        loss_of(model(part)).backward()
    parts.update()
    for name, score in whole.scores.items():
        torch.testing.assert_close(parts.scores[name], score)


def test_moving_average_of_equal_inputs() -> None:
    model, x = model_of(), batch_of()
    salience = Salience(model, model.sites(), decay=0.85)
    for _ in range(7):
        loss_of(model(x)).backward()
        salience.update()
    for score, expected in zip(salience.scores.values(), direct(model, x), strict=True):
        torch.testing.assert_close(score, (1 - 0.85**7) * expected)


def test_passes_without_a_backward_leave_it_unchanged() -> None:
    model, x = model_of(), batch_of()
    salience = Salience(model, model.sites(), decay=0.0)
    loss_of(model(x)).backward()
    with torch.no_grad():
        model(2 * x, attention_mask=torch.zeros(3, 5))
    with torch.inference_mode():
        model(3 * x)
    model(4 * x)  # an evaluation that forgot no_grad
    salience.update()
    for score, expected in zip(salience.scores.values(), direct(model, x), strict=True):
        torch.testing.assert_close(score, expected)


def test_update_without_a_backward_changes_nothing() -> None:
    model, x = model_of(), batch_of()
    salience = Salience(model, model.sites())
    salience.update()
    assert salience.scores == {}
    loss_of(model(x)).backward()
    salience.update()
    before = salience.state_dict()["scores"]
    salience.update()
    assert all(torch.equal(before[name], score) for name, score in salience.scores.items())


def test_state_is_independent_of_batch_and_length() -> None:
    model = model_of()
    salience = Salience(model, model.sites())

    def held() -> list[tuple[int, ...]]:
        return [tuple(tensor.shape) for pair in salience.sums().values() for tensor in pair]

    large: list[StorageWeakRef] = []  # gc would not see what C++ holds

    def note(h: Tensor) -> None:
        large.append(StorageWeakRef(h.untyped_storage()))

    def note_both(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        note(args[0])
        args[0].register_hook(note)

    for layer in model.layers:
        layer.down.register_forward_pre_hook(note_both)
    for batch, length in ((1, 1), (7, 33)):
        loss_of(model(batch_of(batch, length))).backward()
        assert held() == [(8,)] * 4
    gc.collect()
    assert len(large) == 8 and all(storage.expired() for storage in large)
    salience.update()
    assert len(salience._passes) == 0 and held() == []


def test_remove_leaves_no_hook() -> None:
    model = model_of()
    salience = Salience(model, model.sites())
    salience.remove()
    salience.remove()
    assert not any(module._forward_pre_hooks or module._forward_hooks or module._backward_hooks for module in model.modules())
    loss_of(model(batch_of())).backward()
    salience.update()
    assert salience.scores == {}


def test_state_dict_resumes_the_average_and_is_a_copy() -> None:
    model, x = model_of(), batch_of()
    first = Salience(model, model.sites())
    loss_of(model(x)).backward()
    first.update()
    state = first.state_dict()
    resumed = Salience(model, model.sites())
    resumed.load_state_dict(state)
    loss_of(model(x)).backward()
    first.update()
    resumed.update()
    for name, score in first.scores.items():
        assert torch.equal(resumed.scores[name], score)
        assert not torch.equal(state["scores"][name], score)


@pytest.mark.parametrize("state", [{"9.neurons": torch.ones(8)}, {"0.neurons": torch.ones(7)}])
def test_foreign_state_is_refused_in_words(state: dict[str, Tensor]) -> None:
    model = model_of()
    salience = Salience(model, model.sites())
    with pytest.raises(ValueError, match="neurons"):
        salience.load_state_dict({"scores": state, "means": {}})
    assert salience.scores == {}


@pytest.mark.parametrize("masked", [False, True])
def test_the_signed_identity_holds_without_the_factor_s(masked: bool) -> None:
    """sum_l H_il dL/dH_il = sum_p W_ip dL/dW_ip + sum_q B_iq dL/dB_iq, and the same of inputs with A, by an adapter's own gradients."""
    torch.manual_seed(0)
    adapter = APTAdapter.from_linear(nn.Linear(5, 4, bias=False, dtype=torch.float64), 2, scaling=3.0)
    nn.init.normal_(adapter.lora_B)
    if masked:
        adapter.set_masks(torch.tensor([1, 0, 0.5, 1, 1]), torch.tensor([0.25, 1, 0, 1]))
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    h = adapter(x)
    h.retain_grad()
    h.tanh().sum().backward()
    A, B, W = adapter.lora_A, adapter.lora_B, adapter.matrix
    assert W is not None and None not in (x.grad, h.grad, A.grad, B.grad)
    of_weights = W * torch.outer(adapter.mask_out, adapter.mask_in) * (h.grad.t() @ x)  # type: ignore[union-attr]
    for from_h, from_w, from_factor in (
        ((h * h.grad).sum(0), of_weights.sum(1), (B * B.grad).sum(1)),
        ((x * x.grad).sum(0), of_weights.sum(0), (A * A.grad).sum(0)),
    ):
        torch.testing.assert_close(from_h, from_w + from_factor, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(from_h, from_w + adapter.scaling * from_factor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_of_long_inputs_and_short_dtypes_are_exact(dtype: torch.dtype) -> None:
    """More rows than one block holds; summed in float32."""
    values = torch.randn(3, 400, 700).to(dtype)
    tokens = torch.rand(3, 400) > 0.3
    kept = values.double()[tokens]
    torch.testing.assert_close(channel_sums(values, tokens, False).double(), kept.abs().sum(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(channel_sums(values, tokens, True).double(), kept.sum(0), rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(channel_sums(values, None, False).double(), values.double().abs().sum((0, 1)), rtol=1e-5, atol=0)


def test_what_padding_holds_does_not_count_be_it_nan() -> None:
    values = torch.randn(2, 3, 4)
    tokens = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    expected = channel_sums(values, tokens, False)
    values[0, 2], values[1, 1] = torch.nan, torch.inf
    torch.testing.assert_close(channel_sums(values, tokens, False), expected)
    values[0, 0, 1] = torch.nan
    assert channel_sums(values, tokens, False).isnan().tolist() == [False, True, False, False]


def test_an_overflow_of_a_skipped_step_is_forgotten_and_a_finite_batch_is_not() -> None:
    model, x = model_of(), batch_of()
    salience = Salience(model, model.sites(), decay=0.0)
    (loss_of(model(x)) * torch.inf).backward()
    salience.drop_overflow()
    assert salience.sums() == {}
    loss_of(model(x)).backward()
    salience.drop_overflow()
    salience.update()
    for score, expected in zip(salience.scores.values(), direct(model, x), strict=True):
        torch.testing.assert_close(score, expected)


def test_a_decoder_behind_an_encoder_has_padding_of_its_own() -> None:
    class Two(Model):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None, decoder_attention_mask: Tensor | None = None) -> Tensor:
            return super().forward(x)

    torch.manual_seed(0)
    model, x = Two().double(), batch_of()
    encoder = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    decoder = encoder.flip(1)
    for given, second in (({}, None), ({"decoder_attention_mask": decoder}, decoder)):
        salience = Salience(model, model.sites(), decay=0.0, decoder=["1.neurons"])
        loss_of(model(x, attention_mask=encoder, **given)).backward()
        salience.update()
        salience.remove()
        torch.testing.assert_close(salience.scores["0.neurons"], direct(model, x, encoder)[0])
        torch.testing.assert_close(salience.scores["1.neurons"], direct(model, x, second)[1])
