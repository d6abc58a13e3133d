"""get_apt_model and APTModel: wrapping, blocks, copies."""

import copy
import pickle

import pytest
import torch
from families import FAMILIES, adapted
from tiny_bert import DOWN, QUERY, QUERY_VALUE, UP, assert_same, batch, half, snapshot, tiny_bert, trained
from torch import nn

from apt_ext.adapter.layer import APTAdapter
from apt_ext.config import APTConfig
from apt_ext.exporting.shrinking import shrink
from apt_ext.model import APTModel, adapter_parameters, adapters, get_apt_model

transformers = pytest.importorskip("transformers")


# -- wrapping ------------------------------------------------------------------------------------------------------------


def test_wrapped_model_computes_the_same_and_trains_only_what_it_should():
    model = tiny_bert()
    expected = model(**batch()).logits
    apt = get_apt_model(model, QUERY_VALUE)
    assert torch.allclose(apt(**batch()).logits, expected, rtol=0, atol=1e-12)
    ranks = {name: adapter.rank for name, adapter in adapters(apt)}
    layers = [f"bert.encoder.layer.{i}" for i in range(2)]
    carriers = {"attention.self.key": 0, "attention.output.dense": 0, "intermediate.dense": 0, "output.dense": 0}
    rest = {"attention.self.query": 4, "attention.self.value": 4, **carriers}
    assert ranks == {f"{layer}.{name}": rank for layer in layers for name, rank in rest.items()}
    trainable = {name for name, p in apt.named_parameters() if p.requires_grad and p.numel()}
    factors = {f"model.{name}.{factor}" for name, rank in ranks.items() if rank for factor in ("lora_A", "lora_B")}
    assert trainable == factors | {"model.classifier.weight", "model.classifier.bias"}
    assert {id(p) for p in adapter_parameters(apt)} == {id(dict(apt.named_parameters())[name]) for name in trainable}
    apt(**batch()).loss.backward()
    assert all(p.grad is not None for p in adapter_parameters(apt))
    assert apt.get_submodule("model.bert.pooler.dense").weight.grad is None


def test_one_step_with_every_trainable_parameter_in_one_fused_optimizer():
    apt = get_apt_model(tiny_bert(dtype=torch.float32), QUERY_VALUE)
    optimizer = torch.optim.AdamW([p for p in apt.parameters() if p.requires_grad], lr=1e-2, fused=True)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = apt(**batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_rank_scaling_dropout_and_reserved_rank_come_from_the_config():
    config = APTConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.25,
        target_modules=["query", "key"],
        max_rank=64,
        rank_pattern={"key": 2},
        alpha_pattern={"key": 6},
    )
    found = dict(adapters(get_apt_model(tiny_bert(), config)))
    query, key, up = found[QUERY], found[QUERY.replace("query", "key")], found[UP]
    assert (query.rank, query.scaling, query.dropout, query.max_rank) == (4, 2.0, 0.25, 32)
    assert (key.rank, key.scaling) == (2, 3.0)
    assert (up.rank, up.max_rank) == (0, None)


def test_all_linear_leaves_out_the_head_and_the_output_layer():
    names = [name for name, adapter in adapters(get_apt_model(tiny_bert(), APTConfig(r=2))) if adapter.rank]
    assert len(names) == 2 * 6 + 1 and "bert.pooler.dense" in names and "classifier" not in names
    masked_lm = get_apt_model(tiny_bert("BertForMaskedLM"), APTConfig(r=2))
    names = [name for name, _ in adapters(masked_lm)]
    assert "cls.predictions.decoder" not in names and "cls.predictions.transform.dense" in names


