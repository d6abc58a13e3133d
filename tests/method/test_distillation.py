"""Distillation: losses against a plain computation, the teacher's own structure, which layers are compared, and Tr through it all."""

import copy

import pytest
import torch
from families import FAMILIES, adapted, keep_first, with_loss
from students import passed, student, taught
from torch.nn import functional as F

from apt_ext import APTConfig, adapter_parameters, adapters, get_apt_model
from apt_ext.method import Distiller, Salience, distill_weight
from apt_ext.method.distillation import frozen_copy, nearest_layers

NAMES = ["bert", "distilbert", "llama", "gpt2", "t5"]


# -- 34, 35: mu, the start -------------------------------------------------------------------------------------------------


def test_mu():
    assert [distill_weight(step, 10, 20) for step in (0, 10, 15, 20, 99)] == [0, 0, 0.5, 1, 1]


def test_without_a_teacher_it_is_the_task():
    apt, batch, _ = student()
    distiller = Distiller(apt)
    assert distiller.asks == {} and distiller.parameters() == []
    outputs = apt(**batch)
    assert distiller.loss(batch, outputs) is outputs.loss


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("given", [True, False])
def test_a_student_that_equals_its_teacher_has_no_loss(name, given):
    """Tr is the identity at the start, the KL 0 and each layer's error 0."""
    apt, batch, _ = student(name)
    distiller = Distiller(apt, copy.deepcopy(apt) if given else "self")
    assert distiller.transform is not None and not distiller.transform.lora_B.any() and distiller.transform.lora_A.any()
    assert passed(apt, distiller, batch).item() == 0
    task = apt(**batch).loss
    torch.testing.assert_close(passed(apt, distiller, batch, 0.25), 0.75 * task, check_dtype=False)
    torch.testing.assert_close(passed(apt, distiller, batch, -1.0), task, check_dtype=False)


def test_the_losses_are_those_of_a_plain_computation():
    apt, batch, family = student()
    teacher = adapted(family, APTConfig(r=2), num_hidden_layers=4, seed=5)
    distiller = Distiller(apt, teacher, logits=0.3, layers=0.7, temperature=1.5, quarters=4)  # 4 of 4: nothing is left to chance
    with torch.no_grad():
        distiller.transform.lora_B.normal_()
    A, B = distiller.transform.lora_A, distiller.transform.lora_B
    ours, theirs = (model(**batch, output_hidden_states=True) for model in (apt, teacher))
    p, q = (F.softmax(outputs.logits / 1.5, -1) for outputs in (theirs, ours))
    kl = (p * (p / q).log()).sum(1).mean() * 1.5**2
    real = batch["attention_mask"].bool()
    layers = sum(
        F.mse_loss((h + 2.0 * h @ A.t() @ B.t())[real], t[real])
        for h, t in zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True)
    )
    expected = 0.6 * (0.3 * kl + 0.7 * layers) + 0.4 * ours.loss
    torch.testing.assert_close(passed(apt, distiller, batch, 0.6), expected, rtol=1e-10, atol=0)


def test_tokens_count_where_they_have_a_label():
    apt, batch, family = student("llama")
    teacher = adapted(family, APTConfig(r=2), num_hidden_layers=4, seed=5)
    labels = batch["input_ids"].clone()
    labels[:, :4] = -100
    loss = passed(apt, Distiller(apt, teacher, layers=0), {**batch, "labels": labels})
    p, q = (F.log_softmax(model(batch["input_ids"]).logits[:, 4:].flatten(0, 1) / 2, -1) for model in (teacher, apt))
    torch.testing.assert_close(loss, 4 * F.kl_div(q, p, log_target=True, reduction="batchmean"), rtol=1e-10, atol=0)


def test_padding_counts_in_neither_term():
    apt, batch, family = student()
    teacher = adapted(family, APTConfig(r=2), num_hidden_layers=4, seed=5)
    assert not bool(batch["attention_mask"].all())
    distiller = Distiller(apt, teacher)
    outputs = apt(**batch, **distiller.asks)
    state = distiller.state_dict()
    expected = distiller.loss(batch, outputs)
    for hidden in outputs.hidden_states:
        hidden.data[batch["attention_mask"] == 0] = float("nan")
    distiller.load_state_dict(state)  # the same layers again
    assert torch.equal(distiller.loss(batch, outputs), expected)


