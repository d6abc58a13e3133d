"""Which directory can say which sizes, and the words of a refusal; every stock directory computes what the cut model does."""

import copy
import json

import pytest
import torch
from cases import crossed
from families import EMPTY_HEADS, EVERY, FAMILIES, ONE_EACH, adapted, close, keep_first, mask_all, outputs, some, tolerance
from safetensors.torch import load_file, save_file

from apt_ext import APTConfig, export, get_apt_model, load_export, shrink
from apt_ext.storage import atomic_dir
from apt_ext.storage.per_layer import MANIFEST

transformers = pytest.importorskip("transformers")


pytestmark = pytest.mark.usefixtures("loaded_here")


def loaded(directory):
    kind = json.loads((directory / "config.json").read_text())["architectures"][0]
    return getattr(transformers, kind).from_pretrained(directory, dtype="auto")


# BERT, GPT-2 and DistilBERT make heads of hidden_size / heads channels; LLaMA's heads must divide it
PAIRS = {"bert": (2, 16), "roberta": (2, 16), "distilbert": (2, 16), "gpt2": (2, 16)}


@pytest.mark.parametrize(
    ("name", "dtype"),
    crossed(FAMILIES, (torch.float64, torch.float32, torch.bfloat16), daily=lambda name, dtype: dtype == torch.float64 or name in ONE_EACH),
)
def test_uniform_widths_are_a_stock_directory(name, dtype, tmp_path):
    family = FAMILIES[name]
    apt = adapted(family, dtype=dtype)
    keep_first(apt, heads=2, hidden=16, neurons=7)
    if family.sizes.get("num_key_value_heads") == 1:
        keep_first(apt, heads=1, hidden=18)
    assert export(apt, tmp_path / "small") == family.kind
    small, again = shrink(apt), loaded(tmp_path / "small")
    assert type(again) is type(small) and next(again.parameters()).dtype == dtype
    close(
        outputs(copy.deepcopy(again), family.inputs()),
        outputs(small, family.inputs()),
        {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 5e-2),
    )
    if dtype == torch.float64:
        close(outputs(again, family.inputs()), outputs(apt, family.inputs()), tolerance(family, ("hidden",)))
    config = again.config
    assert config.hidden_size in (16, 18) and getattr(config, "generation_config", None) is None
    assert [file.name for file in tmp_path.iterdir()] == ["small"]
    assert again.can_generate() is False or (tmp_path / "small" / "generation_config.json").is_file()


REFUSALS = [
    (
        "bert",
        {"heads": 2},
        "BertConfig makes heads of hidden_size / num_attention_heads channels, got 2 heads of 8 channels in a hidden_size",
    ),
    ("bert", {"heads": 2}, " of 24; 3 heads in every layer or hidden_size 16 with these heads would pass"),
    ("gpt2", {"hidden": 20}, "GPT2Config makes heads of .*got 3 heads of 8 channels in a hidden_size of 20; hidden_size 24 with these"),
    ("distilbert", {"heads": 1}, "DistilBertConfig makes heads"),
    (
        "llama-bias",
        {"hidden": 16},
        "num_attention_heads of LlamaConfig must divide hidden_size, got 6 and 16; nor can another class say it: ",
    ),
    ("llama-bias", {"hidden": 16}, "mistral models have no attention bias; mistral models have no mlp bias"),
    pytest.param(
        "roberta",
        {"heads": 0},
        "num_attention_heads of RobertaConfig cannot be 0; one head in every layer would pass",
        marks=EMPTY_HEADS,
    ),
    ("t5", {"neurons": 0}, "T5ForConditionalGeneration cannot be made with these sizes: ZeroDivisionError"),
]


