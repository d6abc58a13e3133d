"""Controller: a training run in which blocks go and ranks grow, by the optimizer's own steps."""

import copy
import logging

import pytest
import torch
from cases import crossed
from families import FAMILIES, keep_first
from training import SHORT, assert_equal, batch_for, built, finished, state_of, train, trained

import apt_ext
from apt_ext import APTConfig, Controller, Growth, Schedule, adapters, get_apt_model
from apt_ext.method import cubic_density, search

NAMES = list(FAMILIES)


@pytest.mark.parametrize(
    ("name", "hidden"),
    crossed(NAMES, (False, True), daily=lambda name, hidden: name in ("bert", "llama", "t5") or NAMES.index(name) % 2 == hidden),
)
def test_a_run_ends_at_its_density_with_masks_of_zeros_and_ones(name, hidden):
    family = FAMILIES[name]
    apt, optimizer = built(family, prune=["heads", "neurons", *["hidden"] * hidden])
    frozen = [(parameter, parameter.detach().clone()) for parameter in apt.parameters() if not parameter.requires_grad]
    lines = []
    controller = Controller(apt, optimizer, 16, log=lines.append, growth=Growth(2.0), **SHORT)
    start = controller.adapter_parameters
    train(apt, optimizer, controller, family, 16)
    assert frozen and all(parameter.grad is None and torch.equal(parameter, value) for parameter, value in frozen)
    assert controller.done and 0.3 < controller.density <= 0.65
    for name in apt.blocks:
        mask = apt.get_block_mask(name)
        assert bool((mask * (1 - mask) == 0).all()) and bool(mask.any())
    assert len(lines) == 3 and "density" in lines[-1]
    assert start == 2 * sum(a.in_features + a.out_features for _, a in adapters(apt) if a.rank)
    assert 1.5 * start < controller.adapter_parameters <= 2 * start
    apt_ext.shrink(apt)


# -- masks --------------------------------------------------------------------------------------------------------------------------------


def masks_of(apt):
    return {name: apt.get_block_mask(name) for name in apt.blocks}


@pytest.mark.parametrize("per_step", [False, True])
def test_masks_move_by_alpha_and_are_binary_after_events(per_step):
    """Rising and falling at one rate within a window; fractions only there; what is 0 after an event stays out."""
    family = FAMILIES["bert"]
    apt, optimizer = built(family, uniform=False)
    schedule = Schedule(start=4, end=28, events=2, window=8, per_step=per_step)
    controller = Controller(apt, optimizer, 40, schedule=schedule, shrink="none")
    before, out, fractions = masks_of(apt), {name: mask == 0 for name, mask in masks_of(apt).items()}, 0
    for step in range(1, 41):
        train(apt, optimizer, controller, family, 1, first=step)
        now = masks_of(apt)
        event = step in (16, 28)
        moves = per_step and 4 < step <= 28 or any(event - 8 < step <= event for event in (16, 28))
        for name, mask in now.items():
            if not event or (per_step and step == 16):
                assert bool(((mask - before[name]).abs() <= 1 / 8 + 1e-6).all())
            assert bool(((mask >= 0) & (mask <= 1)).all()) and (moves or torch.equal(mask, before[name]))
            assert not bool((mask[out[name]] != 0).any())
            fractions += int(((mask > 0) & (mask < 1)).sum())
            if step == 28 or (event and not per_step):
                assert bool((mask * (1 - mask) == 0).all())
                out[name] = mask == 0
        before = now
    assert fractions > 20 and any(bool(gone.any()) for gone in out.values())


def test_kept_blocks_recover_at_the_rate_at_which_they_fall(monkeypatch):
    """A block that falls, and is kept again before the event, rises again."""
    family = FAMILIES["bert"]
    apt, optimizer = built(family, prune=["neurons"], uniform=False, density=0.85)
    controller = Controller(apt, optimizer, 40, schedule=Schedule(start=4, end=14, events=1))
    fallen = iter([True] * 3 + [False] * 7)

    def scores():
        down = next(fallen)
        return {name: torch.where(torch.arange(20) < 10, 1.0, 2.0 if down else 0.5) for name in controller.blocks}

    monkeypatch.setattr(controller.scores, "scores", scores)
    seen = []
    for step in range(14):
        train(apt, optimizer, controller, family, 1, first=step)
        seen.append(apt.get_block_mask("0.neurons")[:1].item())
    assert seen[4:] == pytest.approx([0.9, 0.8, 0.7, 0.8, 0.9, 1, 1, 1, 1, 1])