def test_states_of_two_stacks_are_normed_and_averaged():
    apt, batch, family = student("t5")
    teacher = adapted(family, APTConfig(r=2), num_layers=4, seed=5)
    ours, theirs = (model(**batch, output_hidden_states=True) for model in (apt, teacher))

    def normed(states, real):
        return (states * (states.square().mean(-1, keepdim=True) + 1e-6).rsqrt())[real]

    real = {"encoder": batch["attention_mask"].bool(), "decoder": torch.ones_like(batch["decoder_input_ids"]).bool()}
    expected = 0.0
    for stack, where in real.items():
        pairs = zip(getattr(ours, f"{stack}_hidden_states")[1:], getattr(theirs, f"{stack}_hidden_states")[1:], strict=True)
        expected = expected + sum(F.mse_loss(normed(h, where), normed(t, where)) for h, t in pairs) / 2
    torch.testing.assert_close(passed(apt, Distiller(apt, teacher, logits=0, layers=1), batch), expected, rtol=1e-9, atol=0)


# -- 36, 37: the teacher ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_stays_what_it_is_whatever_becomes_of_the_student(name):
    apt, batch, family = student(name)
    distiller = Distiller(apt, "self")
    before = taught(distiller, batch)
    optimizer = torch.optim.AdamW([*adapter_parameters(apt), *distiller.parameters()], lr=0.1)

    def same():
        return all(torch.equal(a, b) for a, b in zip(taught(distiller, batch), before, strict=True))

    def step():
        passed(apt, distiller, batch, 0.5).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    keep_first(apt, heads=2, neurons=9, hidden=16)
    assert same(), "masks"
    step()
    for _, adapter in adapters(apt):
        if adapter.rank:
            adapter.increase_rank(3, optimizer=optimizer)
    step()
    assert same(), "adapters"
    apt.compact()
    step()
    assert same(), "compact"
    apt.compact(False)
    apt.cut(optimizer)
    step()
    assert same(), "cut"
    assert not any(module.training for module in distiller.teacher.modules())


def test_after_a_refresh_the_teacher_has_the_students_structure():
    apt, batch, _ = student()
    distiller = Distiller(apt, "self")
    full = taught(distiller, batch)

    def every_third_goes():
        keep_first(apt, heads=2, neurons=9)
        apt.set_block_mask("hidden", (torch.arange(apt.blocks["hidden"].count) % 3 != 0).float())

    def layers_alone():
        """The layer term against the states themselves, Tr being the identity still."""
        ours, theirs = apt(**batch, **distiller.asks).hidden_states[1:], taught(distiller, batch)[2:]
        real = batch["attention_mask"].bool()
        places = [torch.arange(24) if m.hidden_left is None else m.hidden_left for m in (apt, distiller.teacher)]
        total = 0.0
        for h, t in zip(ours, theirs, strict=True):
            wide = h.new_zeros(*h.shape[:-1], 24).index_copy(-1, places[0], h)
            total = total + F.mse_loss(wide.index_select(-1, places[1])[real], t[real])
        distiller.logits = 0.0
        return passed(apt, distiller, batch), 0.9 * total

    every_third_goes()
    torch.testing.assert_close(*layers_alone(), rtol=1e-9, atol=0)
    distiller.refresh()
    assert passed(apt, distiller, batch).item() == 0
    apt.cut()
    assert passed(apt, distiller, batch).item() < 1e-10  # the student is smaller than its teacher now
    distiller.refresh()
    assert passed(apt, distiller, batch).item() == 0 and taught(distiller, batch)[1].shape[-1] == 16
    every_third_goes()
    apt.cut()
    torch.testing.assert_close(*layers_alone(), rtol=1e-9, atol=0)
    assert taught(distiller, batch)[1].shape[-1] == 16 and full[1].shape[-1] == 24


@pytest.mark.parametrize("name", NAMES)
def test_frozen_weights_are_shared_and_nothing_else(name):
    apt, batch, _ = student(name)
    apt.train()
    distiller = Distiller(apt, "self")
    passed(apt, distiller, batch, 0.5).backward()
    mine, theirs = dict(apt.named_parameters()), dict(distiller.teacher.named_parameters())
    assert mine.keys() == theirs.keys() and any(not p.requires_grad for p in mine.values())
    for key, parameter in mine.items():
        assert (theirs[key].data_ptr() == parameter.data_ptr()) == (not parameter.requires_grad or not parameter.numel()), key
        assert theirs[key].grad is None and not theirs[key].requires_grad
    for key, buffer in apt.named_buffers():
        if "mask" in key:
            assert distiller.teacher.get_buffer(key).data_ptr() != buffer.data_ptr(), key


