"""The part `compact` of bench.py: what a layer, and a training step, cost when some of their rows and columns are kept.

    python benchmarks/kept.py FILE.json PLOT.png      time against density from a kept run

Every ratio is to the frozen GEMM(s) of the whole layer; "library, kept widths" is F.linear (and g @ W) of the kept widths alone, whose
operands would have to be there already.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path

import torch
from peers import naive, peft_model
from timing import captured, labels_of, measure, rows_of
from torch import nn
from torch.nn import functional as F

from apt_ext import APTAdapter, APTConfig, adapters, get_apt_model

DENSITIES = (0.05, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)
SIDES = {"both": (True, True), "in": (True, False), "out": (False, True)}


def some(size, share, device):
    """A mask of ones at a random share of the lanes."""
    mask = torch.zeros(size)
    mask[torch.randperm(size)[: max(1, round(size * share))]] = 1
    return mask.to(device)


class Kept:
    """One layer under masks that keep a share of its sides, computed in each way; each peer is (function, x, factors, output gradient)."""

    def __init__(self, M, N, K, rank, dtype, device, share, sides):
        def draw(rows, columns):
            return torch.randn(rows, columns, device=device).to(dtype)

        prune_in, prune_out = SIDES[sides]
        masks = some(K, share if prune_in else 1.0, device), some(N, share if prune_out else 1.0, device)
        linear = nn.Linear(K, N, bias=False, device=device, dtype=dtype)
        self.W, self.x, self.grad = linear.weight.detach(), draw(M, K), draw(M, N)
        self.masked, self.kept = (APTAdapter.from_linear(linear, rank) for _ in range(2))
        for adapter in (self.masked, self.kept):
            nn.init.normal_(adapter.lora_B)
            adapter.set_masks(*masks)
        self.kept.compact()
        self.operands = self.kept.packing.current
        n_in, n_out = (len(lanes) for lanes in (self.operands.channels_in, self.operands.channels_out))
        self.W_kept, self.x_kept, self.grad_kept = draw(n_out, n_in), draw(M, n_in), draw(M, n_out)
        A, B = self.kept.lora_A, self.kept.lora_B
        formula = naive(self.W, A, B, self.kept.scaling, *(mask.to(dtype) for mask in masks))
        self.peers = {
            "compact": (self.kept, self.x, self.grad),
            "compact in and out": (self._handed_over, self.x_kept, self.grad_kept),
            "apt masks": (self.masked, self.x, self.grad),
            "naive eager, masks": (formula, self.x, self.grad),
        }
        self.factors = {name: (A, B) for name in self.peers} | {"apt masks": (self.masked.lora_A, self.masked.lora_B)}

    def _handed_over(self, x):
        a, kept = self.kept, self.operands
        return kept.apply(x, kept.packed, None, a.lora_A, a.lora_B, (a.mask_in, a.mask_out), a.scaling, True, True)

    def forwards(self):
        library = {"frozen": lambda: F.linear(self.x, self.W), "library, kept widths": lambda: F.linear(self.x_kept, self.W_kept)}
        return library | {name: (lambda f=f, x=x: f(x)) for name, (f, x, _) in self.peers.items()}

    def steps(self):
        def step(f, x, grad, factors):
            leaf = x.detach().requires_grad_()
            return lambda: torch.autograd.grad(f(leaf), (leaf, *factors), grad)

        library = {
            "frozen": lambda: (F.linear(self.x, self.W), self.grad @ self.W),
            "library, kept widths": lambda: (F.linear(self.x_kept, self.W_kept), self.grad_kept @ self.W_kept),
        }
        return library | {name: step(*peer, self.factors[name]) for name, peer in self.peers.items()}


def timed(peers, rounds, device):
    """The Times of these calls; on a GPU in CUDA graphs, where the host has no part in them."""
    if device != "cuda":
        return measure(peers, rounds, device, 2)
    return measure({name: captured(call, 4) for name, call in peers.items()}, rounds, device, 1)


def density_rows(M, N, K, rank, dtype, sides, shares, device, rounds):
    for share in shares:
        layer = Kept(M, N, K, rank, dtype, device, share, sides)
        labels = {**labels_of(M, N, K, rank, dtype), "density": share, "sides": sides}
        with torch.no_grad():
            times = timed(layer.forwards(), rounds, device)
        yield from rows_of(times, "frozen", work=f"{share:.0%} of {sides} kept: fwd", **labels)
        times = timed(layer.steps(), rounds, device)
        yield from rows_of(times, "frozen", work=f"{share:.0%} of {sides} kept: f+b", **labels)


def refresh_rows(N, K, rank, dtype, device, rounds):
    """What a change of masks costs, in passes over W that read and write it."""
    adapter = APTAdapter.from_linear(nn.Linear(K, N, bias=False, device=device, dtype=dtype), rank)
    adapter.compact()
    masks = [(some(K, 0.5, device), some(N, 0.5, device)) for _ in range(2)]
    adapter.set_masks(*masks[0])
    W, kept, turn = adapter.weight.detach().clone(), adapter.packing.current, [0]

    def change():
        turn[0] = 1 - turn[0]
        adapter.set_masks(*masks[turn[0]])

    peers = {
        "one pass over W": lambda: W.mul_(1.0),
        "copy of what is kept": lambda: kept.pack(adapter.weight),
        "set_masks": change,
    }
    yield from rows_of(measure(peers, rounds, device, 3), "one pass over W", work="compact: refresh", **labels_of(0, N, K, rank, dtype))


class Naive(nn.Module):
    """An adapter as the formula in eager torch."""

    def __init__(self, adapter):
        super().__init__()
        dtype = adapter.weight.dtype
        self.lora_A, self.lora_B, self.bias = adapter.lora_A, adapter.lora_B, adapter.bias
        masks = adapter.mask_in.to(dtype), adapter.mask_out.to(dtype)
        self.mask_out = masks[1]
        self.formula = naive(adapter.weight, self.lora_A, self.lora_B, adapter.scaling, *masks)

    def forward(self, x):
        y = self.formula(x)
        return y if self.bias is None else y + self.mask_out * self.bias


def step_rows(layers, batch, length, rank, dtype, device, rounds):
    """A training step (forward, loss, backward, AdamW) of a model of BERT-base's widths and a small vocabulary.

    Half of its heads and neurons are pruned, at random.
    """
    from transformers import BertConfig, BertForSequenceClassification

    targets = ["query", "value", "intermediate.dense", "output.dense"]
    config = BertConfig(vocab_size=2000, num_hidden_layers=layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2)
    base = BertForSequenceClassification(config).to(device, dtype)
    inputs = {"input_ids": torch.randint(0, config.vocab_size, (batch, length), device=device)}
    labels = torch.zeros(batch, dtype=torch.long, device=device)

    def stepping(model):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True, capturable=device == "cuda")

        def step():
            optimizer.zero_grad()
            model(**inputs, labels=labels).loss.backward()
            optimizer.step()

        return step

    def build(masked, change=lambda model: None):
        torch.manual_seed(0)
        model = get_apt_model(copy.deepcopy(base), APTConfig(r=rank, target_modules=targets)).train()
        for name, block in model.blocks.items() if masked else ():
            if block.kind != "hidden":
                model.set_block_mask(name, some(block.count, 0.5, device))
        change(model)
        return stepping(model)

    def in_torch(model):
        for name, adapter in list(adapters(model)):
            model.model.set_submodule(name, Naive(adapter))

    peers = {
        "dense step": lambda: build(False),
        "masked": lambda: build(True),
        "compact": lambda: build(True, lambda model: model.compact()),
        "compact, chain": lambda: build(True, lambda model: model.compact(chain=True)),
        "cut": lambda: build(True, lambda model: model.cut()),
        "naive eager, masks": lambda: build(True, in_torch),
        "full fine-tuning": lambda: stepping(copy.deepcopy(base).train().requires_grad_(True)),
    }
    if importlib.util.find_spec("peft") is not None:
        peers["PEFT, dense"] = lambda: stepping(peft_model(copy.deepcopy(base), rank, targets).train())
    labels_ = labels_of(batch * length, config.hidden_size, config.hidden_size, rank, dtype)
    work, rounds = f"step of {layers} layers, half kept", max(3, rounds // 2)
    yield from rows_of(measure({name: make() for name, make in peers.items()}, rounds, device, 1), "dense step", work=work, **labels_)
    if device == "cuda":
        times = measure({name: captured(make(), 1) for name, make in peers.items()}, rounds, device, 4)
        yield from rows_of(times, "dense step", work=f"{work}, in a CUDA graph", **labels_)


def jobs(options, dtype):
    """[(function, its arguments before device and rounds)]."""
    cuda = options.device == "cuda"
    shape = (8192, 4096, 4096) if cuda else (1024, 768, 768)
    shares = DENSITIES[3:5] if options.quick else DENSITIES
    found = [(density_rows, (*shape, 16, dtype, "both", shares))]
    if not options.quick:
        found += [(density_rows, (*shape, 16, dtype, side, (0.5,))) for side in ("in", "out")]
        found += [(density_rows, (*small, 16, dtype, "both", (0.5,))) for small in ((4096, 768, 768), (4096, 3072, 768)) if cuda]
    side = 4096 if cuda else 1024
    found += [(refresh_rows, (side, side, 16, dtype))]
    found += [(step_rows, ((12, 32, 128) if cuda else (2, 4, 128)) + (8, dtype))]
    return found


def plot(rows, path):
    """Time against density, one panel a work: both sides of the first shape, with the ideal line d^2."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.get("sides") == "both"]
    shape = next((row["M"], row["N"], row["K"]) for row in shown)
    shown = [row for row in shown if (row["M"], row["N"], row["K"]) == shape]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for kind, axes in zip(("fwd", "f+b"), figure.subplots(1, 2), strict=True):
        of_kind = [row for row in shown if row["work"].endswith(kind)]
        for peer in dict.fromkeys(row["peer"] for row in of_kind):
            line = sorted((row["density"], row["ratio"]) for row in of_kind if row["peer"] == peer)
            axes.plot(*zip(*line, strict=True), marker=".", label=peer)
        axes.plot(ideal := [j / 100 for j in range(101)], [d * d for d in ideal], color="0.4", linestyle=":", label="ideal, d^2")
        axes.set(
            title=f"{'forward' if kind == 'fwd' else 'forward + backward'}, M {shape[0]}, N {shape[1]}, K {shape[2]}",
            xlabel="share d of each side that is kept",
            ylabel="time / frozen GEMM",
        )
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text())["rows"], sys.argv[2])