@pytest.mark.parametrize(
    ("kind", "head"), [("BertModel", None), ("BertForTokenClassification", "classifier"), ("BertForQuestionAnswering", "qa_outputs")]
)
def test_the_task_head_is_detected(kind, head):
    extra = {"num_labels": 2} if head == "qa_outputs" else {}
    apt = get_apt_model(tiny_bert(kind, **extra), QUERY_VALUE)
    assert apt.saved == ([head] if head else [])
    assert list(apt.blocks) == ["0.heads", "0.neurons", "1.heads", "1.neurons", "hidden"]
    assert {name for name, p in apt.named_parameters() if p.requires_grad and "lora" not in name} == (
        {f"model.{head}.weight", f"model.{head}.bias"} if head else set()
    )


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("bert", ["SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice"]),
        ("roberta", ["SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice"]),
        ("distilbert", ["SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice"]),
        ("llama", ["SequenceClassification", "TokenClassification", "QuestionAnswering"]),
        ("gemma", ["SequenceClassification", "TokenClassification"]),
        ("gpt2", ["SequenceClassification", "TokenClassification", "QuestionAnswering", "DoubleHeads"]),
        ("t5", ["SequenceClassification", "QuestionAnswering"]),
    ],
)
def test_whatever_stock_classes_draw_anew_trains(name, heads, tmp_path):
    """A head that no checkpoint of the bare model holds: frozen, it would stay what it was drawn as."""
    base = getattr(transformers, FAMILIES[name].kind.split("For")[0].removesuffix("LMHeadModel") + "Model")
    base(FAMILIES[name].model().config).save_pretrained(tmp_path)
    for head in heads:
        kind = base.__name__.removesuffix("Model") + (f"For{head}" if head != "DoubleHeads" else "DoubleHeadsModel")
        more = {"num_labels": 2} if head == "QuestionAnswering" else {}
        model, info = getattr(transformers, kind).from_pretrained(tmp_path, output_loading_info=True, **more)
        apt = get_apt_model(model, APTConfig(r=2))
        trains = {key.removeprefix("model.") for key, p in apt.named_parameters() if p.requires_grad and "lora_" not in key}
        assert info["missing_keys"] and set(info["missing_keys"]) == trains, kind


def test_modules_to_save_replaces_detection():
    apt = get_apt_model(tiny_bert(), APTConfig(target_modules=["query"], modules_to_save=["pooler"]))
    assert apt.saved == ["bert.pooler"]
    assert apt.bert.pooler.dense.weight.requires_grad and not apt.classifier.weight.requires_grad
    none = get_apt_model(tiny_bert(), APTConfig(target_modules=["query", "classifier"], modules_to_save=[], rank_pattern={"classifier": 2}))
    assert none.saved == [] and isinstance(none.classifier, APTAdapter)


def test_a_model_outside_the_table_has_adapters_and_no_blocks():
    apt = get_apt_model(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), APTConfig(r=2, target_modules=["0"]))
    assert [name for name, _ in adapters(apt)] == ["0"] and apt.blocks == {}
    with pytest.raises(ValueError, match="not in the table"):
        apt.set_block_mask("0.neurons", torch.ones(6))


def quantised(model):
    class Linear4bit(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    model.bert.encoder.layer[1].attention.self.value = Linear4bit(32, 32)


def not_finite(model):
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.value.weight[0, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "config", "kind", "words"),
    [
        (None, APTConfig(target_modules=["qeury"]), ValueError, "got 'qeury', which matches none; nearest: query"),
        (None, APTConfig(target_modules=["LayerNorm"]), ValueError, "target_modules: .*got 'LayerNorm'"),
        (None, APTConfig(target_modules=["query"], modules_to_save=["clasifier"]), ValueError, "modules_to_save: .*nearest: classifier"),
        (None, APTConfig(r=33, target_modules=["value"]), ValueError, f"^{QUERY.replace('query', 'value')}: rank must be at most .*= 32"),
        (quantised, QUERY_VALUE, TypeError, r"^bert.encoder.layer.1.attention.self.value: .*Linear4bit"),
        (not_finite, QUERY_VALUE, ValueError, r"^bert.encoder.layer.1.attention.self.value: .*finite"),
    ],
)
def test_an_error_names_the_module_and_leaves_the_model_as_it_was(change, config, kind, words):
    model = tiny_bert()
    model.bert.embeddings.requires_grad_(False)
    if change:
        change(model)
    before = snapshot(model)
    with pytest.raises(kind, match=words):
        get_apt_model(model, config)
    after = snapshot(model)
    assert before[:2] == after[:2]
    assert all(torch.equal(value, after[2][name]) or value.isnan().any() for name, value in before[2].items())