def test_the_teachers_pass_is_not_scored():
    apt, batch, _ = student()
    block = apt.blocks["0.neurons"]
    salience = Salience(apt, {"0.neurons": (apt.model.get_submodule(block.reader), block.count)}, decay=0.0)
    apt(**batch).loss.backward()
    salience.update()
    expected = salience.scores["0.neurons"].clone()
    distiller = Distiller(apt, "self")
    assert not any(module._forward_pre_hooks for module in distiller.teacher.modules())
    outputs = apt(**batch, **distiller.asks)
    with torch.enable_grad():
        distiller.loss(batch, outputs, 0.5)
    outputs.loss.backward()
    salience.update()
    torch.testing.assert_close(salience.scores["0.neurons"], expected)


def test_a_given_teacher_gets_no_gradient():
    apt, batch, family = student()
    teacher = family.model(num_hidden_layers=4, seed=9).train()
    passed(apt, Distiller(apt, teacher), batch, 0.5).backward()
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters()) and not teacher.training


def test_a_merged_student_is_refused():
    apt, batch, _ = student()
    distiller = Distiller(apt, "self")
    name, adapter = next((n, a) for n, a in adapters(apt) if a.rank)
    outputs = apt(**batch, **distiller.asks)
    adapter.merge_weights()
    for call in (distiller.refresh, lambda: distiller.loss(batch, outputs)):
        with pytest.raises(RuntimeError, match=f"{name} is merged"):
            call()
    adapter.unmerge_weights()
    distiller.loss(batch, outputs)


# -- 38: layers, Tr --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "alive", "expected"),
    [(1, "1111", [1]), (1, "1011", [0, 2]), (0, "0011", [2]), (3, "0110", [2]), (2, "1000", [0]), (2, "0000", [2])],
)
def test_phi_is_the_nearest_layer_that_is_left(layer, alive, expected):
    assert nearest_layers(layer, [flag == "1" for flag in alive]) == expected


def test_a_removed_layer_is_never_compared_and_the_closer_neighbour_is():
    apt, batch, family = student()
    teacher = adapted(family, APTConfig(r=2), num_hidden_layers=4, seed=5)
    distiller = Distiller(apt, teacher, logits=0, layers=1)
    apt.set_block_mask("1.heads", torch.zeros(3))  # layer 1 has neurons left, and counts as removed
    outputs = apt(**batch, output_hidden_states=True)
    theirs = teacher(**batch, output_hidden_states=True)
    real = batch["attention_mask"].bool()
    error = [[F.mse_loss(h[real], t[real]) for h in outputs.hidden_states[1:]] for t in theirs.hidden_states[1:]]
    expected = error[0][0] + torch.minimum(error[1][0], error[1][2]) + error[2][2] + error[3][3]
    torch.testing.assert_close(distiller.loss(batch, outputs), expected, rtol=1e-10, atol=0)
    outputs.hidden_states[2].data.fill_(float("nan"))
    torch.testing.assert_close(distiller.loss(batch, outputs), expected, rtol=1e-10, atol=0)


def test_where_no_layer_has_all_its_blocks_any_left_will_do():
    apt, batch, _ = student()
    distiller = Distiller(apt, "self")
    for layer in range(4):
        apt.set_block_mask(f"{layer}.heads", torch.zeros(3))
    assert distiller._alive("", 4) == [True] * 4
    apt.set_block_mask("2.neurons", torch.zeros(20))
    assert distiller._alive("", 4) == [True, True, False, True]
    keep_first(apt, neurons=0)
    passed(apt, distiller, batch).backward()


