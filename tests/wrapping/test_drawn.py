"""What from_pretrained drew at random trains whole and is saved, or it is said that no checkpoint holds it."""

import copy
import json

import pytest
import torch
from forged import CONFIG, reseal

from apt_ext import APTConfig, APTModel, adapter_parameters, adapters, get_apt_model, plan

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}
TEXT = {**SIZES, "vocab_size": 40, "max_position_embeddings": 16}
SMALL = {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "initializer_range": 0.2}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
IMAGE = {**SIZES, "image_size": 8, "patch_size": 4, "encoder_stride": 4}
SPEECH = {
    **SIZES,
    "conv_dim": (8,),
    "conv_stride": (4,),
    "conv_kernel": (4,),
    "num_feat_extract_layers": 1,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 40,
    "classifier_proj_size": 12,
}

TOKENS = {"input_ids": torch.arange(2, 12).view(2, 5)}
BOTH = {**TOKENS, "decoder_input_ids": TOKENS["input_ids"]}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 384).view(2, 3, 8, 8)}
SOUND = {"input_values": torch.linspace(-1, 1, 160).view(2, 80).sin()}

MLM_HEAD = ["cls.predictions.bias", "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"]
# what is on the disk, what loads it, its config, an input, what trains whole
CASES = {
    "pooler": ("BertForMaskedLM", "BertForSequenceClassification", TEXT, TOKENS, ["classifier", "bert.pooler.dense"]),
    "bert-mlm": ("BertModel", "BertForMaskedLM", TEXT, TOKENS, MLM_HEAD),
    "distilbert-mlm": (
        "DistilBertModel",
        "DistilBertForMaskedLM",
        SMALL,
        TOKENS,
        ["vocab_transform", "vocab_layer_norm", "vocab_projector.bias"],
    ),
    "vit": ("ViTModel", "ViTForMaskedImageModeling", IMAGE, PIXELS, ["vit.embeddings.mask_token", "decoder.0"]),
    "speech": ("Wav2Vec2Model", "Wav2Vec2ForSequenceClassification", SPEECH, SOUND, ["classifier", "projector"]),
    "ctc": ("Wav2Vec2Model", "Wav2Vec2ForCTC", SPEECH, SOUND, ["lm_head"]),
    "causal": ("LlamaModel", "LlamaForCausalLM", TEXT, TOKENS, ["lm_head"]),
    "loaded": ("BertForMaskedLM", "BertForMaskedLM", TEXT, TOKENS, []),
    "tied": ("T5ForConditionalGeneration", "T5ForConditionalGeneration", T5, BOTH, []),
}


def config_of(kind, sizes):
    stem = kind.split("For")[0].removesuffix("Model")
    return getattr(transformers, f"{stem}Config")(**sizes)


def on_disk(directory, kind, sizes):
    torch.manual_seed(0)
    getattr(transformers, kind)(config_of(kind, sizes)).save_pretrained(directory)
    return directory


def loaded(directory, kind, seed, **more):
    torch.manual_seed(seed)
    return getattr(transformers, kind).from_pretrained(directory, **more).eval()


def first(model, inputs):
    """The first floating output: logits, or an image that was reconstructed."""
    with torch.no_grad():
        found = model(**inputs)
    return found.reconstruction if "reconstruction" in found else found.logits


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "apt_ext"]


