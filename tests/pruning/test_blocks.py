"""Block masks: what they mean in each architecture, checked against hooks on the stock model, and what they refuse."""

import copy
import pathlib
import pickle
import re

import pytest
import torch
from families import EVERY, FAMILIES, adapted, close, mask_all, outputs, some
from torch import nn
from transformers.models.gemma import modeling_gemma as gemma
from transformers.models.llama import modeling_llama as llama
from transformers.models.t5 import modeling_t5 as t5

import apt_ext
from apt_ext import APTConfig, APTModel, Architecture, adapters, get_apt_model, register_architecture, shrink
from apt_ext.pruning.architectures import lookup
from apt_ext.pruning.architectures.lookup import BlockRule, Layers, Side
from apt_ext.pruning.block_masks import submodule
from apt_ext.pruning.wrappers import MaskedNorm

PLAIN = APTConfig(r=1, target_modules=r".*\.(query|q_lin|q_proj|c_attn|q)")


def hooked(model, blocks, masks):
    """The stock model with each block's mask multiplied where its meaning is plain: before O, before down, on what is added."""
    hidden = masks.get("hidden")
    for name, block in blocks.items():
        if name not in masks or name == "hidden":
            continue
        reader = model.get_submodule(block.reader)
        width = reader.weight.shape[0 if type(reader).__name__ == "Conv1D" else 1]
        lanes = masks[name].repeat_interleave(width // block.count).double()
        reader.register_forward_pre_hook(lambda module, args, lanes=lanes: (args[0] * lanes, *args[1:]))
    if hidden is not None:
        for side in blocks["hidden"].sides:
            if side.scales:
                model.get_submodule(side.module).register_forward_hook(lambda module, args, y: y * hidden.double())
    return model


@EVERY
@pytest.mark.parametrize("kinds", [("heads",), ("neurons",), ("hidden",), ("heads", "neurons", "hidden")], ids="+".join)
def test_a_mask_acts_once_where_it_should(family, kinds):
    apt = get_apt_model(family.model(), PLAIN).eval()  # fresh adapters change nothing
    before = outputs(apt, family.inputs())
    how = "soft" if "hidden" not in kinds else "none"
    masks = some(family, apt.blocks, kinds, how)
    if "hidden" in kinds:  # zeros change norms, which hooks cannot show; the cut shows them
        masks = {name: (torch.rand(len(mask)) * 0.9 + 0.1) for name, mask in masks.items()}
    got = outputs(mask_all(apt, masks), family.inputs())
    expected = outputs(hooked(family.model(), apt.blocks, masks), family.inputs())
    # stock norms work in float32: what differs by one rounding before them may differ by one float32 rounding after
    close(got, expected, 1e-10 if any(word in family.kind for word in ("Bert", "Roberta", "GPT2")) else 1e-6)
    assert (got[0] - before[0]).abs().max() > 1e-3
    for name, mask in masks.items():
        assert torch.equal(apt.get_block_mask(name), mask)
    close(outputs(mask_all(apt, some(family, apt.blocks, kinds, "none")), family.inputs()), before)


@EVERY
def test_names_kinds_and_linears(family):
    apt = adapted(family)
    for stack in family.stacks:
        for layer in range(2):
            names = ["heads", "neurons", *(["cross_heads"] if stack == "decoder." else [])]
            for name in names:
                block = apt.blocks[f"{stack}{layer}.{name}"]
                assert block.kind == name.removeprefix("cross_") and block.count == len(apt.get_block_mask(f"{stack}{layer}.{name}"))
                assert all(isinstance(apt.model.get_submodule(linear), apt_ext.APTAdapter) for linear in block.linears)
    assert apt.blocks["hidden"].kind == "hidden" and apt.blocks["hidden"].count == 24
    assert {block.kind for block in apt.blocks.values()} == {"heads", "neurons", "hidden"}


def test_a_head_under_gqa_is_a_kv_group():
    block = adapted(FAMILIES["llama"]).blocks["1.heads"]
    assert (block.count, block.size) == (3, 4)
    assert block.linears == tuple(f"model.layers.1.self_attn.{name}_proj" for name in "vqko")


def test_hidden_masks_select():
    """Whatever pruned dimensions hold stays out, in embeddings and norms too."""
    family = FAMILIES["bert-mlm"]
    apt = adapted(family)
    masks = some(family, apt.blocks, ("hidden",), "hard")
    clean = outputs(mask_all(apt, masks), family.inputs())
    gone = masks["hidden"] == 0
    with torch.no_grad():
        for side in apt.blocks["hidden"].sides:
            module = apt.model.get_submodule(side.module)
            if side.of == "norm":
                module.base_layer.weight[gone] = float("nan")
            elif side.module.endswith("position_embeddings"):
                module.base_layer.weight[:, gone] = float("inf")
    close(outputs(apt, family.inputs()), clean, 0)


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm", "LlamaRMSNorm", "GemmaRMSNorm", "T5LayerNorm"])
def test_a_norm_sees_the_kept_dimensions_alone(kind):
    norms = {**vars(nn), **vars(llama), **vars(gemma), **vars(t5)}
    wide, narrow = norms[kind](6).double(), norms[kind](4).double()
    kept = torch.tensor([0, 2, 3, 5])
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            parameter.copy_(torch.randn(6))
            narrow.get_parameter(name).copy_(parameter[kept])
    masked = MaskedNorm(wide)
    masked.set_masks(torch.zeros(6).index_fill(0, kept, 1.0))
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = narrow(x[:, kept])
    x[:, [1, 4]] = float("nan")
    x.requires_grad_()
    y = masked(x)
    assert torch.equal(y[:, kept], expected) and bool((y[:, [1, 4]] == 0).all())
    y.square().sum().backward()
    assert bool((x.grad[:, [1, 4]] == 0).all()) and bool(torch.isfinite(x.grad).all())


def test_the_residual_stream_is_wrapped_when_it_is_first_masked_and_not_before():
    family = FAMILIES["llama-tied"]
    apt = adapted(family)
    assert type(apt.model.model.norm).__module__.startswith("transformers.")
    apt.set_block_mask("hidden", torch.ones(24))
    assert type(apt.model.model.norm).__module__.startswith("transformers.")
    apt.set_block_mask("hidden", torch.arange(24).clamp(max=1).float())
    assert not type(apt.model.model.norm).__module__.startswith("transformers.")
    tied = apt.model.get_input_embeddings().weight
    assert apt.model.get_submodule("lm_head").weight is tied
    assert not any(name.endswith("embed_tokens") for name, _ in adapters(apt))
    assert all(adapter.label == name for name, adapter in adapters(apt))  # by which ranks of a process group know it


@EVERY
def test_masks_survive_copies_dtypes_and_training(family):
    apt = adapted(family)
    masks = some(family, apt.blocks, ("heads", "neurons", "hidden"), "soft")
    expected = outputs(mask_all(apt, masks), family.inputs())
    twins = [copy.deepcopy(apt), pickle.loads(pickle.dumps(apt))]  # noqa: S301  # our own
    for twin in twins:
        close(outputs(twin, family.inputs()), expected, 0)
    half = twins[0].bfloat16()
    assert all(torch.equal(half.get_block_mask(name), mask) for name, mask in masks.items())
    state = {name: value.clone() for name, value in apt.state_dict().items()}
    with torch.no_grad():
        mask_all(apt, some(family, apt.blocks, ("heads", "neurons", "hidden"), "one"))
        apt.load_state_dict(state)
    close(outputs(apt, family.inputs()), expected, 0)
    apt.train()
    apt(**family.inputs()).logits.square().mean().backward()
    for name, adapter in adapters(apt):
        if adapter.rank:
            assert adapter.lora_A.grad is not None and bool((adapter.lora_A.grad[:, adapter.mask_in == 0] == 0).all()), name
            assert bool((adapter.lora_B.grad[adapter.mask_out == 0] == 0).all()), name


def test_disabling_gives_the_base_model_and_merging_refuses_pruned_dimensions():
    family = FAMILIES["gpt2"]
    base = outputs(family.model(), family.inputs())
    apt = adapted(family)
    mask_all(apt, some(family, apt.blocks, ("heads", "hidden"), "hard"))
    with apt.disable_adapter():
        close(outputs(apt, family.inputs()), base, 1e-12)
    with pytest.raises(RuntimeError, match="merge_and_unload: hidden dimensions are pruned"):
        apt.merge_and_unload()
    apt.set_block_mask("hidden", torch.linspace(0.5, 1, 24))
    expected = outputs(apt, family.inputs())
    plain = apt.merge_and_unload()
    assert all(type(module).__module__.split(".")[0] in ("torch", "transformers") for module in plain.modules())
    close(outputs(plain, family.inputs()), expected, 1e-12)


def test_it_refuses_in_words_and_changes_nothing():
    family = FAMILIES["llama"]
    apt = adapted(family)
    mask_all(apt, some(family, apt.blocks, ("heads", "hidden"), "soft"))
    before = {name: apt.get_block_mask(name) for name in apt.blocks}
    for name, mask, error, words in [
        ("hidden", torch.ones(23), ValueError, r"mask of block 'hidden' must have shape \[24\], got \[23\]"),
        ("0.heads", torch.full((3,), 1.5), ValueError, r"must hold values in \[0, 1\]"),
        ("0.heads", [1, 1, 1], TypeError, "must be a Tensor"),
        ("0.head", torch.ones(3), ValueError, "got '0.head'; nearest: 0.heads"),
    ]:
        with pytest.raises(error, match=words):
            apt.set_block_mask(name, mask)
    dict(adapters(apt))["model.layers.0.self_attn.o_proj"].merge_weights()
    for name in ("0.heads", "hidden"):
        with pytest.raises(RuntimeError, match="o_proj of block .* is merged"):
            apt.set_block_mask(name, torch.ones(apt.blocks[name].count))
    assert all(torch.equal(apt.get_block_mask(name), mask) for name, mask in before.items())


# -- other architectures -------------------------------------------------------------------------------------------------


class Mine(nn.Module):
    """A model that no table knows."""

    class config:
        model_type = "mine"

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 10), "down": nn.Linear(10, 6)}) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["down"](layer["up"](x).relu())
        return x


