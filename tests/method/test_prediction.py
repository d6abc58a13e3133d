"""Predicted steps: layers keep what autograd saves, a cut leaves what it says, and what is unknown is said."""

import json

import pytest
import torch
from families import FAMILIES, adapted, keep_first

import apt_ext
from apt_ext import APTConfig, adapter_parameters, get_apt_model, plan, shrink
from apt_ext.method.prediction.layers import family_of, widths_of
from apt_ext.method.prediction.rates import KEYS, known, rates_of
from apt_ext.tools.cli import main
from apt_ext.wrapping.build import match

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # a CPU keeps other masks than CUDA
# {model type: (class, config, its sizes, bytes that are kept once beside what a token keeps)}
KEEPING = {
    "bert": ("BertForSequenceClassification", "BertConfig", SIZES | QUIET, 0),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_heads": 4, "dropout": 0.0, "attention_dropout": 0.0},
        0,
    ),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 8}, 2 * 4 * 32),  # 1 + weight of two norms
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, 0),
    "llama, heads apart": ("LlamaForCausalLM", "LlamaConfig", {**SIZES, "num_key_value_heads": 4}, 0),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED, 0),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED, 0),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 8}, 0),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {**SIZES, **QUIET, "max_position_embeddings": 40}, 0),
}


def stock(name, layers):
    kind, config, sizes, _ = KEEPING[name]
    counted = {"n_layers": layers} if name == "distilbert" else {"num_hidden_layers": layers}
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**sizes, **counted, pad_token_id=0))


def saved_bytes(model, tokens):
    """What autograd keeps of a forward pass, each memory once, Parameters and buffers apart."""
    held = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    found = {}

    def pack(value):
        memory = value.untyped_storage()
        if memory.data_ptr() not in held:
            found[memory.data_ptr()] = (memory.nbytes(), value)  # held, so that no other takes its address
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        model(input_ids=tokens)
        return sum(size for size, _ in found.values())