def shaken(apt):
    """Every value that trains is another one, as after training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter_parameters(apt):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return apt


@pytest.mark.parametrize("case", CASES)
def test_two_loads_that_drew_other_values_agree_once_the_checkpoint_is_read(case, tmp_path, caplog):
    stored, kind, sizes, inputs, whole = CASES[case]
    on_disk(tmp_path / "base", stored, sizes)
    one, two = (loaded(tmp_path / "base", kind, seed) for seed in (1, 2))
    if case not in ("loaded", "tied"):
        assert not torch.equal(first(one, inputs), first(two, inputs))
    expected = plan(one, APTConfig(r=2))
    apt = shaken(get_apt_model(one, APTConfig(r=2)))
    assert apt.saved == expected.saved == whole
    drawn = [name for name in whole if name != "classifier"]
    assert [all(name in text for name in drawn) for text in said(caplog) if "random" in text] == [True] * bool(drawn)
    assert all(any(name in note for note in expected.notes) for name in drawn)
    trained = {name for name, parameter in apt.named_parameters() if parameter.requires_grad and "lora_" not in name}
    assert trained == {f"model.{name}" for name, _ in one.named_parameters() if any(f"{name}.".startswith(f"{w}.") for w in whole)}
    assert expected.trainable == sum(parameter.numel() for parameter in adapter_parameters(apt))
    assert not [name for name, adapter in adapters(apt) if adapter.rank and name in whole]
    caplog.clear()
    apt.save_pretrained(tmp_path / "adapter")
    again = APTModel.from_pretrained(two, tmp_path / "adapter").eval()
    assert again.saved == whole and again.apt_config == apt.apt_config and said(caplog) == []
    assert torch.equal(first(apt.eval(), inputs), first(again, inputs))


def test_a_layer_that_was_drawn_trains_whole_behind_the_masks(tmp_path, caplog):
    """A checkpoint of one layer, and a config of two: every linear of the second is a target, and lies in a block."""
    on_disk(tmp_path / "base", "BertForSequenceClassification", TEXT)
    one, two = (loaded(tmp_path / "base", "BertForSequenceClassification", seed, num_hidden_layers=2) for seed in (1, 2))
    apt = shaken(
        get_apt_model(one, APTConfig(r=2, target_modules=["query", "layer.1.output.dense"], rank_pattern={"layer.1.output.dense": 1}))
    )
    layer = "bert.encoder.layer.1"
    assert apt.saved[0] == "classifier" and len(apt.saved) == 1 + 8 and all(name.startswith(layer) for name in apt.saved[1:])
    assert {name: adapter.rank for name, adapter in adapters(apt) if layer in name or adapter.rank} == {
        "bert.encoder.layer.0.attention.self.query": 2,
        **{f"{layer}.{name}": 0 for name in ("intermediate.dense", "output.dense", "attention.output.dense")},
        **{f"{layer}.attention.self.{name}": 0 for name in ("query", "key", "value")},
    }
    for name, block in apt.blocks.items():
        if block.kind == "neurons":
            apt.set_block_mask(name, (torch.arange(24) % 3 > 0).float())
    apt(**TOKENS, labels=torch.tensor([0, 1])).loss.backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(apt))
    apt.save_pretrained(tmp_path / "adapter")
    again = APTModel.from_pretrained(two, tmp_path / "adapter").eval()
    assert torch.equal(first(apt.eval(), TOKENS), first(again, TOKENS))


def test_modules_to_save_that_leave_some_out_say_which_stay_random(tmp_path, caplog):
    on_disk(tmp_path / "base", "BertForMaskedLM", TEXT)
    base = loaded(tmp_path / "base", "BertForSequenceClassification", 1)
    apt = get_apt_model(base, APTConfig(r=2, modules_to_save=["classifier"]))
    (text,) = said(caplog)
    assert text.startswith("bert.pooler.dense: ") and "name them in modules_to_save" in text and "save the base model" in text
    assert apt.saved == ["classifier"] and dict(adapters(apt))["bert.pooler.dense"].rank == 2
    caplog.clear()
    for named in (["pooler", "classifier"], ["bert.pooler.dense", "classifier"]):
        base = loaded(tmp_path / "base", "BertForSequenceClassification", 1)
        assert get_apt_model(base, APTConfig(r=2, modules_to_save=named)).saved and said(caplog) == []
    on_disk(tmp_path / "bare", "BertModel", TEXT)
    apt = get_apt_model(loaded(tmp_path / "bare", "BertForMaskedLM", 1), APTConfig(r=2, modules_to_save=[MLM_HEAD[0], "transform"]))
    assert apt.saved == ["cls.predictions.transform", MLM_HEAD[0]] and said(caplog) == []


def test_without_a_report_the_task_head_alone_trains(tmp_path, caplog):
    on_disk(tmp_path / "base", "BertForMaskedLM", TEXT)
    base = loaded(tmp_path / "base", "BertForSequenceClassification", 1)
    made = transformers.BertForSequenceClassification(base.config)
    for model in (made, copy.deepcopy(base)):
        assert get_apt_model(model, APTConfig(r=2)).saved == ["classifier"]
    assert said(caplog) == []


def test_what_is_saved_comes_from_the_checkpoint_and_not_from_the_base(tmp_path, caplog):
    """Checkpoints and bases of which one alone knows a pooler."""
    full, bare = (on_disk(tmp_path / kind, kind, TEXT) for kind in ("BertForSequenceClassification", "BertForMaskedLM"))
    kind = "BertForSequenceClassification"
    with_pooler = shaken(get_apt_model(loaded(bare, kind, 1), APTConfig(r=2)))
    without = shaken(get_apt_model(loaded(full, kind, 1), APTConfig(r=2)))
    for name, apt in (("with", with_pooler), ("without", without)):
        apt.save_pretrained(tmp_path / name)
    caplog.clear()
    again = APTModel.from_pretrained(loaded(full, kind, 2), tmp_path / "with")
    (text,) = said(caplog)  # of the other base, and of nothing that was drawn
    assert again.saved == ["classifier", "bert.pooler.dense"] and text.startswith("from_pretrained: the adapters were trained on")
    caplog.clear()
    assert torch.equal(again.bert.pooler.dense.weight, with_pooler.bert.pooler.dense.weight)
    assert APTModel.from_pretrained(loaded(full, kind, 2), tmp_path / "without").saved == ["classifier"] and said(caplog) == []
    again = APTModel.from_pretrained(loaded(bare, kind, 2), tmp_path / "without")
    (text,) = (text for text in said(caplog) if not text.startswith("from_pretrained: "))
    assert again.saved == ["classifier"] and text.startswith("bert.pooler.dense: ")
    # one of an earlier version, which does not say what it holds
    values = json.loads((tmp_path / "without" / CONFIG).read_text())
    assert values.pop("saved") == ["classifier"]
    (tmp_path / "without" / CONFIG).write_text(json.dumps(values))
    reseal(tmp_path / "without")
    assert APTModel.from_pretrained(loaded(bare, kind, 2), tmp_path / "without").saved == ["classifier"]


@pytest.mark.parametrize("saved", ["classifier", [1], [""], {"classifier": 1}, ["classifier", "bert.poler"], ["a..b"]], ids=str)
def test_a_checkpoint_that_names_what_is_not_there_is_refused(saved, tmp_path):
    model = transformers.BertForSequenceClassification(config_of("BertModel", TEXT))
    get_apt_model(model, APTConfig(r=2)).save_pretrained(tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**values, "saved": saved}))
    reseal(tmp_path)
    other = transformers.BertForSequenceClassification(model.config)
    with pytest.raises(ValueError, match=rf'{tmp_path}/{CONFIG}: .*"saved"'):
        APTModel.from_pretrained(other, tmp_path)
    assert not list(adapters(other)) and all(parameter.requires_grad for parameter in other.parameters())


def test_a_head_that_was_drawn_is_still_no_target(tmp_path):
    on_disk(tmp_path / "base", "BertForMaskedLM", TEXT)
    base = loaded(tmp_path / "base", "BertForSequenceClassification", 1)
    with pytest.raises(ValueError, match="matches only classifier of modules_to_save"):
        get_apt_model(base, APTConfig(target_modules=["query", "classifier"]))


def test_a_lone_parameter_is_saved_behind_a_carrier_of_masks(tmp_path):
    """vocab_projector shares the embedding's weight, so its bias trains alone; masks of hidden dimensions wrap the linear."""
    on_disk(tmp_path / "base", "DistilBertModel", SMALL)
    one, two = (loaded(tmp_path / "base", "DistilBertForMaskedLM", seed) for seed in (1, 2))
    apt = shaken(get_apt_model(one, APTConfig(r=2)))
    apt.set_block_mask("hidden", (torch.arange(16) != 3).float())
    apt.save_pretrained(tmp_path / "adapter")
    again = APTModel.from_pretrained(two, tmp_path / "adapter").eval()
    assert torch.equal(first(apt.eval(), TOKENS), first(again, TOKENS)) and bool(one.vocab_projector.bias.detach().any())


def test_a_body_within_a_users_own_module(tmp_path):
    on_disk(tmp_path / "base", "BertModel", TEXT)

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = loaded(tmp_path / "base", "BertModel", 1)
            self.scorer = torch.nn.Linear(16, 3)

    assert get_apt_model(Own(), APTConfig(r=2)).saved == ["scorer"]


def test_a_head_of_another_size_counts_as_drawn(tmp_path, caplog):
    on_disk(tmp_path / "base", "BertForMaskedLM", TEXT)
    base = loaded(tmp_path / "base", "BertForMaskedLM", 1, vocab_size=44, ignore_mismatched_sizes=True)
    apt = get_apt_model(base, APTConfig(r=2))
    assert apt.saved == ["bert.embeddings.word_embeddings", "cls.predictions.bias"] and len(said(caplog)) == 1
