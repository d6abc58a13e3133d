"""GraphedStep on a GPU: a replay gives what the eager lines give, whatever happens between two steps."""

import gc
import weakref

import pytest
import torch
from families import FAMILIES
from graphed_runs import eager, exact, on, run, same
from training import batch_for, built

import apt_ext
from apt_ext import Controller, GraphedStep, adapters

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(autouse=True)
def no_capture_fails(caplog, request):
    """Where a test does not expect it, a capture that fails is an error, although the run would go on eagerly."""
    yield
    if "runs_eagerly" not in request.node.name:
        assert not [record.getMessage() for record in caplog.get_records("call") if "capturing it failed" in record.getMessage()]


def both(name, **arguments):
    family = FAMILIES[name]
    plain, _, _ = run(family, False, **arguments)
    graphed, step, model = run(family, True, **arguments)
    return plain, graphed, step, model


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
@pytest.mark.parametrize("shrink", ["cut", "compact", "none"])
def test_a_run_with_a_controller_is_the_eager_run_to_the_bit(name, shrink):
    plain, graphed, step, _ = both(name, controller={"shrink": shrink})
    assert same(plain, graphed) is None
    assert step.captures >= 2 and step.reason is None, step.reason


def test_one_graph_serves_all_mask_values_of_a_window():
    events = {"schedule": {"start": 4, "end": 28, "events": 1}, "shrink": "none"}
    plain, graphed, step, _ = both("llama", steps=32, controller=events)
    assert same(plain, graphed) is None
    moving = sum(
        not all(torch.equal(a, b) for a, b in zip(x, y, strict=True)) for x, y in zip(plain["mask"], plain["mask"][1:], strict=False)
    )
    assert moving > 5
    assert step.captures <= 4, step.captures


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_dimensions_too(dtype):
    plain, graphed, step, _ = both("llama", dtype=dtype, prune=["heads", "neurons", "hidden"], controller={"shrink": "none"})
    assert same(plain, graphed) is None
    assert step.captures <= 6, step.captures


@pytest.mark.parametrize("set_to_none", [True, False])
def test_micro_batches_are_added_up(set_to_none):
    plain, graphed, step, _ = both("bert", micro=3, set_to_none=set_to_none)
    assert same(plain, graphed) is None
    assert step.captures


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_padding_is_seen_in_each_batch(name):
    plain, graphed, step, _ = both(name, padded=True, steps=24)
    assert same(plain, graphed) is None
    assert step.captures >= 2


def test_growth_inside_and_beyond_the_reserved_room():
    for more in ({"max_rank": 8}, {}):
        plain, graphed, _, model = both("bert", controller={"growth": 3.0}, **more)
        assert same(plain, graphed) is None
        assert max(a.rank for _, a in adapters(model)) > 2


@pytest.mark.filterwarnings("ignore:this APTAdapter is merged")
def test_what_a_user_does_between_two_steps():
    def mask(model, optimizer):
        kept = torch.ones(model.blocks["0.neurons"].count)
        kept[:3] = 0
        model.set_block_mask("0.neurons", kept)

    def merged(model, optimizer):
        for _, adapter in list(adapters(model))[:1]:
            adapter.merge_weights()

    def unmerged(model, optimizer):
        for _, adapter in adapters(model):
            adapter.unmerge_weights()

    state = {}

    def saved(model, optimizer):
        state.update({key: value.clone() for key, value in model.state_dict().items()})

    def loaded(model, optimizer):
        model.load_state_dict(state)

    def evaluated(model, optimizer):
        model.eval()

    def grown(model, optimizer):
        for _, adapter in adapters(model):
            if adapter.rank:
                adapter.increase_rank(adapter.rank + 1, optimizer=optimizer, generator=torch.Generator(device="cuda").manual_seed(0))

    def cut(model, optimizer):
        model.cut(optimizer)

    torch.manual_seed(0)
    at = {3: mask, 6: saved, 8: merged, 10: unmerged, 12: loaded, 14: evaluated, 17: lambda m, o: m.train(), 20: grown, 23: cut}
    plain, graphed, step, _ = both("bert", steps=28, controlled=False, at=at)
    assert same(plain, graphed) is None
    assert step.captures >= 7


def test_adapters_disabled_for_a_step():
    model, _ = built(FAMILIES["bert"])
    model.cuda()
    with torch.no_grad():
        for _, adapter in adapters(model):
            adapter.lora_B.normal_()
    batch, step = on("cuda", batch_for(FAMILIES["bert"], 0)), GraphedStep(model)
    with exact():
        first = [step(**batch).loss for _ in range(3)][-1]
        with model.disable_adapter():
            off = [step(**batch).loss for _ in range(3)][-1]
            expected = model(**batch).loss.detach()
        again = [step(**batch).loss for _ in range(3)][-1]
    assert torch.equal(off, expected) and torch.equal(first, again) and not torch.equal(first, off)