def test_a_tied_weight_is_refused_by_name():
    model = tiny_bert("BertForMaskedLM")
    before = snapshot(model)
    with pytest.raises(
        ValueError, match="cls.predictions.decoder is tied: bert.embeddings.word_embeddings.weight = cls.predictions.decoder"
    ):
        get_apt_model(model, APTConfig(target_modules=["query", "decoder"]))
    assert_same(before, snapshot(model))


def test_linears_whose_forward_is_never_called_are_refused():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    for name in ("linear1", "out_proj"):
        with pytest.raises(TypeError, match=f"reads the weight of .*{name} itself"):
            get_apt_model(nn.ModuleDict({"layer": layer}), APTConfig(r=2, target_modules=[name]))


def test_a_second_wrapping_and_wrong_types_are_refused():
    apt = get_apt_model(tiny_bert(), QUERY_VALUE)
    for again in (apt, apt.model):
        with pytest.raises(ValueError, match="model: expected a model without adapters"):
            get_apt_model(again, QUERY_VALUE)
    with pytest.raises(TypeError, match="config: expected an APTConfig, got dict"):
        get_apt_model(tiny_bert(), {"r": 8})
    with pytest.raises(TypeError, match="model: expected an nn.Module, got str"):
        get_apt_model("bert", QUERY_VALUE)


# -- the wrapper ---------------------------------------------------------------------------------------------------------


def test_unknown_attributes_are_the_models():
    model = tiny_bert()
    apt = get_apt_model(model, QUERY_VALUE)
    assert apt.config is model.config and apt.device == torch.device("cpu") and apt.dtype == torch.float64
    with pytest.raises(AttributeError, match="'BertForSequenceClassification' object has no attribute 'nonsense'"):
        _ = apt.nonsense
    assert not hasattr(apt, "__nonsense__")


def test_gradient_checkpointing_gives_the_same_gradients():
    apt = trained(tiny_bert())
    apt(**batch()).loss.backward()
    expected = [p.grad.clone() for p in adapter_parameters(apt)]
    getattr(apt, "activation_checkpointing_enable", apt.model.gradient_checkpointing_enable)()  # its name since transformers 5.23
    apt.train()
    for module in apt.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    apt.config.attention_probs_dropout_prob = 0.0
    apt.zero_grad()
    apt(**batch()).loss.backward()
    for parameter, grad in zip(adapter_parameters(apt), expected, strict=True):
        assert torch.allclose(parameter.grad, grad, rtol=1e-9, atol=1e-12)


def test_generate_is_forwarded():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, is_decoder=True, pad_token_id=0
    )
    torch.manual_seed(0)
    apt = get_apt_model(transformers.BertLMHeadModel(config).eval(), APTConfig(r=2, target_modules=["query"]))
    tokens = apt.generate(input_ids=torch.tensor([[3, 4, 5]]), max_new_tokens=3, do_sample=False)
    assert tokens.shape[1] > 3 and not apt.cls.predictions.decoder.weight.requires_grad


def test_a_models_own_copying_does_not_stand_for_the_wrappers():
    class Own(nn.Sequential):
        def __deepcopy__(self, memo):
            return Own(*copy.deepcopy(list(self), memo))

    apt = get_apt_model(Own(nn.Linear(4, 4)), APTConfig(r=2))
    other = copy.deepcopy(apt)
    assert isinstance(other, APTModel) and type(other.model) is Own and other.model is not apt.model


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_is_complete_and_its_own(way):
    apt = trained(tiny_bert())
    apt.set_block_mask("1.neurons", half())
    expected = apt(**batch()).logits
    other = copy.deepcopy(apt) if way == "deepcopy" else pickle.loads(pickle.dumps(apt))  # noqa: S301
    assert isinstance(other, APTModel) and other.model is not apt.model and other.apt_config == apt.apt_config
    assert torch.equal(other(**batch()).logits, expected)
    other.set_block_mask("1.neurons", torch.zeros(48))
    assert torch.equal(apt.get_block_mask("1.neurons"), half().float()) and torch.equal(apt(**batch()).logits, expected)


def test_names_are_the_same_inside_other_wrappers():
    apt = get_apt_model(tiny_bert(), QUERY_VALUE)
    expected = [name for name, _ in adapters(apt)]
    assert expected[0] == QUERY
    assert [name for name, _ in adapters(apt.model)] == expected
    assert [name for name, _ in adapters(nn.ModuleDict({"module": apt}))] == expected