ROW = Architecture(
    ("mine",), (Layers(r"layers\.(\d+)", (BlockRule("neurons", "width", (Side("up", "out"), Side("down", "in", scales=True))),)),)
)


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(lookup, "ARCHITECTURES", list(lookup.ARCHITECTURES))


def test_an_unknown_model_says_what_to_declare():
    apt = get_apt_model(Mine(), APTConfig(r=2))
    assert apt.blocks == {}
    with pytest.raises(
        ValueError, match=r"register_architecture\(Architecture\(\('mine',\).*layers.0.up \[10, 6\], layers.0.down \[6, 10\]"
    ):
        apt.set_block_mask("0.neurons", torch.ones(10))


def test_a_row_of_ones_own(table):
    register_architecture(ROW)
    apt = get_apt_model(Mine().double(), APTConfig(r=2))
    assert list(apt.blocks) == ["0.neurons", "1.neurons"]
    mask = (torch.arange(10) < 4).float()
    apt.set_block_mask("1.neurons", mask)
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = apt(x)
    small = shrink(apt)
    assert small.layers[1]["up"].out_features == 4
    assert torch.allclose(small(x), expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="row of 'mine' does not say .* residual stream: layers.0.up, layers.0.down"):
        apt.set_block_mask("hidden", torch.ones(6))


