"""One training step of a model with adapters, on each of some GPUs: what it holds and how long it takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .layers import FLOAT, Family, Linear, Passes, Widths, Work
from .rates import Rates

SHARDINGS = ("ddp", "fsdp")
Seconds = defaultdict[str, float]  # by what takes them
_UNITS = 3  # of FSDP, gathered at once: the layer at work, the next one, and the buffer that it comes in
_AS_LOW_RANK = 16  # ranks up to here take passes over x and y whose arithmetic costs nothing


@dataclass(frozen=True)
class Step:
    """One training step on one GPU, in plain values.

    memory   {what: bytes} at the peak; of an unknown family without activations
    peak     bytes at the peak; None where activations are unknown
    fits     whether that is within the GPU's memory; None where it is unknown
    seconds  {"eager": of a step whose kernels the host launches one by one, "graph": of one graph}, where predicted
    parts    {what: seconds of the device}; their sum is the step's where the host is fast enough
    tokens_per_second  of all GPUs, eagerly; None where no time is predicted
    kernels  that a step launches
    refused  why it cannot be run, in words; "" where it can
    """

    memory: dict[str, int]
    peak: int | None = None
    fits: bool | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)
    tokens_per_second: float | None = None
    kernels: int | None = None
    refused: str = ""


@dataclass(frozen=True)
class Setting:
    """How a step is run.

    gpus, sharding  "ddp": each GPU has the model; "fsdp": each has a share, and gathers layers; "" with one GPU
    batch, length   sequences of one GPU, and their tokens
    liger           Liger's kernels in the place of transformers'
    checkpointing   each layer keeps its input alone, and is computed again in the backward
    """

    gpus: int
    sharding: str
    batch: int
    length: int
    liger: bool
    checkpointing: bool
    rates: Rates

    @property
    def tokens(self) -> int:
        """Of one GPU."""
        return self.batch * self.length

    @property
    def shards(self) -> int:
        return self.gpus if self.sharding == "fsdp" else 1


@dataclass(frozen=True)
class Shape:
    """What of a model matters to a step.

    weights    bytes of all that is frozen or trained whole
    factors    bytes of the adapters' factors
    trained    entries that are trained, and their bytes
    size       bytes of an entry of the weights
    layers     None where the family is unknown
    hidden, vocabulary  of the layer that turns hidden states into tokens; 0: there is none
    causal, dropped  whether attention looks back alone, and has dropout
    """

    weights: int
    factors: int
    trained: int
    trained_bytes: int
    size: int
    layers: Sequence[Widths] | None
    hidden: int
    vocabulary: int
    causal: bool
    dropped: bool


def step_of(shape: Shape, family: Family | None, setting: Setting) -> Step:
    """The step of a model of this shape; time for 16-bit weights alone, of which there are rates."""
    held = _held(shape, setting)
    if shape.layers is None or family is None:
        return _judged(held, {}, sum(held.values()), setting)
    works = [family.work(widths, shape.size, setting.liger) for widths in shape.layers]
    smallest = _activations(shape, works, replace(setting, batch=1, checkpointing=True))
    step = _judged(held, _activations(shape, works, setting), sum(held.values()) + sum(smallest.values()), setting)
    if step.refused or shape.size != 2:
        return step
    return _timed(step, shape, works, setting)


# -- memory ------------------------------------------------------------------------------------------------------------


def _held(shape: Shape, setting: Setting) -> dict[str, int]:
    """What is there all the time."""
    shards = setting.shards
    held = {
        "weights": -(-shape.weights // shards),
        "factors": -(-shape.factors // shards),
        "gradients and AdamW": -(-3 * shape.trained_bytes // shards),
        "library": int(setting.rates.workspace),
    }
    if setting.sharding == "fsdp" and setting.gpus > 1:
        layers = [widths.size for widths in shape.layers or ()]
        if layers:
            held["gathered"] = _UNITS * max(layers) + shape.weights - sum(layers)
    if setting.sharding == "ddp":
        held["buckets"] = shape.trained_bytes
    return held


def _activations(shape: Shape, works: Sequence[Work], setting: Setting) -> dict[str, int]:
    """What the layers keep, and the most that the loss or the backward of one layer holds beside it."""
    assert shape.layers is not None
    tokens = setting.tokens
    low = [sum(shape.size * linear.rank for linear in widths.linears) for widths in shape.layers]
    kept = [tokens * (work.kept + more) for work, more in zip(works, low, strict=True)]
    temporary = max((tokens * work.temporary for work in works), default=0.0)
    if setting.checkpointing:
        inputs = sum(tokens * shape.size * widths.hidden for widths in shape.layers)
        kept, temporary = [inputs], temporary + max(kept, default=0.0)
    return {"activations": int(sum(kept)), "loss or backward of a layer": int(max(temporary, _loss_bytes(shape, setting)))}


def _loss_bytes(shape: Shape, setting: Setting) -> float:
    """The logits' share of the peak: in float32 their logarithms and two gradients; Liger makes them in chunks."""
    if not shape.vocabulary:
        return 0.0
    tokens = setting.tokens
    if setting.liger:
        return shape.size * (tokens * shape.hidden + _chunk(shape, tokens) * shape.vocabulary)
    return 3.0 * FLOAT * tokens * shape.vocabulary