@pytest.mark.parametrize("name", KEEPING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_what_a_layer_keeps_is_what_autograd_saves(name, dtype):
    tokens = torch.randint(2, 60, (2, 16))
    models = [get_apt_model(stock(name, layers).to(dtype), APTConfig(r=4)).train() for layers in (2, 3)]
    two, three = (saved_bytes(model, tokens) for model in models)
    model = stock(name, 3).to(dtype)
    found = match(model, APTConfig(r=4))
    last = widths_of(model, found.blocks, found.ranks, {})[-1]
    size = torch.finfo(dtype).bits // 8
    kept = family_of(model, found.blocks).work(last, size, False).kept + sum(size * linear.rank for linear in last.linears)
    missing = three - two - KEEPING[name][3] - tokens.numel() * kept
    stats = 4 * 4 * tokens.numel() if "bert" in name and dtype is not torch.float32 else 0  # CUDA keeps them in float32
    assert -stats <= missing <= 0


# -- what a cut leaves, and what trains --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "distilbert", "llama", "mistral", "qwen3", "roberta"])
def test_the_step_after_a_cut_is_the_step_of_the_model_that_was_cut(name):
    family = FAMILIES[name]
    keep = {"heads": 1, "neurons": 8, "hidden": 16}
    step = {"batch": 2, "length": 16, "gpus": 1}
    before = plan(family.model(torch.bfloat16), APTConfig(r=2), keep=keep, **step).prediction
    small = shrink(keep_first(get_apt_model(family.model(torch.bfloat16), APTConfig(r=2)), **keep))
    after = plan(small, APTConfig(r=2), **step).prediction
    assert before.target == after.dense and before.dense != before.target
    assert before.target.peak < before.dense.peak and before.target.parts["products"] < before.dense.parts["products"]


@pytest.mark.parametrize("more", [{}, {"float32_factors": True}, {"max_rank": 8}], ids=["plain", "float32", "reserved"])
def test_what_trains_is_what_is_there(more):
    config = APTConfig(r=2, **more)
    found = plan(FAMILIES["llama"].model(torch.bfloat16), config, batch=1, length=8, gpus=1).prediction.dense
    apt = get_apt_model(FAMILIES["llama"].model(torch.bfloat16), config)
    trained = sum(p.numel() * p.element_size() for p in adapter_parameters(apt))
    factors = sum(p.numel() * p.element_size() for _, one in apt_ext.adapters(apt) for p in (one.lora_A, one.lora_B))
    assert found.memory["factors"] == factors
    assert found.memory["gradients and AdamW"] == 3 * trained
    assert found.memory["weights"] == sum(p.numel() * p.element_size() for p in FAMILIES["llama"].model(torch.bfloat16).parameters())


def predicted(batch=2, length=16, **step):
    return plan(FAMILIES["llama"].model(torch.bfloat16), APTConfig(r=2), batch=batch, length=length, **{"gpus": 1} | step).prediction


def test_one_gpu_waits_for_none_and_may_take_a_graph():
    step = predicted().dense
    assert step.seconds.keys() == {"eager", "graph"} and step.fits and not step.refused
    assert step.seconds["graph"] == pytest.approx(sum(step.parts.values()))
    assert step.seconds["eager"] == pytest.approx(step.kernels * rates_of(None).launch)  # a model so small waits for the host
    assert step.peak == sum(step.memory.values())
    assert predicted(sharding="fsdp") == predicted(sharding="ddp") == predicted()


def test_activations_grow_with_the_batch_of_one_gpu_and_nothing_else_does():
    one, two = predicted(batch=1, gpus=2, sharding="ddp").dense, predicted(batch=2, gpus=2, sharding="ddp").dense
    assert two.memory["activations"] == 2 * one.memory["activations"]
    assert one.memory["weights"] == two.memory["weights"] == predicted().dense.memory["weights"]
    assert two.tokens_per_second == pytest.approx(2 * 2 * 16 / two.seconds["eager"])
    assert predicted(batch=2, gpus=4, sharding="ddp").dense.tokens_per_second == pytest.approx(2 * two.tokens_per_second)


def test_ddp_holds_the_model_and_fsdp_a_share_of_it():
    alone, ddp, fsdp = (predicted(**step).dense.memory for step in ({}, {"gpus": 4, "sharding": "ddp"}, {"gpus": 4, "sharding": "fsdp"}))
    for name in ("weights", "factors", "gradients and AdamW"):
        assert ddp[name] == alone[name] and fsdp[name] == pytest.approx(alone[name] / 4, abs=1)
    assert ddp["buckets"] == alone["gradients and AdamW"] // 3 and "gathered" not in ddp
    layers = [layer for layer in FAMILIES["llama"].model(torch.bfloat16).model.layers]
    sizes = [sum(2 * p.numel() for p in layer.parameters()) for layer in layers]
    assert fsdp["gathered"] == 3 * max(sizes) + alone["weights"] - sum(sizes)


def test_what_is_sent_is_beside_the_arithmetic_until_the_wire_is_too_slow():
    def waits(gpus, sharding, **rates):
        return predicted(gpus=gpus, sharding=sharding, rates=rates).dense.parts["waiting for GPUs"]

    assert waits(8, "ddp") == 0.0 < waits(8, "ddp", link=1e6)
    step = predicted().dense
    model = FAMILIES["llama"].model(torch.bfloat16)
    layers = [sum(2 * p.numel() for p in layer.parameters()) for layer in model.model.layers]
    outside, trained = step.memory["weights"] - sum(layers), step.memory["gradients and AdamW"] // 3
    sent = 7 / 8 * (outside + max(layers) + 2 * sum(layers) + trained)  # the first layer, when nothing is computed yet
    assert waits(8, "fsdp", link=1e3) == pytest.approx(sent / 1e3, rel=1e-3)
    copied = 2 * (outside + 2 * sum(layers)) / rates_of(None).bandwidth  # read and written
    assert predicted(gpus=8, sharding="fsdp").dense.parts["copies of gathered weights"] == pytest.approx(copied)
    assert waits(8, "fsdp", network=1e3) == waits(8, "fsdp") < waits(16, "fsdp", network=1e3)  # eight are within a machine
    four = waits(4, "fsdp", network=1e3, gpus_per_node=2)
    assert waits(16, "fsdp", network=1e3) == pytest.approx(four * (15 / 16) / (3 / 4), rel=1e-3)


def test_checkpointing_keeps_inputs_alone_and_computes_again():
    plain, again = predicted(length=64).dense, predicted(length=64, checkpointing=True).dense
    model = FAMILIES["llama"].model()
    assert again.memory["activations"] == 2 * 64 * 2 * model.config.hidden_size * model.config.num_hidden_layers
    assert again.memory["activations"] < plain.memory["activations"] and again.kernels > plain.kernels
    assert again.parts["attention"] > plain.parts["attention"] and again.parts["loss"] == plain.parts["loss"]


def test_liger_keeps_less_and_launches_less():
    plain, fused = predicted().dense, predicted(liger=True).dense
    assert fused.memory["activations"] < plain.memory["activations"] and fused.kernels < plain.kernels
    assert fused.memory["loss or backward of a layer"] < plain.memory["loss or backward of a layer"]


# -- what is not predicted ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_of_an_unknown_family_what_is_known_is_predicted(name):
    found = plan(FAMILIES[name].model(torch.bfloat16), APTConfig(r=2), batch=1, length=8, gpus=1)
    step = found.prediction.dense
    assert step.peak is None and step.fits is None and not step.seconds and not step.parts and "activations" not in step.memory
    assert step.memory["weights"] == found.dense.bytes
    assert found.prediction.notes == [
        f"activations and time are not predicted: nothing is known of what layers of {name} keep; known are llama, mistral, qwen2, qwen3, "
        "gemma, bert, roberta, xlm-roberta, distilbert"
    ]
    assert "unknown" in str(found.prediction) and found.prediction.notes[0] in str(found)


def test_other_layers_of_a_known_family_are_unknown():
    def notes(**more):
        config = transformers.BertConfig(**{**FAMILIES["bert-decoder"].sizes, **more})
        return plan(transformers.BertLMHeadModel(config), APTConfig(r=2), batch=1, length=8, gpus=1).prediction.notes[0]

    assert "nothing is known of what bert.encoder.layer.0.crossattention" in notes(is_decoder=True, add_cross_attention=True)
    assert "what the activation gelu_new keeps" in notes(hidden_act="gelu_new")
    assert "eager attention keeps its weights" in notes(attn_implementation="eager")
    assert notes().startswith("time is not predicted")  # and nothing else


def test_rates_are_of_16_bit_weights():
    found = plan(FAMILIES["llama"].model(torch.float32), APTConfig(r=2), batch=1, length=8, gpus=1).prediction
    assert found.dense.peak and not found.dense.seconds and not found.dense.parts
    assert found.notes == ["time is not predicted: expected 16-bit weights, which the rates are of, got float32; plan it in bfloat16"]
    assert found.notes[0] in str(found) and "tokens a second" in str(found)
    assert plan(FAMILIES["llama"].model(torch.float16), APTConfig(r=2), batch=1, length=8, gpus=1).prediction.dense.seconds


def test_what_the_numbers_leave_out_is_said():
    notes = predicted(gpus=2, sharding="fsdp").notes
    assert notes[0].startswith("under fsdp a model is not cut while it trains") and "no run of several GPUs has checked it" in notes[1]
    model = FAMILIES["llama"].model(torch.bfloat16)
    dropped = plan(model, APTConfig(r=2, lora_dropout=0.1), batch=1, length=8, gpus=1).prediction
    assert dropped.notes == ["the dropout of adapters is not in the prediction"]
    assert plan(model, APTConfig(r=2)).prediction is None


def test_what_does_not_fit_is_refused_in_words():
    model = FAMILIES["llama"].model(torch.bfloat16)
    held = predicted(gpus=2, sharding="ddp").dense
    weights, activations = held.memory["weights"], held.memory["activations"]

    def words(memory, batch=2, **step):
        step = {"gpus": 2, "sharding": "ddp"} | step
        found = plan(model, APTConfig(r=2), batch=batch, length=16, rates={"memory": memory, "workspace": 1}, **step).prediction.dense
        assert not found.fits and not found.seconds and found.tokens_per_second is None
        return found.refused

    assert words(weights).startswith("ddp: expected at most 0.0 GiB a GPU, got 0.0 GiB, of which ")
    assert words(weights).endswith("no batch is small enough; fsdp shards the weights over GPUs")
    assert words(weights // 2, sharding="fsdp").endswith("no batch is small enough; more GPUs hold less each")
    assert words(weights, gpus=1, sharding=None).startswith("one GPU: ")
    much = 4 * weights + activations
    assert "of which activations take" in words(much, batch=64)
    assert words(much, batch=64).endswith("a smaller batch, or gradient checkpointing, keeps less")
    assert words(much, batch=1024, checkpointing=True).endswith("a smaller batch keeps less")
    unknown = plan(FAMILIES["gpt2"].model(torch.bfloat16), APTConfig(r=2), batch=1, length=8, gpus=1, rates={"memory": 1e7})
    assert unknown.prediction.dense.fits is False and "of which library take 0.0; no batch is small enough" in str(unknown)


@pytest.mark.parametrize(
    ("step", "kind", "words"),
    [
        ({"gpus": 0}, ValueError, "gpus must be at least 1, got 0"),
        ({"gpus": 2.0}, TypeError, "gpus must be an int, got float"),
        ({"gpus": True}, TypeError, "gpus must be an int, got bool"),
        ({"gpus": 2}, ValueError, "sharding: expected 'ddp' or 'fsdp' with 2 GPUs, got None"),
        ({"gpus": 2, "sharding": "zero"}, ValueError, "sharding: expected 'ddp' or 'fsdp', got 'zero'"),
        ({"gpus": 1, "batch": None}, ValueError, "batch: expected the sequences of one GPU a step with gpus, got None"),
        ({"gpus": 1, "batch": 0}, ValueError, "batch must be at least 1, got 0"),
        ({"sharding": "ddp"}, ValueError, "gpus: expected how many GPUs with sharding, got None"),
        ({"liger": True}, ValueError, "gpus: expected how many GPUs with liger, got None"),
        ({"checkpointing": True}, ValueError, "gpus: expected how many GPUs with checkpointing, got None"),
        ({"rates": "H100"}, ValueError, "gpus: expected how many GPUs with rates, got None"),
        ({"gpus": 1, "liger": 1}, TypeError, "liger must be a bool, got int"),
        ({"gpus": 1, "checkpointing": "yes"}, TypeError, "checkpointing must be a bool, got str"),
        ({"gpus": 1, "liger": True}, ValueError, "liger: expected a model of llama, mistral, qwen2, qwen3, gemma, .*, got bert"),
    ],
    ids=str,
)
def test_a_step_that_cannot_be_meant_is_refused(step, kind, words):
    with pytest.raises(kind, match=words):
        plan(FAMILIES["bert"].model(), APTConfig(r=2), **{"batch": 1, "length": 8} | step)


# -- rates -------------------------------------------------------------------------------------------------------------


def test_every_gpu_of_the_table_says_where_each_number_comes_from():
    assert list(known()) == ["H200", "H100", "A100"]
    for name in known():
        found = rates_of(name.lower())
        assert found.name == name and found.sources.keys() == set(KEYS)
        assert all(source.split()[0] in ("measured:", "specification:", "documented:", "taken") for source in found.sources.values())
    assert not any(source.startswith("measured") for name in ("H100", "A100") for source in rates_of(name).sources.values())
    assert all(rates_of("H200").sources[key].startswith("specification") for key in ("memory", "link", "network"))


def test_rates_of_ones_own(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"like": "A100", "matmul": {"value": 1e14, "from": "my cluster"}, "link": 1e9}))
    found, base = rates_of(file), rates_of("A100")
    assert (found.name, found.matmul, found.link, found.bandwidth) == ("mine.json", 1e14, 1e9, base.bandwidth)
    assert (found.sources["matmul"], found.sources["link"], found.sources["kernel"]) == ("my cluster", "given", base.sources["kernel"])
    assert rates_of(str(file)) == found
    assert rates_of({"launch": 1}).matmul == rates_of(None).matmul == rates_of("H200").matmul
    slow, fast = predicted(rates={"matmul": 1e9}).dense, predicted(rates={"matmul": 1e15}).dense
    assert slow.parts["products"] > fast.parts["products"] and slow.parts["attention"] == fast.parts["attention"]