def test_a_bad_row_is_refused(table):
    before = list(lookup.ARCHITECTURES)
    for layers, words in [
        (Layers(r"layers\.\d+", ()), "pattern: expected one group"),
        (Layers(r"layers\.(\d+", ()), "pattern: expected a regular expression"),
        (Layers(r"layers\.(\d+)", (BlockRule("neurons", "w", (Side("up", "out"),)),)), "sides: expected one that scales"),
        (Layers(r"layers\.(\d+)", (BlockRule("lanes", "w", ()),)), "kind: expected 'heads' or 'neurons', got 'lanes'"),
    ]:
        with pytest.raises(ValueError, match=words):
            register_architecture(Architecture(("mine",), (layers,)))
    with pytest.raises(TypeError, match="row: expected an Architecture, got dict"):
        register_architecture({})
    assert before == lookup.ARCHITECTURES


@EVERY
def test_a_checkpoint_restores_all_masks(family, tmp_path):
    apt = adapted(family)
    masks = some(family, apt.blocks, ("heads", "neurons", "hidden"), "soft")
    expected = outputs(mask_all(apt, masks), family.inputs())
    apt.save_pretrained(tmp_path)
    again = APTModel.from_pretrained(family.model(), tmp_path).eval()
    close(outputs(again, family.inputs()), expected, 0)
    assert all(torch.equal(again.get_block_mask(name), mask) for name, mask in masks.items())