def _chunk(shape: Shape, tokens: int) -> int:
    """Tokens of one chunk of Liger's loss: its logits take about as much as the hidden states of all tokens."""
    chunks = -(-shape.vocabulary // shape.hidden)
    return min(1 << (-(-tokens // chunks) - 1).bit_length(), tokens)


def _judged(held: dict[str, int], kept: dict[str, int], least: int, setting: Setting) -> Step:
    """A step that holds this, with its peak, and in words why it cannot be run.

    kept   what a batch decides; {} where it is unknown
    least  bytes of the smallest batch, recomputed
    """
    memory, most = held | kept, int(setting.rates.memory)
    total = sum(memory.values())
    fits = total <= most
    words = ""
    if not fits:
        largest = max(memory, key=lambda name: memory[name])
        words = (
            f"{setting.sharding or 'one GPU'}: expected at most {most / 2**30:.1f} GiB a GPU, got {total / 2**30:.1f} GiB, "
            f"of which {largest} take {memory[largest] / 2**30:.1f}; {_advice(least > most, setting)}"
        )
    return Step(memory, peak=total if kept else None, fits=fits if kept or not fits else None, refused=words)


def _advice(always: bool, setting: Setting) -> str:
    if always:
        return "no batch is small enough; " + (
            "more GPUs hold less each" if setting.sharding == "fsdp" else "fsdp shards the weights over GPUs"
        )
    return "a smaller batch" + ("" if setting.checkpointing else ", or gradient checkpointing,") + " keeps less"


# -- time --------------------------------------------------------------------------------------------------------------


def _timed(step: Step, shape: Shape, works: Sequence[Work], setting: Setting) -> Step:
    """The step with its times."""
    assert shape.layers is not None
    rates = setting.rates
    forward, backward = Seconds(float), Seconds(float)
    kernels = 0
    for widths, work in zip(shape.layers, works, strict=True):
        again = _layer(forward, widths, work.forward, shape, setting, backward=False)
        kernels += again + _layer(backward, widths, work.backward, shape, setting, backward=True)
        if setting.checkpointing:
            kernels += _layer(backward, widths, work.forward, shape, setting, backward=False)
    kernels += _loss(forward, backward, shape, setting)
    optimizer = Passes(7.0 * shape.trained_bytes / setting.shards / setting.tokens, 0, 5)
    backward["optimizer"] += _passes(optimizer, setting)
    kernels += optimizer.kernels
    parts = {name: forward[name] + backward[name] for name in list(forward | backward)}
    parts |= _communication(sum(forward.values()), sum(backward.values()), shape, setting)
    device = sum(parts.values())
    again = len(works) if setting.checkpointing else 0
    seconds = {"eager": max(device, kernels * rates.launch + again * rates.recompute)}
    if setting.gpus == 1:
        seconds["graph"] = device
    tokens = setting.gpus * setting.tokens / seconds["eager"]
    return replace(step, seconds=seconds, parts=parts, kernels=kernels, tokens_per_second=tokens)


def _passes(passes: Passes, setting: Setting) -> float:
    rates, tokens = setting.rates, setting.tokens
    return tokens * (passes.bytes / rates.bandwidth + passes.elements / rates.unvectorised) + passes.kernels * rates.kernel


def _layer(seconds: Seconds, widths: Widths, passes: Passes, shape: Shape, setting: Setting, backward: bool) -> int:
    """Add one direction of a layer to `seconds`; return how many kernels it is."""
    rates = setting.rates
    kernels = passes.kernels
    for linear in widths.linears:
        seconds["products"] += _product(linear.out, linear.into, setting)
        kernels += 1
        if linear.rank:
            kernels += _adapter(seconds, linear, shape.size, setting, backward)
    operations = 4.0 * setting.batch * setting.length**2 * widths.queries / (2 if shape.causal else 1)
    if backward:
        speed = rates.dropped_backward if shape.dropped else rates.attention_backward
        seconds["attention"] += 2.5 * operations / speed + rates.kernel
    else:
        speed = rates.dropped_forward if shape.dropped else rates.attention_forward
        seconds["attention"] += operations / speed + rates.kernel
    seconds["elementwise"] += _passes(passes, setting)
    return kernels + 1


def _product(out: int, into: int, setting: Setting) -> float:
    return 2.0 * setting.tokens * out * into / setting.rates.matmul + setting.rates.kernel


def _adapter(seconds: Seconds, linear: Linear, size: int, setting: Setting, backward: bool) -> int:
    """Add an adapter's passes; return how many kernels they are.

    One reads one side and writes the other; backward two more sum over the tokens, and one joins their parts.
    """
    rates, moved = setting.rates, setting.tokens * size * (linear.out + linear.into)
    beyond = max(linear.rank - _AS_LOW_RANK, 0)
    operations = 2.0 * setting.tokens * beyond * (linear.out + linear.into) / rates.matmul
    seconds["adapters"] += moved / rates.low_rank + rates.kernel + operations
    if not backward:
        return 1
    seconds["adapters"] += moved / rates.token_sums + 3 * rates.kernel + operations
    return 4


def _loss(forward: Seconds, backward: Seconds, shape: Shape, setting: Setting) -> int:
    """The layer that makes tokens, its cross-entropy, and their backward; return how many kernels they are."""
    if not shape.vocabulary:
        return 0
    rows, e = shape.vocabulary, shape.size
    product = _product(rows, shape.hidden, setting)
    if setting.liger:  # both products in the forward, in chunks; one kernel reads logits twice and writes gradients
        chunks = -(-setting.tokens // _chunk(shape, setting.tokens))
        passes = Passes(3 * e * rows, 0, chunks)
        forward["loss"] += 2 * product + _passes(passes, setting) + 2 * (chunks - 1) * setting.rates.kernel
        return 3 * chunks
    # up, logarithms (read twice); backward zeros, gradient of logarithms (read twice), down
    there, back = Passes(3 * FLOAT * rows, rows, 3), Passes((FLOAT + 5 * FLOAT + FLOAT + e) * rows, 0, 3)
    forward["loss"] += product + _passes(there, setting)
    backward["loss"] += product + _passes(back, setting)
    return 2 + there.kernels + back.kernels


def _communication(forward: float, backward: float, shape: Shape, setting: Setting) -> dict[str, float]:
    """Seconds that a step is longer for what GPUs send each other, beside which they compute.

    FSDP gathers the weights of every layer twice, the first one before anything can be computed, copies them out of
    the buffers, and scatters the sums of the trained entries' gradients; DDP sums these.
    """
    gpus, rates = setting.gpus, setting.rates
    if gpus == 1:
        return {}
    speed = rates.link if gpus <= rates.gpus_per_node else min(rates.link, rates.network)
    share = (gpus - 1) / gpus
    if setting.sharding == "ddp":
        return {"waiting for GPUs": max(2 * share * shape.trained_bytes / speed - backward, 0.0)}
    layers = [widths.size for widths in shape.layers or ()]
    outside = shape.weights - sum(layers)
    gathered = share * sum(layers) / speed
    first = share * (outside + max(layers, default=0)) / speed
    copied = 2 * (2 * sum(layers) + outside) / rates.bandwidth
    scattered = share * shape.trained_bytes / speed
    # what is copied is computing, too: beside it goes on what is sent
    forward, backward = (seconds + copied / 2 for seconds in (forward, backward))
    waits = first + max(gathered - forward, 0.0) + max(gathered + scattered - backward, 0.0)
    return {"copies of gathered weights": copied, "waiting for GPUs": waits}