@pytest.mark.parametrize(
    ("budget", "uniform"),
    crossed(
        ("parameters", "flops", "memory", "latency", "parameters with hidden"),
        (True, False),
        daily=lambda budget, uniform: budget == "parameters" or uniform == (budget in ("flops", "latency")),
    ),
)
def test_the_real_density_is_within_one_block_of_the_target(monkeypatch, budget, uniform):
    """One chunk more of whatever comes next would be too much."""
    family = FAMILIES["llama"]
    tables = {"heads": {0: 0.0, 3: 3.0}, "neurons": {0: 0.5, 8: 1.5, 20: 4.0}}
    budget, _, more = budget.partition(" with ")
    apt, optimizer = built(family, uniform=uniform, prune=["heads", "neurons", *more.split()])
    once = Schedule(start=2, end=12, events=1)
    latency = tables if budget == "latency" else None
    controller = Controller(apt, optimizer, 16, schedule=once, budget=budget, latency=latency, shrink="none")
    calls = []
    monkeypatch.setattr(apt_ext.method.controller, "search", lambda *args: calls.append(args) or search(*args))
    train(apt, optimizer, controller, family, 16)
    scores, live, groups, cost, counts, allowed, joint = calls[-1]
    assert controller.density <= 0.65 and allowed == pytest.approx(0.65 * cost.total({name: b.count for name, b in apt.blocks.items()}))
    more, larger, number = allowed, {}, {name: int(apt.get_block_mask(name).sum()) for name in live}
    while larger in ({}, number):  # the first larger budget that lets something more in
        more *= 1.001
        larger = {name: int(keep.sum()) for name, keep in search(scores, live, groups, cost, counts, more, joint).keep.items()}
    differing = [name for name in number if larger[name] != number[name]]
    assert any(set(differing) == set(group.blocks) for group in groups)
    assert all(larger[name] - number[name] <= (1 if name.endswith("heads") else 4) for name in differing)


def test_density_1_leaves_masks_alone_and_still_grows_ranks():
    apt, controller, _ = trained("bert", density=1.0)
    assert all(bool(mask.all()) for mask in masks_of(apt).values()) and controller.density == 1.0
    assert {adapter.rank for _, adapter in adapters(apt)} > {2, 4}
    assert not any(adapter.compacted for _, adapter in adapters(apt))


def test_it_goes_on_from_a_density_that_was_reached_before(monkeypatch):
    """One-shot pruning first, then less and less."""
    allowed = []
    monkeypatch.setattr(apt_ext.method.controller, "search", lambda *args: allowed.append(args[5]) or search(*args))
    family = FAMILIES["bert"]
    apt, optimizer = built(family, density=0.5)
    keep_first(apt, neurons=12)
    before, lines = masks_of(apt), []
    controller = Controller(apt, optimizer, 16, log=lines.append, **SHORT)
    initial = controller.density
    allowed.clear()
    assert 0.5 < initial < 0.9
    train(apt, optimizer, controller, family, 16)
    assert controller.density <= 0.5
    assert all(not bool((mask[before[name] == 0] != 0).any()) for name, mask in masks_of(apt).items())
    densities = [float(line.split("density ")[1].split()[0]) for line in lines]
    dense = controller.cost.total({name: block.count for name, block in apt.blocks.items()})
    assert sorted(allowed, reverse=True)[::4] == pytest.approx([dense * cubic_density(event, 2, 14, 0.5, initial) for event in (6, 10, 14)])
    assert densities == sorted(densities, reverse=True)