def test_dropout_draws_anew_in_each_replay_and_a_seed_repeats_it():
    def losses():
        torch.manual_seed(0)
        model = FAMILIES["bert"].model(seed=0)
        apt = apt_ext.get_apt_model(model, apt_ext.APTConfig(r=2, lora_dropout=0.3)).train().cuda()
        with torch.no_grad():
            for _, adapter in adapters(apt):
                adapter.lora_B.normal_()
        step, batch = GraphedStep(apt), on("cuda", batch_for(FAMILIES["bert"], 0))
        torch.cuda.manual_seed(3)
        return [step(**batch).loss.item() for _ in range(8)], step

    (first, step), (second, _) = losses(), losses()
    assert first == second and step.captures == 1
    assert len(set(first)) == len(first)


def test_mixed_precision_with_a_scaler():
    def one(graph):
        model, _ = built(FAMILIES["bert"])
        model.cuda()
        optimizer = torch.optim.AdamW(apt_ext.adapter_parameters(model), lr=1e-3)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8, growth_interval=4)
        step = GraphedStep(model, autocast=torch.float16, scaler=scaler)
        controller, found = Controller(model, optimizer, 14, schedule={"start": 2, "end": 12, "events": 2}), []
        with exact():
            for i in range(14):
                batch = on("cuda", batch_for(FAMILIES["bert"], i))
                if graph:
                    out = step(**batch)
                else:
                    with torch.autocast("cuda", torch.float16):
                        out = model(**batch)
                    scaler.scale(out.loss).backward()
                scaler.unscale_(optimizer)
                controller.observe()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                controller.step()
                found.append(out.loss.item())
        return found, [p.detach().clone() for p in apt_ext.adapter_parameters(model)], step

    plain, graphed = one(False), one(True)
    assert plain[0] == graphed[0] and all(torch.equal(a, b) for a, b in zip(plain[1], graphed[1], strict=True))
    assert graphed[2].captures >= 2


def test_more_shapes_than_are_kept_run_eagerly_and_their_memory_is_shared(caplog):
    model, _ = built(FAMILIES["llama"])
    model.cuda()
    step = GraphedStep(model, shapes=2)
    for length in (4, 8, 12, 4, 8, 12, 12, 4, 8):
        ids = torch.randint(1, 50, (2, length), device="cuda")
        step(input_ids=ids, labels=ids)
        model.zero_grad()
    assert step.captures == 2 and step.graphed
    assert sum("more than 2 shapes" in record.message for record in caplog.records) == 1
    held = step.memory
    assert held > 0
    step.reset()
    assert step.memory == 0 and not step.graphed


def test_outputs_belong_to_the_caller():
    model, _ = built(FAMILIES["bert"])
    model.cuda()
    step = GraphedStep(model)
    batches = [on("cuda", batch_for(FAMILIES["bert"], i)) for i in range(4)]
    found = [step(**batch) for batch in batches]
    model.zero_grad()
    with exact():
        expected = [model(**batch) for batch in batches]
    for mine, theirs in zip(found, expected, strict=True):
        assert type(mine) is type(theirs)
        torch.testing.assert_close(mine.logits, theirs.logits.detach())
        assert not mine.loss.requires_grad


def test_a_model_that_waits_for_the_device_runs_eagerly_and_loses_nothing(caplog):
    model, _ = built(FAMILIES["bert"])
    model.cuda()

    def loss(model, batch):
        out = model(**batch)
        return out.loss * (1.0 + 0.0 * out.loss.item())

    step, batch = GraphedStep(model, loss), on("cuda", batch_for(FAMILIES["bert"], 0))
    with exact():
        first = [step(**batch) for _ in range(5)][-1]
        gradients = [p.grad.clone() for p in apt_ext.adapter_parameters(model)]
        model.zero_grad()
        for _ in range(5):
            eager(model, batch)
    assert step.captures == 0 and "capturing it failed" in step.reason and torch.isfinite(first)
    assert all(torch.equal(p.grad, g) for p, g in zip(apt_ext.adapter_parameters(model), gradients, strict=True))
    assert len([r for r in caplog.records if "runs eagerly" in r.message]) == 1
    before = torch.cuda.get_rng_state()
    assert len(set(torch.rand(4, device="cuda").tolist())) == 4  # the generator has left the capture
    assert not torch.equal(torch.cuda.get_rng_state(), before)
    other = GraphedStep(model)
    for _ in range(3):
        other(**batch)
    assert other.captures == 1
    with pytest.raises(RuntimeError, match="enabled=True"):
        strict = GraphedStep(model, loss, enabled=True)
        for _ in range(3):
            strict(**batch)


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
def test_an_earlier_forward_that_is_held_runs_eagerly_or_does_no_harm():
    model, _ = built(FAMILIES["bert"])
    model.cuda()
    step, batch = GraphedStep(model), on("cuda", batch_for(FAMILIES["bert"], 0))
    with exact():
        held = model(**batch)
        for _ in range(3):
            step(**batch)
        found = [p.grad.clone() for p in apt_ext.adapter_parameters(model)]
        model.zero_grad()
        for _ in range(3):
            eager(model, batch)
    assert step.captures == 1 or "let go of them" in step.reason
    assert all(torch.equal(p.grad, g) for p, g in zip(apt_ext.adapter_parameters(model), found, strict=True))
    del held
    model.zero_grad()
    with exact():
        for _ in range(2):
            step(**batch)
    assert step.captures == 1 and step.reason is None