@pytest.mark.parametrize("key", sorted(set(KEYS) - {"memory", "workspace"}))
def test_every_rate_counts(key):
    slow = {"link": 1e6, "network": 9e5}  # so that GPUs wait

    def seconds(factor):
        rates = {**slow, key: slow.get(key, known()["H200"][key]["value"]) * factor}
        model = FAMILIES["roberta" if key.startswith("dropped") else "llama"].model(torch.bfloat16)
        step = {"batch": 8, "length": 16, "sharding": "fsdp", "checkpointing": True, "rates": rates}
        steps = [plan(model, APTConfig(r=2), gpus=gpus, **step).prediction.dense for gpus in (4, 16)]
        return [number for step in steps for number in (*step.parts.values(), *step.seconds.values())]

    assert seconds(1.0) != seconds(100.0 if key in ("kernel", "launch", "recompute", "gpus_per_node") else 0.01)


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        (3, TypeError, "rates: expected the name of a GPU, a JSON file or a mapping, got int"),
        ("B7", ValueError, "rates: expected H200, H100, A100 or a JSON file, got 'B7'"),
        ({"matmull": 1.0}, ValueError, "got 'matmull'; the nearest is matmul"),
        ({"matmul": 0}, ValueError, r"rates\['matmul'\]: expected a number above 0, got 0"),
        ({"matmul": -1}, ValueError, r"rates\['matmul'\] must be at least 0"),
        ({"matmul": float("inf")}, ValueError, r"rates\['matmul'\] must be a finite number"),
        ({"matmul": True}, TypeError, r"rates\['matmul'\] must be a number, got bool"),
        ({"matmul": {"value": 1.0, "unit": "x"}}, ValueError, r"rates\['matmul'\]: expected a number, or value and from"),
        ({"matmul": {"from": "x"}}, ValueError, r"rates\['matmul'\]: expected a number, or value and from"),
        ({"gpus_per_node": 2.5}, ValueError, r"rates\['gpus_per_node'\]: expected a whole number of at least 1, got 2.5"),
        ({"gpus_per_node": {"value": 0.5}}, ValueError, r"rates\['gpus_per_node'\]: expected a whole number of at least 1, got 0.5"),
        ({"gpus_per_node": 0}, ValueError, r"rates\['gpus_per_node'\]: expected a number above 0, got 0"),
        ({"like": "B7"}, ValueError, "rates: expected like to be one of H200, H100, A100, got 'B7'"),
        ({"like": []}, ValueError, "rates: expected like to be one of"),
    ],
    ids=str,
)
def test_rates_that_are_none_are_refused(given, kind, words):
    with pytest.raises(kind, match=words):
        rates_of(given)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, "\x00"], ids=["empty", "list", "open", "deep", "null"])