def test_dead_blocks_go_first():
    """A planted problem: heads and neurons that nothing reads go before any other."""
    family = FAMILIES["bert"]
    torch.manual_seed(0)
    model = family.model()
    planted = {}
    with torch.no_grad():
        for i, layer in enumerate(model.bert.encoder.layer):
            layer.attention.output.dense.weight[:, 8 * i : 8 * i + 8] = 0
            planted[f"{i}.heads"] = torch.arange(3) == i
            layer.output.dense.weight[:, 1::2] = 0
            planted[f"{i}.neurons"] = torch.arange(20) % 2 == 1
    config = APTConfig(
        r=2, prune=["heads", "neurons"], density=0.55, round_to=2, uniform=False, target_modules=["query", "value", "intermediate.dense"]
    )
    apt = get_apt_model(model, config).train()
    optimizer = torch.optim.AdamW(apt_ext.adapter_parameters(apt), lr=1e-3)
    controller = Controller(apt, optimizer, 16, **SHORT)
    train(apt, optimizer, controller, family, 16)
    for name, dead in planted.items():
        mask = apt.get_block_mask(name)
        assert not bool(mask[dead].any()), name
        assert bool(mask[~dead].any())


@pytest.mark.parametrize("compact", [True, False])
def test_from_the_first_event_on_adapters_are_compacted(compact):
    """And the run is the same but for rounding."""
    family = FAMILIES["bert"]
    plain, _, _ = finished("bert")
    apt, optimizer = built(family)
    controller, seen = Controller(apt, optimizer, 16, **{**SHORT, "shrink": "compact" if compact else "none"}), []
    for step in range(16):
        train(apt, optimizer, controller, family, 1, first=step)
        seen.append(any(adapter.compacted for _, adapter in adapters(apt)))
    assert seen == [compact and step >= 6 for step in range(1, 17)]
    for name, value in state_of(plain).items():
        torch.testing.assert_close(state_of(apt)[name], value, rtol=1e-6, atol=1e-9)


# -- steps --------------------------------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_run_bitwise():
    assert_equal(state_of(trained("bert")[0]), state_of(finished("bert")[0]))


def split(batch, parts):
    return [{name: value[part : part + 1] for name, value in batch.items()} for part in range(parts)]


@pytest.mark.parametrize("observed", ["once", "each"])
def test_accumulated_micro_batches_are_one_batch(observed):
    """Three micro-batches of one row each, and the batch of three: the same masks and ranks, parameters within rounding."""
    family = FAMILIES["llama"]
    whole, controller, _ = finished("llama")
    apt, optimizer = built(family)
    other = Controller(apt, optimizer, 16, **SHORT)
    for seed in range(16):
        parts = split(batch_for(family, seed), 3)
        for i, part in enumerate(parts):
            (apt(**part).loss / 3).backward()
            if observed == "each":  # in every round of the loop, as one does who does not think of it
                other.observe()
                if i < 2:
                    other.step()
        if observed == "once":
            other.observe()
        optimizer.step()
        optimizer.zero_grad()
        other.step()
    assert other.now == 16 and other.adapter_parameters == controller.adapter_parameters
    ours, theirs = state_of(apt), state_of(whole)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-8, msg=lambda text, at=name: f"{at}: {text}")


class Scaler:
    """torch's GradScaler in miniature, for a CPU: some steps overflow and are skipped."""

    def __init__(self, overflows):
        self.overflows, self.step_number = overflows, 0

    def scale(self, loss):
        self.step_number += 1
        return loss * (torch.inf if self.step_number in self.overflows else 1024.0)

    def step(self, optimizer):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if all(bool(grad.isfinite().all()) for grad in grads):
            for grad in grads:
                grad.div_(1024.0)
            optimizer.step()


def test_steps_that_a_grad_scaler_skips_do_not_count():
    """Neither as steps nor in the averages: the same run as without them."""
    family = FAMILIES["bert"]
    plain, controller, _ = finished("bert")
    apt, optimizer = built(family)
    other, scaler = Controller(apt, optimizer, 16, **SHORT), Scaler({1, 5, 6, 13})
    seeds = iter(range(16))
    for step in range(1, 21):
        batch = batch_for(family, 99 if step in scaler.overflows else next(seeds))
        scaler.scale(apt(**batch).loss).backward()
        other.observe()
        scaler.step(optimizer)
        optimizer.zero_grad()
        other.step()
    assert other.now == 16 and other.done
    for name, value in state_of(plain).items():
        torch.testing.assert_close(state_of(apt)[name], value, rtol=1e-6, atol=1e-9)


