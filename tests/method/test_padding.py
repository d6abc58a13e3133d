"""Where salience learns of padding: at whatever module takes the batch with its mask, the outermost of
those that were called."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn
from torch.nn import functional as F

from apt_ext import APTConfig, APTModel, Controller, adapter_parameters, get_apt_model
from apt_ext.method import BlockScores, Salience

KINDS = ["heads", "neurons", "hidden"]
BY_HAND = "because its layer was called outside of any module that takes the batch"
Call = Callable[[APTModel, dict[str, Tensor]], Tensor]


def built(name: str, **sizes: Any) -> APTModel:
    none = {"t5": ("dropout_rate",), "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob")}.get(name, ())
    stock = FAMILIES[name].model(**dict.fromkeys(none, 0.0), **sizes)
    return get_apt_model(stock, APTConfig(r=2, prune=KINDS, density=0.5)).train()


def batch(name: str, seed: int = 0, pads: int = 0) -> dict[str, Tensor]:
    """Rows of 7 tokens (a decoder's of 5), one of them shorter, and `pads` more columns of padding."""
    generator = torch.Generator().manual_seed(seed)
    given = {}
    for prefix, length in (("", 7), ("decoder_", 5)) if name == "t5" else (("", 7),):
        tokens = torch.randint(2, 50, (3, length), generator=generator)
        mask = torch.ones_like(tokens)
        mask[1, length - 2 - seed :] = 0
        given |= {f"{prefix}input_ids": F.pad(tokens, (0, pads)), f"{prefix}attention_mask": F.pad(mask, (0, pads))}
    return given


def last(out: Any) -> Tensor:
    states = getattr(out, "decoder_hidden_states", None) or out.hidden_states
    return states[-1]


def root(apt: APTModel, given: dict[str, Tensor]) -> Tensor:
    return last(apt(**given, output_hidden_states=True))


def body(apt: APTModel, given: dict[str, Tensor]) -> Tensor:
    """As a chunked loss calls it; of an encoder-decoder the two stacks, each alone."""
    if "decoder_input_ids" not in given:
        return apt.model.base_model(given["input_ids"], given["attention_mask"])[0]
    mask = given["attention_mask"]
    states = apt.model.encoder(given["input_ids"], attention_mask=mask)[0]
    decoder = {"input_ids": given["decoder_input_ids"], "attention_mask": given["decoder_attention_mask"]}
    return apt.model.decoder(**decoder, encoder_hidden_states=states, encoder_attention_mask=mask)[0]


def forward_of_the_root(apt: APTModel, given: dict[str, Tensor]) -> Tensor:
    """Which runs none of the root's hooks."""
    return last(apt.model.forward(**given, output_hidden_states=True))


def counted(states: Tensor, given: dict[str, Tensor]) -> Tensor:
    """A loss that padding is no part of; without it the gradient at padding would still reach salience
    through nothing."""
    mask = given.get("decoder_attention_mask", given["attention_mask"]).bool()
    return states[mask].pow(2).sum()


def heard(name: str, run: Callable[[APTModel], object], **sizes: Any) -> dict[str, Tensor]:
    apt = built(name, **sizes)
    salience = BlockScores(apt, KINDS, decay=0.0).salience
    run(apt)
    salience.update()
    return salience.scores


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys() and got
    for name, score in expected.items():
        torch.testing.assert_close(got[name], score, rtol=1e-8, atol=0, msg=lambda text, at=name: f"{at}: {text}")


@pytest.mark.parametrize("call", [root, body, forward_of_the_root])
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_padding_counts_nowhere_however_the_model_is_called(name: str, call: Call) -> None:
    def run(pads: int, by: Call) -> dict[str, Tensor]:
        given = batch(name, pads=pads)
        return heard(name, lambda apt: counted(by(apt, given), given).backward())

    assert_same(run(9, call), run(0, root))


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpoint", "reentrant checkpoint"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_passes_before_one_backward_keep_their_masks(name: str, reentrant: bool | None) -> None:
    """A model's own pass and two of its body (of one, then of two stacks), recomputed in the order of a
    backward."""
    batches = [batch(name, seed) for seed in range(3)]

    def run(calls: tuple[Call, ...], checkpointed: bool | None) -> dict[str, Tensor]:
        def train(apt: APTModel) -> None:
            apt.model.enable_input_require_grads()
            if checkpointed is not None:
                stock = apt.model
                enable = getattr(stock, "activation_checkpointing_enable", None) or stock.gradient_checkpointing_enable
                enable({"use_reentrant": checkpointed})
            sum(counted(call(apt, given), given) for call, given in zip(calls, batches, strict=True)).backward()

        return heard(name, train)

    assert_same(run((root, body, body), reentrant), run((root, root, root), None))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_an_error_within_a_pass_ends_it(name: str, error: type[BaseException]) -> None:
    given = batch(name)

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise error

    def run(apt: APTModel) -> None:
        reader = [block.reader for block in apt.blocks.values() if block.kind == "neurons"][-1]
        handle = apt.model.get_submodule(reader).register_forward_pre_hook(stop)
        with pytest.raises(error):
            root(apt, batch(name, 2))
        handle.remove()
        if error is KeyboardInterrupt:  # of which torch tells no hook: the next call of the root ends the pass
            root(apt, batch(name, 1))
        counted(body(apt, given), given).backward()

    assert_same(heard(name, run), heard(name, lambda apt: counted(root(apt, given), given).backward()))


def llama_by_hand(apt: APTModel, given: dict[str, Tensor]) -> Tensor:
    model = apt.model.model
    states = model.embed_tokens(given["input_ids"])
    places = torch.arange(states.shape[1])[None]
    for layer in model.layers:
        states = layer(states, position_ids=places, position_embeddings=model.rotary_emb(states, places))
    return model.norm(states)


def bert_by_hand(apt: APTModel, given: dict[str, Tensor]) -> Tensor:
    """Its encoder takes a mask, but not the batch."""
    mask = (given["attention_mask"] != 0)[:, None, None, :]
    return apt.model.bert.encoder(apt.model.bert.embeddings(given["input_ids"]), mask)[0]


@pytest.mark.parametrize(("name", "call"), [("llama", llama_by_hand), ("bert", bert_by_hand)])
def test_layers_called_by_hand_are_said_once(name: str, call: Call) -> None:
    given, apt = batch(name), built(name)
    salience = BlockScores(apt, KINDS).salience
    root(apt, batch(name, 1))  # of another pass, whose mask has the same shape

    def step() -> list[str]:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            call(apt, given).pow(2).sum().backward()
            salience.update()
        return [str(warning.message) for warning in found]

    (said,) = step()
    assert "Salience: all tokens count at site" in said and BY_HAND in said and "attention_mask [batch, length]" in said
    assert step() == []


def test_layers_called_by_hand_count_every_token() -> None:
    given, whole = batch("llama"), batch("llama")
    whole["attention_mask"] = torch.ones_like(whole["attention_mask"])

    def by_hand(apt: APTModel) -> None:
        root(apt, given)  # whose mask is not theirs
        llama_by_hand(apt, given).pow(2).sum().backward()

    with pytest.warns(UserWarning, match=BY_HAND):
        got = heard("llama", by_hand)
    assert_same(got, heard("llama", lambda apt: root(apt, whole).pow(2).sum().backward()))


def causal(given: dict[str, Tensor]) -> Tensor:
    """[batch, 1, length, length], as it is where a model takes a mask of its own making."""
    length = given["input_ids"].shape[1]
    return torch.ones(length, length).tril().bool() & (given["attention_mask"] != 0)[:, None, None, :]


@pytest.mark.parametrize(
    ("name", "mask", "got"),
    [
        ("llama", causal, r"LlamaModel was called with attention_mask of shape \[3, 1, 7, 7\]"),
        ("bert", causal, r"BertModel was called with attention_mask of shape \[3, 1, 7, 7\]"),
        ("llama", lambda given: {"full_attention": causal(given)}, "LlamaModel was called with attention_mask in a dict"),
        ("llama", lambda given: None, None),
    ],
    ids=["llama", "bert", "dict", "None"],
)
def test_a_mask_that_does_not_say_it(name: str, mask: Any, got: str | None) -> None:
    """All tokens count, and that is said where there may be padding; no mask says that there is none."""
    given = batch(name)

    def run(apt: APTModel) -> None:
        if name == "llama" and got and "dict" in got:  # this family takes none: its mask is made before its layers see it
            apt.model.model.forward = _takes_a_dict(apt.model.model.forward)
        apt.model.base_model(given["input_ids"], mask(given))[0].pow(2).sum().backward()

    if got is None:
        scores = heard(name, run)
    else:
        with pytest.warns(UserWarning, match=got):
            scores = heard(name, run)
    assert all(bool(score.any()) for score in scores.values())


def _takes_a_dict(forward: Any) -> Any:
    def taking(input_ids: Tensor, attention_mask: Any) -> Any:
        return forward(input_ids, attention_mask["full_attention"])

    return taking


def test_a_mask_that_the_model_makes_of_its_own_is_no_doubt() -> None:
    """The root takes [batch, length], and gives its body what it made of it."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.reader = nn.Embedding(9, 4), nn.Linear(4, 4)

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.reader(self.table(input_ids))

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Body()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.body(input_ids, attention_mask[:, None, None, :])

    model, ids, mask = Root(), torch.tensor([[1, 2, 3]]), torch.tensor([[1, 1, 0]])
    salience = Salience(model, {"site": (model.body.reader, 4)}, decay=0.0)
    model(ids, mask).pow(2).sum().backward()
    salience.update()
    salience.remove()
    h = model.body.table(ids[:, :2])
    gradient = 2 * model.body.reader(h) @ model.body.reader.weight
    torch.testing.assert_close(salience.scores["site"], h[0].abs().sum(0) * gradient[0].abs().sum(0))


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.reader = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.reader(self.up(pixel_values).tanh())


class Captioner(nn.Module):
    """Images of as many patches as there are tokens, so that no shape says which are which."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.table = Tower(), nn.Embedding(9, 4)
        self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        states = self.before(self.table(input_ids).tanh())
        return self.after((states + self.tower(pixel_values)).tanh())


def test_images_have_no_padding() -> None:
    """Within a model that is given a mask for its tokens, and alone."""
    torch.manual_seed(0)
    model, ids, images = Captioner(), torch.tensor([[1, 2, 3]]), torch.randn(1, 3, 4)
    every, some = torch.ones(1, 3), torch.tensor([[1.0, 1.0, 0.0]])

    def scores(run: Callable[[], Tensor]) -> dict[str, Tensor]:
        names = ("tower.reader", "before", "after")
        salience = Salience(model, {name: (model.get_submodule(name), 4) for name in names}, decay=0.0)
        run().pow(2).sum().backward()
        salience.update()
        salience.remove()
        return salience.scores

    whole, padded = scores(lambda: model(ids, images, every)), scores(lambda: model(ids, images, some))
    assert torch.equal(whole["tower.reader"], padded["tower.reader"])
    assert all(bool((padded[name] < whole[name]).all()) for name in ("before", "after"))
    assert bool(scores(lambda: model.tower(images))["tower.reader"].any())  # and nothing is said


def test_models_that_take_no_mask_have_no_padding() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    salience = Salience(model, {"site": (model[2], 4)})
    model[2](model[1](model[0](torch.randn(2, 5, 3)))).sum().backward()  # by hand, and warned of nothing
    salience.update()
    assert bool(salience.scores["site"].any())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own, after a hook
def test_a_compiled_body() -> None:
    given = batch("llama", pads=3)

    def run(apt: APTModel) -> None:
        compiled = torch.compile(apt.model.model, backend="eager")
        for _ in range(2):
            counted(compiled(**given)[0], given).backward()

    def plain(apt: APTModel) -> None:
        for _ in range(2):
            counted(root(apt, given), given).backward()

    assert_same(heard("llama", run, num_hidden_layers=1), heard("llama", plain, num_hidden_layers=1))


def test_trl_calls_the_body(tmp_path: Any) -> None:
    """Its fused output layer: the scores of a padded batch are those of stock passes over its rows, which
    have no padding."""
    trl = pytest.importorskip("trl")
    pytest.importorskip("datasets")
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "w0", "eos_token": "w1", "unk_token": "w1"}
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(50)}, **{"unk_token": "w1"}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    rows = [[3, 4, 5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15, 16, 17, 18]]

    def listening() -> tuple[APTModel, torch.optim.Optimizer, Controller]:
        apt = get_apt_model(FAMILIES["llama"].model(torch.float32), APTConfig(r=2, density=0.5, round_to=4))
        optimizer = torch.optim.SGD(adapter_parameters(apt), lr=0.0)
        return apt, optimizer, Controller(apt, optimizer, 10, kurtosis=0.0)

    apt, optimizer, controller = listening()
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=3, report_to=[], use_cpu=True, save_strategy="no", bf16=False,
        disable_tqdm=True, activation_checkpointing=False, max_grad_norm=0.0, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        apt, arguments, train_dataset=Dataset.from_dict({"input_ids": rows}), processing_class=tokenizer, optimizers=(optimizer, None)
    )
    trainer.train()
    controller.scores.salience.update()
    plain, _, expected = listening()
    tokens = sum(len(row) - 1 for row in rows)
    for row in rows:
        ids = torch.tensor([row])
        (plain(input_ids=ids, labels=ids).loss * (len(row) - 1) / tokens).backward()
    expected.scores.salience.update()
    for site, score in expected.scores.salience.scores.items():
        torch.testing.assert_close(controller.scores.salience.scores[site], score, rtol=1e-4, atol=0)
