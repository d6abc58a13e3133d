"""torch.compile over whole models on a GPU, by default and in CUDA graphs: the eager model's steps."""

from functools import partial

import pytest
import torch

import apt_ext
from apt_ext import APTConfig, adapters, get_apt_model

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),  # torch.compile's
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
DEVICE = "cuda"
OPTIONS = {"default": {}, "reduce-overhead": {"mode": "reduce-overhead"}}
LAYERS = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 96}
NONE = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert():
    config = transformers.BertConfig(**LAYERS, **NONE, num_attention_heads=4, max_position_embeddings=32)
    return transformers.BertForSequenceClassification(config)


def llama():
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LAYERS, **heads, use_cache=False))


class Run:
    """A model with its optimizer, compiled or not."""

    def __init__(self, make, options):
        torch.manual_seed(0)
        self.model = get_apt_model(make(), APTConfig(r=2, max_rank=6)).train().to(DEVICE)
        with torch.no_grad():
            for _, adapter in adapters(self.model):
                adapter.Wb.normal_(std=0.1)
        self.optimizer = torch.optim.AdamW(apt_ext.adapter_parameters(self.model), lr=1e-3)
        self.call = self.model if options is None else torch.compile(self.model, **options)

    def step(self, seed):
        """The loss, and what every trained Parameter is afterwards."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 96, (4, 16), generator=generator)
        labels = ids if self.model.config.model_type == "llama" else ids[:, 0] % 2
        loss = self.call(input_ids=ids.to(DEVICE), labels=labels.to(DEVICE)).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach().clone()

    def mask(self, value):
        """Half of every block of heads and neurons gets this value."""
        for name, block in self.model.blocks.items():
            if block.kind != "hidden":
                kept = (torch.arange(block.count) < block.count // 2).float()
                self.model.set_block_mask(name, kept + (1 - kept) * value)

    def grow(self, rank):
        for number, (_, adapter) in enumerate(adapters(self.model)):
            adapter.increase_rank(rank, generator=torch.Generator(DEVICE).manual_seed(number))

    def cut(self, _):
        self.model.cut(self.optimizer)


def same(ours, theirs, seed):
    torch.testing.assert_close(ours.step(seed), theirs.step(seed), rtol=1e-4, atol=1e-5)
    for (name, got), want in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4, msg=partial("{}: {}".format, name))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("make", [pytest.param(bert, marks=pytest.mark.slow), llama])
def test_steps_are_the_eager_ones_while_masks_move_and_ranks_grow(make, options):
    """Nothing is compiled again until a cut, which compiles once."""
    ours, theirs = Run(make, options), Run(make, None)
    for seed in range(3):
        same(ours, theirs, seed)
    changes = [(Run.mask, 0.5), (Run.grow, 4), (Run.mask, 0.0), (Run.grow, 6), (Run.mask, 1.0)]
    changes += [(Run.mask, 0.0)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, (change, value) in enumerate(changes, 3):
            change(ours, value)
            change(theirs, value)
            for again in range(2):
                same(ours, theirs, 10 * seed + again)
    for run in (ours, theirs):
        run.cut(None)
    for seed in range(100, 104):
        same(ours, theirs, seed)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_activations_may_be_computed_again_in_compiled_layers(options):
    ours, theirs = Run(llama, options), Run(llama, None)
    enable = getattr(ours.model, "activation_checkpointing_enable", None)
    (enable or ours.model.gradient_checkpointing_enable)({"use_reentrant": False})
    for seed, value in enumerate((1.0, 0.5, 0.0)):
        ours.mask(value)
        theirs.mask(value)
        for again in range(3):
            same(ours, theirs, 10 * seed + again)