def test_printed_parameters_are_pefts_line(capsys):
    apt = get_apt_model(tiny_bert(), APTConfig(r=4, target_modules=["query"], max_rank=16))
    factors, head = 2 * 4 * 64, 3 * 32 + 3
    total = sum(p.numel() for p in tiny_bert().parameters()) + factors
    apt.print_trainable_parameters()
    share = 100 * (factors + head) / total
    assert capsys.readouterr().out == f"trainable params: {factors + head:,d} || all params: {total:,d} || trainable%: {share:.4f}\n"


# -- blocks --------------------------------------------------------------------------------------------------------------


def oracle_ffn(model, mask):
    """Forward of the plain model with FFN neurons of layer 1 multiplied by `mask` once, before the down projection."""
    handle = model.bert.encoder.layer[1].output.dense.register_forward_pre_hook(lambda module, args: (args[0] * mask,))
    try:
        return model(**batch()).logits
    finally:
        handle.remove()


@pytest.mark.parametrize("targets", [["query", "value"], ["intermediate.dense", "output.dense"]], ids=["carriers", "adapters"])
def test_a_fraction_acts_once_and_zeros_on_both_sides(targets):
    model = tiny_bert()
    mask = torch.rand(48, generator=torch.Generator().manual_seed(5)).double().float().double() * (torch.arange(48) % 3 > 0)
    mask = mask.float().double()
    expected = oracle_ffn(model, mask)
    apt = get_apt_model(model, APTConfig(r=4, target_modules=targets))
    block = apt.blocks["1.neurons"]
    assert (block.kind, block.count, block.linears) == ("neurons", 48, (UP, DOWN))
    apt.set_block_mask("1.neurons", mask)
    assert torch.allclose(apt(**batch()).logits, expected, rtol=0, atol=1e-12)
    assert torch.equal(apt.get_block_mask("1.neurons"), mask.float())
    found = dict(adapters(apt))
    assert torch.equal(found[UP].mask_out, (mask != 0).float()) and torch.equal(found[DOWN].mask_in, mask.float())
    assert bool((found[UP].mask_in == 1).all()) and bool((found[DOWN].mask_out == 1).all())
    assert bool((apt.get_block_mask("0.neurons") == 1).all())
    apt.get_block_mask("1.neurons").zero_()  # a copy
    assert torch.equal(apt.get_block_mask("1.neurons"), mask.float())
    apt.set_block_mask("1.neurons", torch.ones(48))
    assert torch.allclose(apt(**batch()).logits, model(**batch()).logits)


@pytest.mark.parametrize(
    ("name", "mask", "kind", "words"),
    [
        ("2.neurons", torch.ones(48), ValueError, "got '2.neurons'; nearest: "),
        ("1.neurons", torch.ones(47), ValueError, r"mask of block '1.neurons' must have shape \[48\], got \[47\]"),
        ("1.neurons", torch.full((48,), 1.5), ValueError, r"mask of block '1.neurons' must hold values in \[0, 1\]"),
        ("1.neurons", torch.full((48,), float("nan")), ValueError, r"values in \[0, 1\]"),
        ("1.neurons", torch.ones(48, dtype=torch.bool), TypeError, "must be floating"),
        ("1.neurons", [1.0] * 48, TypeError, "must be a Tensor, got list"),
    ],
)
def test_a_refused_mask_changes_nothing(name, mask, kind, words):
    apt = get_apt_model(tiny_bert(), QUERY_VALUE)
    apt.set_block_mask("1.neurons", half())
    before = snapshot(apt)
    with pytest.raises(kind, match=words):
        apt.set_block_mask(name, mask)
    assert_same(before, snapshot(apt))
    with pytest.raises(ValueError, match="nearest: "):
        apt.get_block_mask("1.neurosn")


def test_no_side_of_a_block_changes_while_one_is_merged():
    apt = get_apt_model(tiny_bert(), QUERY_VALUE)
    dict(adapters(apt))[DOWN].merge_weights()
    before = snapshot(apt)
    with pytest.raises(RuntimeError, match=f"{DOWN} of block '1.neurons' is merged"):
        apt.set_block_mask("1.neurons", half())
    assert_same(before, snapshot(apt))