def test_a_file_without_rates_is_refused(text, tmp_path):
    (tmp_path / "rates.json").write_text(text)
    with pytest.raises(ValueError, match="rates: expected (a JSON file|an object of rates)"):
        rates_of(tmp_path / "rates.json")


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path):
    config = FAMILIES["llama"].model(torch.float32).config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_command_says_what_plan_says(directory, capsys, tmp_path):
    (tmp_path / "own.json").write_text(json.dumps({"link": 1e9}))
    words = ["--keep", "neurons=8", "--rank", "2", "--batch", "2", "--length", "16", "--gpus", "4", "--sharding", "fsdp", "--liger"]
    words += ["--checkpointing", "--rates", str(tmp_path / "own.json")]
    assert main(["plan", directory, "--json", *words]) == 0
    said = json.loads(capsys.readouterr().out)
    step = {"batch": 2, "length": 16, "gpus": 4, "sharding": "fsdp", "liger": True, "checkpointing": True}
    expected = plan(FAMILIES["llama"].model(torch.bfloat16), APTConfig(r=2), keep={"neurons": 8}, rates=tmp_path / "own.json", **step)
    assert said == json.loads(json.dumps(expected.to_dict())) and said["prediction"]["rates"] == "own.json"
    assert main(["plan", directory, *words]) == 0
    text = capsys.readouterr().out
    assert "predicted for own.json: 4 GPUs, fsdp; batch 2 a GPU, length 16; bfloat16; Liger; gradient checkpointing" in text
    assert all(
        f"\n{name} " in text
        for name in ("weights", "activations", "peak a GPU", "products", "waiting for GPUs", "a step", "tokens a second")
    )
    assert str(expected.prediction) in text


