"""Prune a model that is not of transformers, by saying where its heads and neurons are.

python examples/own_architecture.py [--quick]
"""

import argparse
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

import apt_ext
from apt_ext import Architecture, BlockRule, Layers, Side, Stream

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--quick", action="store_true", help="few steps, to see it run")
options = parser.parse_args()


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.head_dim = width // heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        # -1 and not a number: after a cut there are fewer heads
        q, k, v = (part(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width, heads, neurons):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.up, self.down = nn.Linear(width, neurons), nn.Linear(neurons, width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Mine(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        shape = config.hidden_size, config.num_attention_heads, config.intermediate_size
        self.layers = nn.ModuleList(Layer(*shape) for _ in range(config.num_hidden_layers))
        self.norm, self.head = nn.LayerNorm(config.hidden_size), nn.Linear(config.hidden_size, 2)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


# What belongs to one neuron and to one head. `scales` is where a mask between 0 and 1 acts.
apt_ext.register_architecture(
    Architecture(
        model_types=("mine",),
        layers=(
            Layers(
                r"layers\.(\d+)",  # the end of a layer's name; the group is its number
                (
                    BlockRule("neurons", "intermediate_size", (Side("up", "out"), Side("down", "in", scales=True))),
                    BlockRule(
                        "heads",
                        "num_attention_heads",
                        (Side("attn.v", "out", scales=True), Side("attn.q", "out"), Side("attn.k", "out"), Side("attn.o", "in")),
                        owner="attn",
                        size="head_dim",
                    ),
                ),
            ),
        ),
        stream=Stream(adds=r"embed|attn\.o|down", reads=r"attn\.[qkv]|up|head", norms=r"norm\d?"),
    )
)

torch.manual_seed(0)
sizes = {"vocab_size": 50, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "num_hidden_layers": 2}
model = apt_ext.get_apt_model(Mine(SimpleNamespace(model_type="mine", **sizes)), apt_ext.APTConfig(r=4, modules_to_save=["head"]))
steps = 40 if options.quick else 400
optimizer = torch.optim.AdamW(apt_ext.adapter_parameters(model), lr=2e-3)
controller = apt_ext.Controller(model, optimizer, total_steps=steps, prune=["heads", "neurons"], density=0.5, log=print)
for _ in range(steps):
    tokens = torch.randint(0, 50, (16, 12))
    loss = F.cross_entropy(model(tokens), (tokens[:, 0] > 24).long())
    loss.backward()
    controller.observe()
    optimizer.step()
    optimizer.zero_grad()
    controller.step()

small = apt_ext.shrink(model).eval()
torch.testing.assert_close(small(tokens), model.eval()(tokens), rtol=1e-3, atol=1e-4)
before = sum(parameter.numel() for parameter in Mine(SimpleNamespace(model_type="mine", **sizes)).parameters())
print(f"loss {loss.item():.3f}; {before:,} parameters became {sum(parameter.numel() for parameter in small.parameters()):,}")