def test_torchs_grad_scaler_and_an_optimizer_that_skips_by_itself():
    family = FAMILIES["bert"]
    for fused in (False, True):
        apt, _ = built(family)
        apt.float()
        optimizer = torch.optim.AdamW(apt_ext.adapter_parameters(apt), lr=1e-3, fused=fused)
        controller, scaler = Controller(apt, optimizer, 100), torch.amp.GradScaler("cpu", init_scale=8.0)
        for overflow in (False, True, False):
            loss = apt(**batch_for(family, 0)).loss
            scaler.scale(loss * (torch.inf if overflow else 1)).backward()
            controller.observe()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            controller.step()
        assert controller.now == 2, fused
        assert all(bool(score.isfinite().all()) for score in controller.scores.scores().values())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    family = FAMILIES["llama"]
    plain, _, _ = finished("llama")
    apt, optimizer = built(family)
    apt.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        apt.enable_input_require_grads()
    controller = Controller(apt, optimizer, 16, **SHORT)
    train(apt, optimizer, controller, family, 16)
    for name, value in state_of(plain).items():
        torch.testing.assert_close(state_of(apt)[name], value, rtol=1e-6, atol=1e-9)


def test_the_learning_rate_follows_its_schedule_and_every_parameter_its_optimizer():
    family = FAMILIES["bert"]
    apt, optimizer = built(family)
    before = {name: parameter for name, parameter in apt.named_parameters() if parameter.requires_grad}
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 16)
    controller, head = Controller(apt, optimizer, 16, **SHORT), apt.classifier.weight.detach().clone()
    for step in range(16):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * (1 - step / 16))
        apt(**batch_for(family, step)).loss.backward()
        controller.observe()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        controller.step()
    after = {name: parameter for name, parameter in apt.named_parameters() if parameter.requires_grad}
    assert all(after[name] is parameter for name, parameter in before.items())  # rank 0 carriers aside, no new Parameters
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    live = [id(p) for p in apt_ext.adapter_parameters(apt)]
    assert sorted(held) == sorted(live) and len(set(held)) == len(held)
    assert not torch.equal(apt.classifier.weight, head)  # the task head trains
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].shape == parameter.shape


def test_within_max_rank_nothing_is_reallocated():
    apt, controller, _ = trained("bert", max_rank=6)
    ranks = {adapter.rank for name, adapter in adapters(apt) if name in controller.importance.adapters}
    assert max(ranks) == 6 and all(a.lora_A.shape[0] == 6 for a in controller.importance.adapters.values())


def test_two_optimizers_count_once():
    family = FAMILIES["bert"]
    apt, _ = built(family)
    parameters = apt_ext.adapter_parameters(apt)
    optimizers = [torch.optim.AdamW(parameters[::2], lr=1e-3), torch.optim.SGD(parameters[1::2], lr=1e-3, momentum=0.9)]
    controller = Controller(apt, optimizers, 16, **SHORT)
    for seed in range(16):
        apt(**batch_for(family, seed)).loss.backward()
        controller.observe()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        controller.step()
    assert controller.now == 16 and controller.done


# -- what it says -------------------------------------------------------------------------------------------------------------------------


def test_it_says_one_line_a_change(caplog):
    lines = []
    trained("bert", log=lines.append)
    with caplog.at_level(logging.INFO, logger="apt_ext"):
        trained("bert")
    assert [record.getMessage() for record in caplog.records if record.levelname == "INFO"] == lines and len(lines) == 3
    for part in ("step 14: density 0.", "(target 0.65)", "heads ", " of 3", "neurons ", "ranks 2-", "adapter parameters", "last score"):
        assert part in lines[-1]


def test_progress_and_done():
    family = FAMILIES["bert"]
    apt, optimizer = built(family)
    controller = Controller(apt, optimizer, 16, schedule=Schedule(start=2, warm_up=3, end=14, events=3))
    seen = []
    for seed in range(16):
        seen.append((controller.progress, controller.done))
        train(apt, optimizer, controller, family, 1, first=seed)
    assert [mu for mu, _ in seen] == pytest.approx([0] * 6 + [i / 9 for i in range(1, 9)] + [1, 1])
    assert [done for _, done in seen] == [False] * 14 + [True] * 2