@pytest.mark.parametrize(("name", "counts", "words"), REFUSALS)
def test_a_refusal_says_the_constraint_and_what_would_pass(name, counts, words, tmp_path):
    apt = keep_first(adapted(FAMILIES[name]), **counts)
    with pytest.raises(ValueError, match=words):
        export(apt, tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_stack_that_shares_a_position_bias_is_written_with_its_heads_alike_or_not_at_all(per_layer, tmp_path):
    apt = adapted(FAMILIES["t5"])
    apt.set_block_mask("decoder.1.heads", torch.tensor([1.0, 0, 1]))
    with pytest.raises(ValueError, match=r"decoder.1.heads: expected the same heads of decoder.0.heads, because .* one position bias"):
        export(apt, tmp_path / "small", per_layer=per_layer)
    assert list(tmp_path.iterdir()) == []
    apt.set_block_mask("decoder.0.heads", torch.tensor([1.0, 0, 1]))
    with pytest.raises(ValueError, match="one width for all layers is all that num_heads|num_attention_heads of T5Config can say"):
        export(apt, tmp_path / "small")
    assert export(apt, tmp_path / "small", per_layer=True) == "apt_ext.load_export"
    close(outputs(load_export(tmp_path / "small"), FAMILIES["t5"].inputs()), outputs(apt, FAMILIES["t5"].inputs()))


def test_llama_is_written_as_mistral_where_only_that_can_say_it(tmp_path):
    family = FAMILIES["llama"]
    apt = keep_first(adapted(family), hidden=16)  # 6 heads do not divide 16
    assert export(apt, tmp_path / "small") == "MistralForCausalLM"
    again = loaded(tmp_path / "small")
    assert type(again) is transformers.MistralForCausalLM
    assert (again.config.sliding_window, again.config.head_dim, again.config.num_attention_heads) == (None, 4, 6)
    close(outputs(again, family.inputs()), outputs(apt, family.inputs()))
    assert type(shrink(apt)) is transformers.LlamaForCausalLM


@EVERY
def test_widths_of_their_own_need_our_loader(family, tmp_path):
    apt = adapted(family)
    every = ("heads", "neurons", "hidden")
    masks = some(family, apt.blocks, every, "soft")
    mask_all(apt, masks)
    with pytest.raises(ValueError, match="per_layer=True"):
        export(apt, tmp_path / "small")
    assert export(apt, tmp_path / "small", per_layer=True) == "apt_ext.load_export"
    small, again = shrink(apt), load_export(tmp_path / "small")
    of_files = {"dtype": None, "architectures": None}
    assert type(again) is type(small) and again.config.to_dict() | of_files == small.config.to_dict() | of_files
    close(outputs(again, family.inputs()), outputs(small, family.inputs()), 1e-12)
    for ignoring in (False, True):
        with pytest.raises(OSError, match="no file named model.safetensors"):
            type(small).from_pretrained(tmp_path / "small", ignore_mismatched_sizes=ignoring)
    more = get_apt_model(again, APTConfig(r=1, target_modules=r".*\.(query|q_lin|q_proj|c_attn|q)"))
    assert {name: block.count for name, block in more.blocks.items()} == {name: int((mask != 0).sum()) for name, mask in masks.items()}


@EMPTY_HEADS
def test_empty_layers_and_ties_come_back_through_our_loader(tmp_path):
    family = FAMILIES["llama-tied"]
    apt = adapted(family)
    mask_all(apt, {"1.heads": torch.zeros(6), "0.neurons": torch.zeros(20), "hidden": torch.linspace(0, 1, 24)})
    export(apt, tmp_path / "small", per_layer=True)
    again = load_export(tmp_path / "small")
    assert again.lm_head.weight is again.model.embed_tokens.weight and again.model.layers[1].self_attn.q_proj.out_features == 0
    close(outputs(again, family.inputs()), outputs(apt, family.inputs()))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "expected it and config.json"),
        ("class", "name of a model class"),
        ("more", "of the blocks of this model"),
        ("negative", "to be numbers"),
        ("tensors", "safetensors header"),
        ("fewer", r"missing \['classifier.bias'\]"),
        ("other", r"unknown, .*\['classifier.other'\]"),
        ("json", "Expecting|Unterminated"),
    ],
)
def test_our_loader_trusts_nothing(tmp_path, damage, words):
    export(
        mask_all(apt := adapted(FAMILIES["bert"]), some(FAMILIES["bert"], apt.blocks, ("neurons",), "hard")), tmp_path / "a", per_layer=True
    )
    file = tmp_path / "a" / "apt_widths.json"
    said = json.loads(file.read_text())
    if damage == "missing":
        file.unlink()
    elif damage == "class":
        file.write_text(json.dumps({**said, "class": "AutoTokenizer"}))
    elif damage == "tensors":
        (tmp_path / "a" / "apt_weights.safetensors").write_bytes(b"\0" * 100)
    elif damage in ("fewer", "other"):
        tensors = load_file(tmp_path / "a" / "apt_weights.safetensors")
        one = tensors.pop("classifier.bias")
        save_file(
            tensors | ({"classifier.other": one, "classifier.bias": one.clone()} if damage == "other" else {}),
            tmp_path / "a" / "apt_weights.safetensors",
        )
    elif damage == "json":
        file.write_text(file.read_text()[:-20])
    else:
        said["widths"]["0.neurons"] = {"more": 21, "negative": -1}[damage]
        file.write_text(json.dumps(said))
    with pytest.raises(ValueError, match=str(tmp_path / "a")):
        load_export(tmp_path / "a")
    (tmp_path / "a" / MANIFEST).unlink()
    atomic_dir.seal(tmp_path / "a", MANIFEST)  # by somebody who means it
    with pytest.raises(ValueError, match=f"{tmp_path / 'a'}.*{words}"):
        load_export(tmp_path / "a")