def test_the_command_takes_a_dtype_and_no_gpus(directory, capsys):
    assert main(["plan", directory, "--gpus", "1", "--batch", "1", "--dtype", "float32"]) == 0
    assert "got float32" in capsys.readouterr().out
    for words, size in (([], 4), (["--dtype", "float16"], 2)):
        assert main(["plan", directory, "--json", *words]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["prediction"] is None and said["dense"]["bytes"] == size * said["dense"]["parameters"]


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--gpus", "0"], 2, "argument --gpus: expected a whole number of at least 1, got '0'"),
        (["--gpus", "2", "--sharding", "zero"], 2, "argument --sharding: invalid choice: 'zero'"),
        (["--gpus", "2", "--batch", "1"], 2, "sharding: expected 'ddp' or 'fsdp' with 2 GPUs, got None"),
        (["--gpus", "1"], 2, "batch: expected the sequences of one GPU a step with gpus, got None"),
        (["--gpus", "1", "--batch", "1", "--length", "65"], 1, "length: expected at most the 64 positions of LlamaForCausalLM, got 65"),
        (["--sharding", "ddp"], 2, "gpus: expected how many GPUs with sharding, got None"),
        (["--gpus", "1", "--batch", "1", "--rates", "none.json"], 1, "rates: expected H200, H100, A100 or a JSON file, got 'none.json'"),
    ],
    ids=str,
)
def test_the_command_refuses_in_words(directory, words, status, said, capsys):
    try:
        ended = main(["plan", directory, *words])
    except SystemExit as left:
        ended = left.code
    assert ended == status and said in capsys.readouterr().err


def test_a_model_with_adapters_is_refused_as_before():
    with pytest.raises((TypeError, ValueError)):
        plan(adapted(FAMILIES["llama"]), APTConfig(r=2), batch=1, gpus=1)