def test_it_warns_when_it_is_forgotten():
    apt, optimizer = built(FAMILIES["bert"])
    controller = Controller(apt, optimizer, 100)
    with pytest.warns(UserWarning, match=r"20 optimizer steps without Controller.step\(\)"):
        for _ in range(20):
            optimizer.step()
    controller.remove()


def test_a_forgotten_observe_is_an_error():
    apt, optimizer = built(FAMILIES["bert"])
    controller = Controller(apt, optimizer, 100, schedule=Schedule(start=2, end=90))
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"expected observe\(\) before"):
        controller.step()


def test_remove_leaves_no_hook():
    apt, optimizer = built(FAMILIES["bert"])
    Controller(apt, optimizer, 100).remove()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in apt.modules())
    assert not optimizer._optimizer_step_post_hooks
    pruned, _, _ = finished("bert")
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in pruned.modules())


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"total_steps": 0}, ValueError, "total_steps must be at least 1, got 0"),
        ({"total_steps": None}, ValueError, "total_steps: expected the number of optimizer steps"),
        ({"density": 1.5}, ValueError, "density: expected a share"),
        ({"density": 0.01}, ValueError, r"density: expected at least 0\.\d+, which is what stays where every block keeps its floor"),
        ({"prune": ["rows"]}, ValueError, "prune: expected kinds of heads, neurons, hidden, got 'rows'"),
        ({"prune": []}, ValueError, r"prune: expected kinds of blocks that the model has, \['heads', 'hidden', 'neurons'\], got \[\]"),
        ({"budget": "time"}, ValueError, "budget must be 'parameters' or 'flops'"),
        ({"budget": "latency"}, ValueError, "latency: expected {kind: {number kept: seconds}} with budget='latency', got None"),
        ({"latency": {}}, ValueError, "latency: expected None with budget='parameters'"),
        ({"decay": 1.0}, ValueError, "decay must lie in"),
        ({"floor": -1}, ValueError, "floor must be at least 0"),
        ({"growth": 0.5}, ValueError, "growth.budget must be at least 1, got 0.5"),
        ({"growth": "all"}, TypeError, "growth must be a number, got str"),
        ({"schedule": {"window": 30}}, ValueError, "schedule.window: expected at most the 4 steps between two events, got 30"),
        ({"config": {}}, TypeError, "config: expected an APTConfig, got dict"),
    ],
)
def test_arguments_are_refused_in_words(options, kind, words):
    apt, optimizer = built(FAMILIES["bert"])
    with pytest.raises(kind, match=words):
        Controller(apt, optimizer, **{"total_steps": 40, **options})
    assert not any(module._forward_pre_hooks for module in apt.modules()) and not optimizer._optimizer_step_post_hooks


def test_a_model_without_adapters_and_an_optimizer_that_is_none_are_refused():
    apt, optimizer = built(FAMILIES["bert"])
    with pytest.raises(TypeError, match="model: expected an APTModel or a module that holds one, got Linear that holds 0"):
        Controller(torch.nn.Linear(2, 2), optimizer, 10)
    with pytest.raises(TypeError, match="optimizer: expected torch's Optimizer"):
        Controller(apt, None, 10)
    with pytest.raises(TypeError, match="optimizer: expected torch's Optimizer.* got StepLR"):
        Controller(apt, torch.optim.lr_scheduler.StepLR(optimizer, 1), 10)


def test_a_change_that_is_refused_changes_nothing():
    family = FAMILIES["bert"]
    apt, optimizer = built(family)
    controller = Controller(apt, optimizer, 16, schedule=Schedule(start=1, end=3, events=1, window=1))
    train(apt, optimizer, controller, family, 2)
    name, adapter = next((n, a) for n, a in adapters(apt) if n.endswith("1.output.dense"))
    apt(**batch_for(family, 5)).loss.backward()
    controller.observe()
    optimizer.step()
    optimizer.zero_grad()
    adapter.merge_weights()
    before = copy.deepcopy(state_of(apt))
    with pytest.raises(RuntimeError, match=f"step: {name} is merged under its present masks"):
        controller.step()
    assert_equal(state_of(apt), before)
    first, other = next((n, a) for n, a in adapters(apt) if n.endswith("0.attention.self.query"))  # of several, the first in the model
    other.merge_weights()
    with pytest.raises(RuntimeError, match=f"step: {first} is merged under its present masks"):
        controller.step()