def test_a_checkpoint_with_hidden_masks_leaves_another_model_as_it_was(tmp_path):
    family = FAMILIES["llama"]
    apt = adapted(family)
    mask_all(apt, some(family, apt.blocks, ("hidden",), "hard")).save_pretrained(tmp_path)
    other = family.model(hidden_size=48)
    before = [(name, id(module)) for name, module in other.named_modules()]
    with pytest.raises(ValueError, match="expected shape"):
        APTModel.from_pretrained(other, tmp_path)
    assert before == [(name, id(module)) for name, module in other.named_modules()]


@pytest.mark.parametrize("name", ["bert", "llama-tied"])
def test_masked_models_compile_whole(name):
    family = FAMILIES[name]
    apt = adapted(family, dtype=torch.float32)
    mask_all(apt, some(family, apt.blocks, ("heads", "neurons", "hidden"), "soft"))
    compiled = torch.compile(apt, fullgraph=True, backend="aot_eager")
    inputs = {"input_ids": family.inputs()["input_ids"], **({"use_cache": False} if family.decoder else {})}
    loss = compiled(**inputs).logits.square().mean()
    loss.backward()
    assert torch.allclose(loss, apt(**inputs).logits.square().mean(), rtol=1e-5)
    assert any(adapter.lora_A.grad.abs().sum() > 0 for _, adapter in adapters(apt) if adapter.rank)


def test_activation_checkpointing_gives_the_same_gradients():
    family = FAMILIES["bert"]
    grads = []
    for checkpointed in (False, True):
        apt = adapted(family)
        mask_all(apt, some(family, apt.blocks, ("heads", "neurons", "hidden"), "soft"))
        if checkpointed:
            apt.train()  # stock models checkpoint in training mode alone
            for module in apt.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
                if hasattr(module, "dropout") and isinstance(module.dropout, float):
                    module.dropout = 0.0
            apt.model.activation_checkpointing_enable({"use_reentrant": False})
        apt(**family.inputs()).logits.square().mean().backward()
        grads.append([p.grad for p in apt_ext.adapter_parameters(apt)])
    close(*grads, 1e-12)


