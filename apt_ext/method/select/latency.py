"""The time that a layer's products take by its width, measured on the device at hand."""

from __future__ import annotations

import statistics
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ...common import clock
from ...common.checks import checked_int
from ...model import APTModel
from ...pruning.cost import channels


@torch.no_grad()
def measure_latency(model: APTModel, tokens: int = 2048, points: int = 9, rounds: int = 15) -> dict[str, dict[int, float]]:
    """{kind: {number kept: seconds}} for `Controller(budget="latency", latency=...)`: one layer's linears around a block of that kind.

    Of "hidden": the linears of one attention and one feed-forward layer. Random inputs on the model's device, in its dtype, without biases
    and attention itself; the median of `rounds`, in each of which every width has its turn.

    tokens  rows of the input: batch times length of what will be run
    points  widths, evenly spread up to all
    """
    if not isinstance(model, APTModel):
        raise TypeError(f"model: expected an APTModel, got {type(model).__name__}")
    checked_int("tokens", tokens, 1)
    checked_int("points", points, 2)
    checked_int("rounds", rounds, 1)
    blocks, full = model.blocks, {name: block.count for name, block in model.blocks.items()}
    first = {block.kind: name for name, block in reversed(blocks.items())}
    like = next(model.parameters())
    found: dict[str, dict[int, float]] = {}
    for kind, name in first.items():
        around = [first[other] for other in ("heads", "neurons") if other in first] if kind == "hidden" else [name]
        linears = [linear for block in around for linear in blocks[block].linears]
        widths = sorted({max(round(full[name] * i / (points - 1)), 1) for i in range(1, points)})
        products = {}
        for width in widths:
            sizes = [
                [int(channels(model.model, blocks, linear, side, {**full, name: width})) for side in ("out", "in")] for linear in linears
            ]
            products[width] = [(_random(tokens, in_, like), _random(out, in_, like)) for out, in_ in sizes]
        times: dict[int, list[float]] = {width: [] for width in widths}
        wait = clock.waiting_for(like.device)
        for turn in range(rounds + 2):
            for width in widths:
                seconds = clock.seconds(partial(_multiply, products[width]), wait)
                if turn >= 2:  # the first rounds warm up
                    times[width].append(seconds)
        found[kind] = {width: statistics.median(seconds) for width, seconds in times.items()}
        if kind != "hidden":
            found[kind] = {0: 0.0, **found[kind]}
    return found


def _random(rows: int, columns: int, like: Tensor) -> Tensor:
    return torch.randn(rows, columns, device=like.device, dtype=like.dtype)


def _multiply(products: list[tuple[Tensor, Tensor]]) -> None:
    for x, weight in products:
        F.linear(x, weight)