def test_a_large_step_whose_capture_fails_runs_eagerly_and_gives_its_memory_back():
    layer = torch.nn.Linear(1024, 1024, device="cuda")

    def loss(model, x):
        for _ in range(8):
            x = model(x).relu()
        return x.sum() * (1.0 + 0.0 * x.sum().item())

    x = torch.randn(4096, 1024, device="cuda")
    GraphedStep(layer, loss, enabled=False)(x)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(6):
        step = GraphedStep(layer, loss)
        for _ in range(4):
            step(x)
        assert "capturing it failed" in step.reason
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 2**24  # a capture takes ten times that


def test_hooks_of_others_and_loose_tensors_run_eagerly():
    model, _ = built(FAMILIES["bert"])
    model.cuda()
    called = []
    handle = model.model.register_forward_hook(lambda *_: called.append(1))
    step, batch = GraphedStep(model), on("cuda", batch_for(FAMILIES["bert"], 0))
    for _ in range(4):
        step(**batch)
    assert len(called) == 4 and "hook" in step.reason
    handle.remove()
    for _ in range(4):
        step(**batch)
    assert step.captures == 1 and step.reason is None


def test_a_hundred_captures_leak_nothing():
    model, _ = built(FAMILIES["bert"])
    model.cuda()
    batch, step = on("cuda", batch_for(FAMILIES["bert"], 0)), GraphedStep(model)

    def settled():
        for i in range(20):
            model.train(i % 2 == 0)
            for _ in range(3):
                step(**batch)
                model.zero_grad()
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), len(gc.get_objects())

    before = [settled() for _ in range(2)][-1]
    after = [settled() for _ in range(4)][-1]
    assert step.captures >= 100
    assert after[0] <= before[0] and after[1] <= before[1] + 2**21
    assert after[2] <= before[2] + 500


def test_a_step_that_is_let_go_gives_its_memory_back_at_once():
    model, _ = built(FAMILIES["bert"])
    model.cuda()
    batch, step = on("cuda", batch_for(FAMILIES["bert"], 0)), GraphedStep(model)
    for _ in range(3):
        step(**batch)
    assert step.captures == 1
    alive = weakref.ref(step)
    gc.disable()
    try:
        del step
        assert alive() is None
    finally:
        gc.enable()


def test_resuming_a_run_goes_on_bit_for_bit():
    family = FAMILIES["llama"]

    def go(graph, stop):
        model, _ = built(family)
        model.cuda()
        optimizer = torch.optim.AdamW(apt_ext.adapter_parameters(model), lr=1e-3)
        controller = Controller(model, optimizer, 16, schedule={"start": 2, "end": 14, "events": 3}, shrink="none")
        step = GraphedStep(model) if graph else None
        with exact():
            for i in range(16):
                if i == stop:
                    state = {k: v.clone() for k, v in model.state_dict().items()}, optimizer.state_dict(), controller.state_dict()
                    controller.remove()
                    model, _ = built(family)
                    model.cuda().load_state_dict(state[0])
                    optimizer = torch.optim.AdamW(apt_ext.adapter_parameters(model), lr=1e-3)
                    optimizer.load_state_dict(state[1])
                    controller = Controller(model, optimizer, 16, schedule={"start": 2, "end": 14, "events": 3}, shrink="none")
                    controller.load_state_dict(state[2])
                    step = GraphedStep(model) if graph else None
                batch = on("cuda", batch_for(family, i))
                step(**batch) if graph else eager(model, batch)
                controller.observe()
                optimizer.step()
                optimizer.zero_grad()
                controller.step()
        return [p.detach().clone() for p in apt_ext.adapter_parameters(model)]

    whole = go(False, None)
    for graph, stop in ((True, None), (True, 7), (False, 7)):
        assert all(torch.equal(a, b) for a, b in zip(whole, go(graph, stop), strict=True)), (graph, stop)