def test_a_wrong_constant_is_noticed(tmp_path):
    """A T5 of another width reloads bit for bit and computes something else, unless its output scale was folded."""
    small = shrink(keep_first(adapted(FAMILIES["t5"]), hidden=16))
    small.model_dim = 24
    with pytest.raises(ValueError, match="to compute the same from the same tensors, but an output differs by"):
        export(small, tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_large_models_are_sharded_and_carry_their_tokenizer(tmp_path):
    family = FAMILIES["bert"]
    apt = keep_first(adapted(family), neurons=7)
    (tmp_path / "source").mkdir()
    for name in ("tokenizer.json", "vocab.txt", "other.txt"):
        (tmp_path / "source" / name).write_text(name)
    apt.config._name_or_path = str(tmp_path / "source")
    export(apt, tmp_path / "small", max_shard_size="20KB")
    names = {file.name for file in (tmp_path / "small").iterdir()}
    assert "model.safetensors.index.json" in names and {"tokenizer.json", "vocab.txt"} < names and "other.txt" not in names
    close(outputs(loaded(tmp_path / "small"), family.inputs()), outputs(apt, family.inputs()))

    class Tokenizer:
        def save_pretrained(self, directory):
            (directory / "mine.json").write_text("{}")

    export(apt, tmp_path / "other", tokenizer=Tokenizer())
    names = {file.name for file in (tmp_path / "other").iterdir()}
    assert "mine.json" in names and "tokenizer.json" not in names


def test_the_generation_config_is_carried(tmp_path):
    family = FAMILIES["llama"]
    apt = keep_first(adapted(family), neurons=7)
    apt.model.generation_config.max_new_tokens = 17
    export(apt, tmp_path / "small")
    assert loaded(tmp_path / "small").generation_config.max_new_tokens == 17


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_torch_export_of_the_result(name):
    family = FAMILIES[name]
    apt = adapted(family, dtype=torch.float32)
    small = shrink(mask_all(apt, some(family, apt.blocks, ("heads", "neurons", "hidden"), "hard")))
    small.config.use_cache = False
    inputs = {"input_ids": family.inputs()["input_ids"]}
    program = torch.export.export(small, (), inputs)
    close([program.module()(**inputs).logits], [small(**inputs).logits], 1e-4)
