"""Which pass an activation belongs to: recomputed ones, several before a backward, copies, threads, and how the padding was told."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from apt_ext import APTConfig, APTModel, get_apt_model
from apt_ext.method import BlockScores, Salience

KINDS = ["heads", "neurons", "hidden"]


def bert(**options: Any) -> APTModel:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "vocab_size": 100}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    stock = FAMILIES["bert"].model(**sizes, **dropout, **options)
    return get_apt_model(stock, APTConfig(r=2, prune=KINDS, density=0.5)).train()


def batch(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 100, (3, 8), generator=generator)
    mask = torch.ones_like(ids)
    for i in range(3):
        mask[i, 7 - (i + seed) % 4 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(0, 2, (3,), generator=generator)}


def heard(run: Callable[[APTModel], object], **options: Any) -> dict[str, Tensor]:
    model = bert(**options)
    salience = BlockScores(model, KINDS, decay=0.0).salience
    run(model)
    salience.update()
    return salience.scores


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, score in expected.items():
        torch.testing.assert_close(got[name], score, rtol=1e-9, atol=0, msg=name)


def one(model: APTModel) -> None:
    model(**batch(0)).loss.backward()


def checkpointed(run: Callable[[APTModel], object], reentrant: bool) -> Callable[[APTModel], object]:
    def with_checkpoints(model: APTModel) -> None:
        model.model.enable_input_require_grads()
        enable = getattr(model.model, "activation_checkpointing_enable", None) or model.model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
        run(model)

    return with_checkpoints


def two_before_a_backward(model: APTModel) -> None:
    (model(**batch(0)).loss + model(**batch(1)).loss).backward()


def two_in_turn(model: APTModel) -> None:
    first, second = model(**batch(0)).loss, model(**batch(1)).loss
    first.backward()
    second.backward()


def an_evaluation_between(model: APTModel) -> None:
    loss = model(**batch(0)).loss
    with torch.no_grad():
        model(**batch(2))
    loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("run", [one, two_before_a_backward, two_in_turn, an_evaluation_between])
def test_a_checkpoint_changes_nothing(run: Callable[[APTModel], object], reentrant: bool) -> None:
    """Post-norm layers: the layer's very input, which the recomputation is given again, is what Q reads."""

    def plain(model: APTModel) -> None:
        model.model.enable_input_require_grads()
        run(model)

    assert_same(heard(checkpointed(run, reentrant)), heard(plain))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_whole_model_in_a_checkpoint(reentrant: bool) -> None:
    def run(model: APTModel) -> None:
        start = torch.zeros((), dtype=torch.float64, requires_grad=True)

        def losses(zero: Tensor, seed: int) -> Tensor:
            return model(**batch(seed)).loss + zero

        first, second = (checkpoint(losses, start, seed, use_reentrant=reentrant) for seed in (0, 1))
        (first + second).backward()

    assert_same(heard(run), heard(two_before_a_backward))


def test_a_graph_that_is_used_twice_counts_twice() -> None:
    def twice(model: APTModel) -> None:
        loss = model(**batch(0)).loss
        loss.backward(retain_graph=True)
        loss.backward()

    for name, score in heard(one).items():
        torch.testing.assert_close(heard(twice)[name], 4 * score, rtol=1e-9, atol=0)


def test_copies_are_not_heard() -> None:
    def run(model: APTModel) -> None:
        loss = model(**batch(0)).loss
        other = copy.deepcopy(model)
        other(**batch(1)).loss.backward()
        other.set_block_mask("0.heads", torch.tensor([1.0, 0, 1, 1]))
        other.cut()
        other(**batch(1)).loss.backward()
        loss.backward()

    assert_same(heard(run), heard(one))


@pytest.mark.parametrize(
    "run",
    [
        lambda model: model(batch(0)["input_ids"], batch(0)["attention_mask"], labels=batch(0)["labels"]),
        lambda model: model.model(**batch(0)),
        lambda model: model.model(batch(0)["input_ids"], batch(0)["attention_mask"], labels=batch(0)["labels"]),
    ],
    ids=["in order", "the model inside", "the model inside, in order"],
)
def test_the_mask_is_seen_however_it_is_given(run: Callable[[APTModel], Any]) -> None:
    assert_same(heard(lambda model: run(model).loss.backward()), heard(one))


def test_activations_of_another_shape_than_the_mask_s_are_named_once() -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        got = heard(two_in_turn, chunk_size_feed_forward=2)
    said = [str(warning.message) for warning in warned]
    assert "Salience: padding counts at site '0.neurons', whose activation is [3, 2, 40] where attention_mask is [3, 8]" in said
    assert len(said) == len(set(said)) == 4  # two layers; and hidden dimensions at each's feed-forward
    expected = heard(two_in_turn)
    heads = [name for name in expected if name.endswith(".heads")]
    assert_same({name: got[name] for name in heads}, {name: expected[name] for name in heads})


def test_threads_keep_their_masks_apart() -> None:
    def in_threads(model: APTModel) -> None:
        ready = threading.Barrier(3)

        def work(seed: int) -> None:
            for repetition in range(4):
                ready.wait()
                model(**batch(10 * repetition + seed)).loss.backward()

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def alone(model: APTModel) -> None:
        for repetition in range(4):
            for seed in range(3):
                model(**batch(10 * repetition + seed)).loss.backward()

    assert_same(heard(in_threads), heard(alone))


class Twins(nn.Module):
    """One node with two results, of which the loss uses one: the other's gradient never comes, and says so."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.used, self.unused = nn.Linear(4, 8), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.up(x).unflatten(-1, (2, 4)).unbind(-2)
        self.unused(second)
        return self.used(first)


def test_an_activation_without_a_gradient_does_not_count() -> None:
    model = Twins()
    salience = Salience(model, {"used": (model.used, 4), "unused": (model.unused, 4)})
    model(torch.randn(2, 4)).sum().backward()
    assert list(salience.sums()) == ["used"]


def test_sites_that_are_none_are_refused() -> None:
    model = Twins()
    for sites, kind, words in (
        ([1], TypeError, "sites"),
        ({"a": model.used}, TypeError, r"sites\['a'\] must be \(the module that reads H, the number of blocks in it\)"),
        ({"a": (None, 4)}, TypeError, r"sites\['a'\] must be"),
        ({"a": (model.used, -1)}, ValueError, r"sites\['a'\]\[1\]"),
        ({"a": (model.used, 1.5)}, TypeError, r"sites\['a'\]\[1\]"),
    ):
        with pytest.raises(kind, match=words):
            Salience(model, sites)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model must be a Module, got NoneType"):
        Salience(None, {})  # type: ignore[arg-type]
    salience = Salience(model, {"a": (model.used, 3)})
    model(torch.randn(2, 4)).sum().backward()
    with pytest.raises(ValueError, match=r"sites\['a'\]: expected a multiple of 3 channels, got 4"):
        salience.update()
    assert salience.scores == {}
    with pytest.raises(TypeError, match="site 'a': expected H as the first positional argument of Linear"):
        model.used(input=torch.randn(2, 4))