@pytest.mark.parametrize(("count", "quarters"), [(12, 4), (6, 4), (5, 4), (4, 4), (2, 4), (7, 3)])
def test_one_layer_of_each_stretch_and_in_time_every_layer(count, quarters):
    apt, _, _ = student(layers=2)
    distiller = Distiller(apt, "self", quarters=quarters)
    drawn = [distiller._drawn(count) for _ in range(200)]
    stretches = min(quarters, count)
    bounds = [count * i // stretches for i in range(stretches + 1)]
    for layers in drawn:
        assert all(low <= layer < high for layer, low, high in zip(layers, bounds[:-1], bounds[1:], strict=True))
    assert {layer for layers in drawn for layer in layers} == set(range(count))
    assert [Distiller(apt, "self", seed=3, quarters=quarters)._drawn(count) for _ in range(2)][0] == Distiller(
        apt, "self", seed=3, quarters=quarters
    )._drawn(count)


def test_Tr_trains_through_refreshes_growth_and_cuts():
    apt, batch, _ = student()
    distiller = Distiller(apt, "self")
    A, B = distiller.parameters()
    optimizer = torch.optim.AdamW([*adapter_parameters(apt), A, B], lr=0.01)

    def moves():
        before = [A.detach().clone(), B.detach().clone()]
        for _ in range(2):
            passed(apt, distiller, batch, 0.5).backward()
            optimizer.step()
            optimizer.zero_grad()
        now = distiller.parameters()
        return now[0] is A and now[1] is B and not any(torch.equal(p, old) for p, old in zip(now, before, strict=True))

    assert moves()
    distiller.refresh()
    assert moves()
    keep_first(apt, neurons=9, hidden=16)
    apt.cut(optimizer)
    assert moves()
    distiller.refresh()
    for _, adapter in adapters(apt):
        if adapter.rank:
            adapter.increase_rank(adapter.rank + 1, optimizer=optimizer)
    assert moves()


# -- state, errors ---------------------------------------------------------------------------------------------------------


def test_it_goes_on_from_its_state_bitwise():
    apt, batch, family = student()
    distiller = Distiller(apt, "self", seed=3)
    keep_first(apt, neurons=9)
    with torch.no_grad():
        distiller.transform.lora_B.normal_()
    passed(apt, distiller, batch)
    other = adapted(family, APTConfig(r=2), num_hidden_layers=4)
    later = Distiller(other, "self", seed=4)
    other.load_state_dict(apt.state_dict())
    later.load_state_dict(distiller.state_dict())
    for _ in range(3):
        assert torch.equal(passed(other, later, batch), passed(apt, distiller, batch))


def test_a_state_of_another_is_refused_and_nothing_changes():
    apt, batch, family = student()
    distiller = Distiller(apt, "self")
    before = distiller.state_dict()
    wide = Distiller(adapted(family, APTConfig(r=2), num_hidden_layers=4, intermediate_size=24), "self")
    for state, words in ((Distiller(apt, copy.deepcopy(apt)).state_dict(), "keys of a Distiller"), (wide.state_dict(), "of shape")):
        with pytest.raises(ValueError, match=words):
            distiller.load_state_dict(state)
    assert all(torch.equal(value, before[key]) for key, value in distiller.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"teacher": "me"}, TypeError, 'teacher: expected None, "self" or a module'),
        ({"teacher": "self", "temperature": 0.0}, ValueError, "temperature must be above 0, got 0"),
        ({"teacher": "self", "layers": -1.0}, ValueError, "layers must be at least 0, got -1.0"),
        ({"teacher": "self", "logits": float("nan")}, ValueError, "logits must be a finite number, got nan"),
        ({"teacher": "self", "logits": 0, "layers": 0}, ValueError, "got 0 and 0"),
        ({"teacher": "self", "quarters": 0}, ValueError, "quarters must be at least 1, got 0"),
        ({"scaling": "x"}, TypeError, "scaling must be a number, got str"),
        ({"teacher": torch.nn.Linear(2, 2)}, ValueError, "teacher: expected a config with hidden_size, got Linear"),
    ],
)
def test_arguments_are_refused_in_words(arguments, error, words):
    apt, _, _ = student()
    with pytest.raises(error, match=words):
        Distiller(apt, **arguments)


def test_what_does_not_fit_is_said():
    apt, batch, family = student()
    with pytest.raises(TypeError, match="model: expected an APTModel"):
        Distiller(family.model())
    with pytest.raises(ValueError, match="got the student"):
        Distiller(apt, apt.model)
    with pytest.raises(ValueError, match="hidden size 24, got 12"):
        Distiller(apt, family.model(hidden_size=12))
    narrow = Distiller(apt, family.model(hidden_size=12), layers=0)  # logits can be compared
    assert narrow.parameters() == [] and passed(apt, narrow, batch).item() > 0
    with pytest.raises(ValueError, match="the student's 4 layers, got 2"):
        passed(apt, Distiller(apt, family.model()), batch)
    with pytest.raises(ValueError, match=r"logits of the teacher's shape \[3, 2\], got \[3, 3\]"):
        passed(apt, Distiller(apt, family.model(num_labels=2, num_hidden_layers=4)), batch)
    distiller = Distiller(apt, "self")
    with pytest.raises(ValueError, match="expected hidden_states, got none; call the student"):
        distiller.loss(batch, apt(**batch))
    with pytest.raises(ValueError, match="progress: expected a number, got NaN"):
        passed(apt, distiller, batch, float("nan"))
    with pytest.raises(TypeError, match="progress: expected a number, got bool"):
        passed(apt, distiller, batch, True)
    with pytest.raises(RuntimeError, match='made with teacher="self"'):
        Distiller(apt).refresh()


