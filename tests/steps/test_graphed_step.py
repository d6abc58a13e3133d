"""GraphedStep without a GPU: the eager lines, and what it refuses."""

import copy

import pytest
import torch
from families import FAMILIES
from graphed_runs import run, same
from torch import nn
from training import batch_for, built

import apt_ext
from apt_ext import Controller, GraphedStep
from apt_ext.steps.attention import MaskWatch
from apt_ext.steps.batches import Ungraphable, is_padded, signature, with_tensors
from apt_ext.steps.obstacles import obstacle
from apt_ext.steps.standing import Standing


@pytest.mark.parametrize("micro", [1, 3])
def test_on_the_cpu_it_is_the_eager_loop_and_says_so_once(micro, caplog):
    plain, _, _ = run(FAMILIES["bert"], False, device="cpu", micro=micro)
    graphed, step, _ = run(FAMILIES["bert"], True, device="cpu", micro=micro)
    assert same(plain, graphed) is None
    assert not step.graphed and step.captures == 0 and step.memory == 0 and "GPU" in step.reason
    assert len([record for record in caplog.records if "GraphedStep" in record.message]) == 1


def test_what_a_loss_returns_comes_back_detached():
    model, _ = built(FAMILIES["bert"])
    batch = batch_for(FAMILIES["bert"], 0)

    def loss(model, batch):
        out = model(**batch)
        return out.loss, {"logits": out.logits, "rows": [out.logits[0], "text", 3], "cache": object()}

    value, outputs = GraphedStep(model, loss)(**batch)
    assert not value.requires_grad and not outputs["rows"][0].requires_grad
    assert outputs["rows"][1:] == ["text", 3] and outputs["cache"] is None
    out = GraphedStep(model)(**batch)
    assert type(out) is type(model(**batch)) and not out.loss.requires_grad and not out.logits.requires_grad


def test_divisors_by_micro_batches_and_for_once():
    model, _ = built(FAMILIES["bert"])
    batch, whole = batch_for(FAMILIES["bert"], 0), {}
    GraphedStep(model)(**batch)
    whole = [p.grad.clone() for p in apt_ext.adapter_parameters(model)]
    for step, more in ((GraphedStep(model, accumulate=4), {}), (GraphedStep(model), {"_divide": 4})):
        model.zero_grad()
        step(**batch, **more)
        for p, g in zip(apt_ext.adapter_parameters(model), whole, strict=True):
            torch.testing.assert_close(p.grad * 4, g)


def test_a_batch_by_position():
    linear = nn.Linear(3, 1)
    step = GraphedStep(linear, lambda model, batch: model(batch[0]).sub(batch[1]).square().mean())
    assert step(torch.ones(2, 3), torch.zeros(2, 1)).shape == ()
    assert GraphedStep(linear, lambda model, batch: model(batch["x"]).mean())({"x": torch.ones(2, 3)}).shape == ()
    with pytest.raises(TypeError, match="all of it by name or all by position"):
        step(torch.ones(2, 3), y=torch.zeros(2, 1))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"model": 3}, TypeError, "model: expected a Module"),
        ({"loss": 3}, TypeError, "loss: expected a function"),
        ({"accumulate": 0}, ValueError, "accumulate must be at least 1"),
        ({"accumulate": 1.5}, TypeError, "accumulate must be an int"),
        ({"autocast": "bf16"}, TypeError, "autocast: expected torch.bfloat16"),
        ({"scaler": 3}, TypeError, "scaler: expected a GradScaler"),
        ({"shapes": 0}, ValueError, "shapes must be at least 1"),
        ({"enabled": "yes"}, ValueError, 'enabled: expected "auto", True or False'),
    ],
    ids=lambda value: None if isinstance(value, type) else str(value)[:24],
)
def test_wrong_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        GraphedStep(**{"model": nn.Linear(2, 2), **arguments})


def test_wrong_losses():
    model, x = nn.Linear(2, 2), torch.ones(1, 2)
    with pytest.raises(TypeError, match="scalar tensor"):
        GraphedStep(model, lambda model, batch: 3.0)(x)
    with pytest.raises(ValueError, match=r"shape \[1, 2\]"):
        GraphedStep(model, lambda model, batch: model(batch))(x)
    with pytest.raises(TypeError, match="got tuple"):
        GraphedStep(model, lambda model, batch: ())(x)
    with pytest.raises(ValueError, match="got a constant"):
        GraphedStep(model, lambda model, batch: torch.zeros(()))(x)
    with torch.no_grad(), pytest.raises(ValueError, match="grad mode is off"):
        GraphedStep(model, lambda model, batch: model(batch).sum())(x)
    assert GraphedStep(model, lambda model, batch: model(batch["self"]).sum())(self=x).shape == ()
    with pytest.raises(ValueError, match="put labels into the batch"):
        GraphedStep(built(FAMILIES["bert"])[0])(input_ids=torch.ones(1, 4, dtype=torch.long))
    for wrong in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="_divide"):
            GraphedStep(model, lambda model, batch: model(batch).sum())(x, _divide=wrong)