class Documented(nn.Module):
    """What the row in docs/architectures.md describes."""

    class config:
        model_type = "mine"
        hidden_size, intermediate_size, num_attention_heads = 12, 10, 3

    def __init__(self):
        super().__init__()
        self.embed, self.head, self.norm = nn.Embedding(9, 12), nn.Linear(12, 9), nn.RMSNorm(12)
        self.layers = nn.ModuleList()
        for _ in range(2):
            layer = nn.ModuleDict(
                {"up": nn.Linear(12, 10), "down": nn.Linear(10, 12), "norm1": nn.LayerNorm(12), "norm2": nn.LayerNorm(12)}
            )
            layer["attn"] = nn.ModuleDict({name: nn.Linear(12, 12) for name in "qkvo"})
            layer["attn"].head_dim = 4
            self.layers.append(layer)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            attn, y = layer["attn"], layer["norm1"](x)
            q, k, v = (attn[name](y).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for name in "qkv")
            x = x + attn["o"](nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            x = x + layer["down"](layer["up"](layer["norm2"](x)).relu())
        return self.head(self.norm(x))


def test_the_documented_row_works(table):
    text = (pathlib.Path(__file__).parents[2] / "docs" / "architectures.md").read_text()
    exec(text.split("```python\n")[1].split("```")[0], {})  # noqa: S102  # our own
    apt = get_apt_model(Documented().double(), APTConfig(r=2))
    assert list(apt.blocks) == ["0.neurons", "0.heads", "1.neurons", "1.heads", "hidden"]
    masks = {"0.heads": torch.tensor([1.0, 0, 0.5]), "1.neurons": torch.arange(10).clamp(max=1).float(), "hidden": torch.ones(12)}
    masks["hidden"][5:8] = 0
    tokens = torch.arange(9).view(1, 9)
    expected = mask_all(apt, masks)(tokens)
    small = shrink(apt)
    assert torch.allclose(small(tokens), expected, rtol=0, atol=1e-12)
    assert (small.embed.embedding_dim, small.layers[0]["attn"]["q"].out_features, small.config.hidden_size) == (9, 8, 9)


def test_what_carries_a_mask_has_it_for_itself():
    """Sides of one block share what is found out about a mask, but no memory: neither with each other nor with the caller."""
    apt = adapted(FAMILIES["llama"])
    apt.compact()

    def is_all_as(expected):
        for name, adapter in adapters(apt):
            for side, mask in expected[name].items():
                assert torch.equal(getattr(adapter, f"mask_{side}"), mask), (name, side)
                assert torch.equal(adapter.packing.current._masks[side].values, mask), (name, side)

    for kind in ("heads", "neurons"):
        mask = torch.linspace(0, 1, apt.blocks[f"1.{kind}"].count)
        apt.set_block_mask(f"1.{kind}", mask)
        expected = {name: {"in": adapter.mask_in.clone(), "out": adapter.mask_out.clone()} for name, adapter in adapters(apt)}
        mask.fill_(1.0)
        is_all_as(expected)
        layer = apt.model.model.layers[1]
        writer = layer.self_attn.q_proj if kind == "heads" else layer.mlp.up_proj
        writer.set_masks(mask_out=torch.ones_like(writer.mask_out))
        with torch.no_grad():
            writer.mask_out.fill_(0.5)
        writer.set_masks(mask_out=expected[next(name for name, adapter in adapters(apt) if adapter is writer)]["out"])
        is_all_as(expected)
        with torch.no_grad():
            writer.mask_out.fill_(1.0)
        apt.set_block_mask(f"1.{kind}", torch.linspace(0, 1, len(mask)))
        is_all_as(expected)


def test_submodules_are_those_that_torch_finds():
    apt = adapted(FAMILIES["bert"])
    apt.set_block_mask("hidden", torch.arange(24).clamp(max=1).float())  # now embeddings and norms are wrapped, and pass on attributes
    model = apt.model
    for name in [name for name, _ in model.named_modules()] + ["bert.embeddings.LayerNorm.base_layer"]:
        assert submodule(model, name) is model.get_submodule(name), name
    model.passed_on = torch.compile(nn.Sequential(nn.Linear(2, 2)), backend="eager")
    assert submodule(model, "passed_on.0") is model.get_submodule("passed_on.0")
    for name in ("bert.encoder.layers.0", "bert.encoder.layer.7.output", "bert.config"):
        with pytest.raises(AttributeError) as error:
            model.get_submodule(name)
        with pytest.raises(AttributeError, match=f"^{re.escape(str(error.value))}$"):
            submodule(model, name)


def test_a_mask_from_the_host_on_a_model_without_memory():
    family = FAMILIES["bert"]
    model = adapted(family).to("meta")
    model.set_block_mask("0.neurons", torch.zeros(model.blocks["0.neurons"].count))


def test_masks_first_set_in_inference_mode_change_outside_it():
    model = adapted(FAMILIES["bert"])
    count = model.blocks["hidden"].count
    with torch.inference_mode():
        model.set_block_mask("hidden", (torch.arange(count) < count // 2).to(torch.float32))
    model.set_block_mask("hidden", (torch.arange(count) < count // 4).to(torch.float32))
    assert int(model.get_block_mask("hidden").sum()) == count // 4
    model.load_state_dict(model.state_dict())
    outputs(model, FAMILIES["bert"].inputs())