def test_a_saved_linear_in_a_block_trains_whole_behind_the_masks():
    config = APTConfig(r=4, target_modules=["query"], modules_to_save=["layer.1.intermediate", "layer.1.output.dense"])
    model = tiny_bert()
    plain = copy.deepcopy(model)
    apt = get_apt_model(model, config)
    mask = half() * 0.5
    apt.set_block_mask("1.neurons", mask)
    assert torch.allclose(apt(**batch()).logits, oracle_ffn(plain, mask), rtol=0, atol=1e-12)
    apt(**batch()).loss.backward()
    up, down = dict(adapters(apt))[UP], dict(adapters(apt))[DOWN]
    assert up.weight.requires_grad and up.bias.requires_grad and down.weight.requires_grad
    kept = mask != 0
    assert bool((up.weight.grad[~kept] == 0).all()) and bool((up.weight.grad[kept] != 0).any())
    assert bool((down.weight.grad[:, ~kept] == 0).all()) and bool((down.weight.grad[:, kept] != 0).any())
    assert any(parameter is up.weight for parameter in adapter_parameters(apt))
    with pytest.raises(ValueError, match="new_rank"):
        up.increase_rank(2)


# -- the base model ------------------------------------------------------------------------------------------------------


def test_disable_adapter_is_the_base_model_and_comes_back():
    model = tiny_bert()
    expected = model(**batch()).logits
    apt = trained(model)
    apt.set_block_mask("1.neurons", half())
    on = apt(**batch()).logits
    dict(adapters(apt))[QUERY].merge_weights()
    merged = apt(**batch()).logits
    with apt.disable_adapter():
        assert torch.equal(apt(**batch()).logits, expected)
        with apt.disable_adapter():
            pass
        assert torch.equal(apt(**batch()).logits, expected)
    assert torch.equal(apt(**batch()).logits, merged) and torch.allclose(merged, on, rtol=0, atol=1e-12)
    assert [name for name, adapter in adapters(apt) if adapter.merged] == [QUERY]
    with pytest.raises(KeyError), apt.disable_adapter():
        raise KeyError
    assert torch.equal(apt(**batch()).logits, merged)


def test_merge_and_unload_gives_the_plain_model_with_the_same_function():
    model = tiny_bert()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    apt = trained(model)
    apt.set_block_mask("1.neurons", half() * 0.5)
    expected = apt(**batch()).logits
    plain = apt.merge_and_unload()
    assert plain is model and not list(adapters(plain)) and apt.blocks == {}
    assert {name: p.shape for name, p in plain.named_parameters()} == shapes
    assert torch.allclose(plain(**batch()).logits, expected, rtol=0, atol=1e-12)
    # an ordinary model again, which can be wrapped and merged anew
    again = trained(plain)
    expected = again(**batch()).logits
    assert torch.allclose(again.merge_and_unload()(**batch()).logits, expected, rtol=0, atol=1e-12)


def test_merge_and_unload_that_fails_leaves_everything():
    apt = trained(tiny_bert())
    last = [adapter for _, adapter in adapters(apt) if adapter.rank][-1]
    with torch.no_grad():
        last.lora_B[0, 0] = float("inf")
    before = snapshot(apt)
    with pytest.raises(RuntimeError, match=r"^bert.encoder.layer.1.attention.self.value: .*finite"):
        apt.merge_and_unload()
    assert not any(adapter.merged for _, adapter in adapters(apt))
    assert_same(before, snapshot(apt))


def test_blocks_may_be_set_to_some_of_them():
    """A plain dict, as copies of them and comprehensions are."""
    for call in (lambda apt: apt.cut(), shrink, lambda apt: apt.merge_and_unload(), lambda apt: copy.deepcopy(apt).cut()):
        apt = adapted(FAMILIES["bert"])
        row = apt.blocks.row
        apt.blocks = {name: block for name, block in apt.blocks.items() if block.kind == "heads"}
        assert apt.blocks.row is row and {block.kind for block in apt.blocks.values()} == {"heads"}
        with pytest.raises(ValueError, match="name: expected a block of this model, got '0.neurons'"):
            apt.get_block_mask("0.neurons")
        call(apt)