def test_enabled_says_whether_eager_steps_may_be():
    model, x = nn.Linear(2, 1), torch.ones(1, 2)
    off = GraphedStep(model, lambda model, batch: model(batch).sum(), enabled=False)
    assert off.reason == "enabled=False"
    off(x)
    assert off.reason == "enabled=False"
    with pytest.raises(RuntimeError, match="enabled=True"):
        GraphedStep(model, lambda model, batch: model(batch).sum(), enabled=True)
    assert "GPU" in GraphedStep(model).reason
    with pytest.raises(TypeError, match="make another"):
        copy.deepcopy(off)


# -- its parts ---------------------------------------------------------------------------------------------------------


def test_signatures_tell_graphs_apart():
    cpu = torch.device("cpu")
    ids = torch.ones(2, 4)

    def told(batch):
        return signature(batch, cpu)[0]

    assert told({"a": ids}) == told({"a": torch.zeros(2, 4)})
    others = [{"a": ids[:1]}, {"a": ids.double()}, {"b": ids}, {"a": ids, "n": 1}, {"a": ids, "n": 2}, {"a": ids, "n": True}, {"a": [ids]}]
    assert len({told({"a": ids}), *map(told, others)}) == len(others) + 1
    assert len(signature({"a": [ids, (ids, {"c": ids})]}, cpu)[1]) == 3
    nan = float("nan")
    numbers = [0.0, -0.0, 1.5, nan, float("inf"), 1, complex(0.0, nan), complex(nan, 0.0), complex(0.0, -0.0), 0j]
    assert len({told({"n": number}) for number in numbers}) == len(numbers)
    assert told({"n": nan, "m": [complex(nan, 1)]}) == told({"n": -float("nan"), "m": [complex(float("nan"), 1)]})
    assert told({"a": ids, "b": {"c": ids, "d": 1}}) != told({"a": ids, "b": {"d": 1, "c": ids}}), "a model may go through b"
    with pytest.raises(Ungraphable, match="Parameter"):
        told({"a": nn.Parameter(ids)})
    with pytest.raises(Ungraphable, match="requires a gradient"):
        told({"a": ids.clone().requires_grad_()})
    with pytest.raises(Ungraphable, match="meta"):
        told({"a": ids.to("meta")})
    with pytest.raises(Ungraphable, match="object"):
        told({"a": object()})


def test_padding_is_read_where_it_can_be():
    ones = torch.ones(2, 4)
    some = ones.clone()
    some[0, 3] = 0
    assert not is_padded({}) and not is_padded({"attention_mask": ones}) and is_padded({"attention_mask": some})
    assert is_padded({"attention_mask": ones, "decoder_attention_mask": some}) and is_padded({"attention_mask": ones[None, None]})


def test_outputs_keep_their_types():
    out = FAMILIES["bert"].model(seed=0)(**FAMILIES["bert"].inputs(0))
    made = with_tensors(out, torch.clone)
    assert type(made) is type(out) and torch.equal(made.logits, out.logits) and made.logits is not out.logits


def changes(model):
    """What a user may do to a model between two steps, that a graph has to notice."""
    adapter = next(a for _, a in apt_ext.adapters(model) if a.rank)
    half = torch.ones(model.blocks["0.neurons"].count)
    half[:4] = 0
    yield "eval", lambda: model.eval()
    yield "mask", lambda: model.set_block_mask("0.neurons", half)
    yield "mask written", lambda: adapter.mask_in.mul_(1.0)
    yield "compact", lambda: model.compact()
    yield "other kept", lambda: model.set_block_mask("0.neurons", half.flip(0) * half)
    yield "not compact", lambda: model.compact(False)
    yield "cut", lambda: model.cut()
    yield "merge", lambda: adapter.merge_weights()
    yield "unmerge", lambda: adapter.unmerge_weights()
    yield "growth", lambda: adapter.increase_rank(adapter.rank + 1)
    yield "frozen", lambda: adapter.lora_A.requires_grad_(False)
    yield "dropout", lambda: setattr(adapter, "dropout", 0.5)
    yield "disabled", lambda: adapter.set_disabled(True)
    yield "config", lambda: setattr(model.config, "hidden_dropout_prob", 0.3)
    yield "a value of a module", lambda: setattr(model.model.dropout, "p", 0.7)
    yield "another forward", lambda: setattr(model.model.classifier, "forward", model.model.classifier.forward)
    model.model.settings, model.model.others, model.model.kind = [1, {"a": torch.ones(1)}], (1, 2), torch.float32
    yield "an entry of a list", lambda: model.model.settings.__setitem__(0, 2)
    yield "a tensor in a dict in a list", lambda: model.model.settings[1].update(a=torch.ones(1))
    yield "a tuple", lambda: setattr(model.model, "others", (1, 3))
    yield "a dtype", lambda: setattr(model.model, "kind", torch.float16)
    yield "a function", lambda: setattr(model.model, "kind", print)
    yield "precision", lambda: torch.set_float32_matmul_precision("high")
    yield "a hook", lambda: model.model.register_forward_hook(lambda *_: None)