def test_a_copy_of_a_masked_model_computes_the_same_under_its_own_masks():
    apt, batch, _ = student()
    keep_first(apt, heads=2, neurons=9, hidden=16)
    twin = frozen_copy(apt)
    assert torch.equal(twin(**batch).logits, apt(**batch).logits)
    assert twin.blocks.keys() == apt.blocks.keys() and torch.equal(twin.get_block_mask("hidden"), apt.get_block_mask("hidden"))


def test_a_compacted_student_becomes_a_teacher_that_stays_what_it_is():
    apt, batch, _ = student()
    keep_first(apt, heads=2, neurons=9)
    apt.compact()
    distiller = Distiller(apt, "self")
    assert passed(apt, distiller, batch).item() == 0
    before = taught(distiller, batch)
    keep_first(apt, heads=1, neurons=5)
    assert passed(apt, distiller, batch).item() > 0
    assert all(torch.equal(a, b) for a, b in zip(taught(distiller, batch), before, strict=True))


@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize("dense", ["cpu"])
def test_a_student_whose_weights_are_away_becomes_a_teacher_and_works_on(dense, chain):
    apt, batch, _ = student()
    earlier = Distiller(apt, "self")
    keep_first(apt, heads=2, neurons=9)
    expected = apt(**batch).logits
    twin = copy.deepcopy(apt)
    apt.compact(dense=dense, chain=chain)
    optimizer = torch.optim.SGD(adapter_parameters(apt), lr=0.0)
    for distiller in (Distiller(apt, "self"), earlier):
        distiller.refresh()
        distiller.refresh()
        torch.testing.assert_close(apt(**batch).logits, expected)
        torch.testing.assert_close(taught(distiller, batch)[0], expected.detach())
        assert passed(apt, distiller, batch).item() == 0
    held = {name: adapter.packing.store.host for name, adapter in adapters(apt)}
    for name, adapter in adapters(distiller.teacher):  # neither a second W nor a second kept part of it
        store = adapter.packing.store
        assert store.host is held[name]
        assert adapter.weight is None or torch.isnan(adapter.weight).all() == store.is_offloaded
    before, stored = taught(distiller, batch), {name: value.clone() for name, value in held.items() if value is not None}

    def same():
        return all(torch.equal(a, b) for a, b in zip(taught(distiller, batch), before, strict=True))

    for model in (apt, twin):
        keep_first(model, heads=1, neurons=5)
    passed(apt, distiller, batch, 0.5).backward()
    optimizer.step()
    torch.testing.assert_close(apt(**batch).logits, twin(**batch).logits)
    assert same(), "masks"
    for _, adapter in adapters(apt):
        adapter.merge_weights()
    assert stored and all(torch.equal(held[name], value) for name, value in stored.items()), "merging"
    for _, adapter in adapters(apt):
        adapter.unmerge_weights()
    assert same(), "merged and unmerged"
    apt.to(torch.float32).to(torch.float64)
    assert same(), "moved"
    apt.compact(False)
    assert same(), "compact(False)"
    apt.cut()
    apt(**batch).loss.backward()
    assert same(), "cut"


def test_growing_within_max_rank_leaves_the_teacher_alone():
    """There the Parameter keeps its memory, so it must not be the teacher's."""
    apt = get_apt_model(FAMILIES["bert"].model(), APTConfig(r=2, max_rank=4)).eval()
    batch = next(with_loss(FAMILIES["bert"], apt))
    distiller = Distiller(apt, "self")
    before = taught(distiller, batch)
    for _, adapter in adapters(apt):
        if adapter.rank:
            adapter.increase_rank(4)
            with torch.no_grad():
                adapter.lora_B.normal_()
    assert all(torch.equal(a, b) for a, b in zip(taught(distiller, batch), before, strict=True))