def test_a_standing_notices_every_change():
    model, _ = built(FAMILIES["bert"])
    before = torch.get_float32_matmul_precision()
    try:
        for name, change in changes(model):
            first = Standing(model, frozenset())
            assert first == Standing(model, frozenset()), name
            change()
            assert first != Standing(model, frozenset()), name
    finally:
        torch.set_float32_matmul_precision(before)


def sparse():
    module = nn.Linear(2, 2)
    module.register_buffer("rows", torch.eye(2).to_sparse())
    return module


@pytest.mark.parametrize("part", [nn.LazyLinear, sparse])
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_part_that_cannot_be_followed_runs_eagerly(part, monkeypatch):
    part = part(2) if part is nn.LazyLinear else part()
    monkeypatch.setattr("apt_ext.steps.replayer.Replayer._place", lambda self: None)
    model = nn.ModuleDict({"known": nn.Linear(2, 2), "part": part})
    step = GraphedStep(model, lambda model, batch: model["known"](batch).sum())
    assert step(torch.ones(1, 2)).shape == () and "cannot be followed" in step.reason


def test_a_forward_and_a_step_of_the_optimizer_change_no_standing():
    model, optimizer = built(FAMILIES["llama"])
    model(**batch_for(FAMILIES["llama"], 0)).loss.backward()
    first = Standing(model, frozenset())
    for i in range(3):
        model(**batch_for(FAMILIES["llama"], i)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert first == Standing(model, frozenset())


@pytest.mark.parametrize("shrink", ["cut", "compact", "none"])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
def test_a_controller_changes_a_standing_at_its_windows_alone(name, shrink):
    model, optimizer = built(FAMILIES[name])
    schedule = {"start": 2, "end": 14, "events": 3}
    controller = Controller(model, optimizer, 16, schedule=schedule, shrink=shrink)
    found = []
    for i in range(16):
        model(**batch_for(FAMILIES[name], i)).loss.backward()
        controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
        found.append(Standing(model, frozenset()))
    changed = sum(one != other for one, other in zip(found, found[1:], strict=False))
    assert 3 <= changed <= 6, changed  # masks begin to move before an event, and stop at it


def test_masks_of_the_host_are_watched():
    model, _ = built(FAMILIES["bert"])
    batch = {name: value for name, value in batch_for(FAMILIES["bert"], 0).items() if name != "attention_mask"}
    padded = {**batch, "attention_mask": torch.tensor([[1] * 5 + [0] * (batch["input_ids"].shape[1] - 5)] * 3)}
    watch = MaskWatch(batch, padded=False)
    with watch.watching():
        model(**batch)
    assert watch.made is False
    other = MaskWatch(padded, padded=True)
    with other.watching():
        expected = model(**padded).logits
    assert other.made is True
    with other.skipping():
        assert torch.equal(model(**padded).logits, expected)  # a padded batch keeps its mask
    with watch.skipping():
        assert not torch.equal(model(**padded).logits, expected)
    assert torch.equal(model(**padded).logits, expected)


def test_obstacles_are_named():
    model, _ = built(FAMILIES["bert"])
    assert obstacle(model) is None
    handle = apt_ext.adapter_parameters(model)[0].register_hook(lambda g: g)
    assert "has a hook on its gradient" in obstacle(model)
    handle.remove()
    handle = model.model.register_full_backward_hook(lambda *_: None)
    assert "which a replay would not call" in obstacle(model)
    handle.remove()
    assert obstacle(model) is None
    assert "exchanges gradients" in obstacle(nn.DataParallel(nn.Linear(2, 2)))
