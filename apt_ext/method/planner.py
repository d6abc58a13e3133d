"""`plan`: what a configuration will do to a model, before anything is done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from ..common.checks import checked_int, checked_module
from ..common.names import parameters_of
from ..config import APTConfig
from ..pruning.architectures.lookup import (
    Blocks,
    ends_with,
    is_linear,
    side_width,
    stored,
    weight_dim,
)
from ..pruning.block_masks import missing_block
from ..pruning.cost import cost_of
from ..pruning.cut import Changes, lanes_for, left, never_empty, parameter_changes
from ..pruning.on_meta import inputs_for, on_meta, positions
from ..pruning.sizes import Sizes
from ..storage.formats import allowed
from ..wrapping.build import match
from ..wrapping.compiled import unwrap
from .outlook import Outlook, chosen
from .prediction.prediction import Asked, Given, Prediction, asked, predicted, subject_of

KINDS = ("heads", "neurons", "hidden")
_LENGTH = 128  # of a sequence, where none is given


@dataclass(frozen=True)
class Size:
    """A model's size: Parameters (a tied one once), their bytes, and FLOPs of one forward pass (None where no trial pass was possible)."""

    parameters: int
    bytes: int
    flops: int | None


@dataclass(frozen=True)
class Plan:
    """What `plan` found; `to_dict()` is plain values for JSON, `str()` a table.

    model         the model's class
    adapters      {linear: rank} of the targets
    saved         modules that train whole
    trainable     entries of adapters and saved modules
    training_bytes  weights, adapters, their gradients and AdamW's two moments; activations, which depend on the batch, are not in it
    blocks        {kind: {block: count}}
    keep          {kind: how many of each block stay}, the target; a kind of which blocks keep different numbers is not in it
    left          {kind: {block: how many stay}}
    dense, target sizes now and after the cut
    exports       {"stock", "retyped", "per layer": constraints that stand against the target, in words; none: it can be written}
    heads         {heads kept in every layer, hidden size as in the target: the formats that can say it}
    notes         what the target brings with it
    prediction    memory and time of a training step, where GPUs were given: its `dense` and `target` hold `memory`, `peak`, `fits`,
                  `seconds`, `parts`, `tokens_per_second`, `kernels` and `refused`; see docs/planning.md
    """

    model: str
    adapters: dict[str, int]
    saved: list[str]
    trainable: int
    training_bytes: int
    blocks: dict[str, dict[str, int]]
    keep: dict[str, int]
    left: dict[str, dict[str, int]]
    dense: Size
    target: Size
    batch: int
    length: int
    exports: dict[str, list[str]]
    heads: dict[int, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    prediction: Prediction | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def __str__(self) -> str:
        ranks = sorted(set(self.adapters.values()))
        lines = [
            f"{self.model}: {len(self.adapters)} adapters of rank {', '.join(map(str, ranks))}",
            f"trained whole: {', '.join(self.saved) or 'nothing'}",
            f"trainable: {self.trainable:,} parameters; weights, gradients and AdamW: {_mib(self.training_bytes)} without activations",
            "",
            f"{'':14}{'now':>16}{'after the cut':>16}",
        ]
        for kind, found in self.blocks.items():
            now, then = _range(found), _range(self.left[kind])
            lines.append(f"{kind:14}{now:>16}{then:>16}" + (f"  in each of {len(found)}" if len(found) > 1 else ""))
        for name, now, then in (
            ("parameters", f"{self.dense.parameters:,}", f"{self.target.parameters:,}"),
            ("weights", _mib(self.dense.bytes), _mib(self.target.bytes)),
            ("GFLOPs", _giga(self.dense.flops), _giga(self.target.flops)),
        ):
            lines.append(
                f"{name:14}{now:>16}{then:>16}" + (f"  forward, batch {self.batch}, length {self.length}" if name == "GFLOPs" else "")
            )
        lines.append("")
        for name, failures in self.exports.items():
            lines.append(f"export {name}: {'yes' if not failures else 'no: ' + '; '.join(failures)}")
        if self.heads:
            grouped: dict[str, list[int]] = {}
            for count, formats in self.heads.items():
                grouped.setdefault(formats[0] if formats else "none", []).append(count)
            lines.append("heads kept: " + "; ".join(f"{', '.join(map(str, counts))} -> {name}" for name, counts in grouped.items()))
        step = [] if self.prediction is None else ["", str(self.prediction)]
        return "\n".join([*lines, *self.notes, *step])


def plan(
    model: nn.Module,
    config: APTConfig,
    *,
    keep: Mapping[str, int] | None = None,
    batch: int | None = None,
    length: int | None = None,
    gpus: int | None = None,
    sharding: str | None = None,
    liger: bool = False,
    checkpointing: bool = False,
    rates: Given = None,
) -> Plan:
    """A dry run of `get_apt_model(model, config)` and a cut; `model` is not changed and may lie on meta.

    keep    {"heads", "neurons" or "hidden": how many stay in every layer} (heads are KV groups where query heads share keys); None: what a
            `Controller` with this config leaves where all scores are alike, by the same search: `config.prune` and `density` of the layers'
            parameters, in steps of `round_to`, in all layers the same where `uniform`
    batch, length  the input of the FLOPs: matrix products and attention, as torch.utils.flop_counter counts them. batch None: 1; length
            None: 128, or the model's positions where they are fewer
    gpus    how many train it together: the plan has a `prediction` of a step, in which `batch`, then to be given, is of one GPU
    sharding  "ddp": each GPU has the whole model; "fsdp": each has a share of it. To be given with more than one GPU
    liger   of the step: Liger's kernels, a fused cross-entropy among them, in the place of transformers'
    checkpointing  of the step: layers are computed again in the backward
    rates   of the step: "H200" (None), "H100" or "A100", or how fast a GPU is: a JSON file or a mapping, as docs/planning.md has it

    Raises what get_apt_model raises about types, names and a model that has adapters; ValueError for a kind or number that the model does
    not have, a density that cannot be reached, and where blocks are asked for of an architecture that is not in the table, saying what to
    declare; for a length beyond the model's positions, a step that cannot be meant, and rates that are none.
    """
    if batch is not None:
        checked_int("batch", batch, 1)
    if length is not None:
        checked_int("length", length, 1)
    how = asked(gpus, sharding, batch, liger, checkpointing, rates)
    if keep is not None and not isinstance(keep, Mapping):
        raise TypeError(f"keep: expected a mapping of kinds to numbers, got {type(keep).__name__}")
    inner = unwrap(checked_module("model", model))
    try:
        return _planned(
            inner.module, config, keep, batch or 1, _checked_length(inner.module, length), how, [inner.note] if inner.note else []
        )
    finally:
        inner.restore()


def _checked_length(model: nn.Module, length: int | None) -> int:
    """Tokens of a sequence; None: as many as are usual, if the model has positions for them. ValueError for more than it has."""
    most = positions(model)
    if length is None:
        return _LENGTH if most is None else min(_LENGTH, most)
    if most is not None and length > most:
        raise ValueError(f"length: expected at most the {most} positions of {type(model).__name__}, got {length}")
    return length


def _planned(
    model: nn.Module,
    config: APTConfig,
    keep: Mapping[str, int] | None,
    batch: int,
    length: int,
    how: Asked | None,
    notes: list[str],
) -> Plan:
    found = match(model, config)
    blocks = found.blocks
    notes += found.notes
    if keep is None:
        most, config = _searched(model, blocks, config, notes)
    else:
        wanted = _checked_keep(model, blocks, keep)
        most = {name: min(wanted.get(block.kind, block.count), block.count) for name, block in blocks.items()}
    kept = {name: torch.arange(block.count, device="cpu") < most[name] for name, block in blocks.items()}
    row = blocks.row
    for name in never_empty(row, model, blocks) if row is not None else ():
        if blocks[name].count and not bool(kept[name].any()):
            kept[name][0] = True
            notes.append(f"{name}: one stays, with output weights of zero: the stock class cannot run with nothing there")
    notes += [f"{name}: no block, it is not pruned" for name in _outside_blocks(model, blocks)]
    changes = parameter_changes(model, lanes_for(model, blocks, kept))
    products = forward_products(model, blocks, batch, length)
    if products is None:
        notes.append(f"FLOPs are unknown: the model does not take token ids of shape [{batch}, {length}] alone")
    factors = sum(rank * sum(_shape(model.get_submodule(name))) for name, rank in found.ranks.items())
    saved = {p: p.numel() for name in found.saved for p in parameters_of(model, name)}
    trainable = factors + sum(saved.values())
    per_entry = max((p.element_size() for p in model.parameters()), default=4)
    dense, target = (size_of(model, products, cut) for cut in ({}, changes))
    counts = {name: int(stay.sum()) for name, stay in kept.items()}
    kinds = [kind for kind in KINDS if any(block.kind == kind for block in blocks.values())]
    left = {kind: {name: counts[name] for name, block in blocks.items() if block.kind == kind} for kind in kinds}
    pruned = [kind for kind in kinds if (kind in keep if keep is not None else config.density < 1.0 and kind in (config.prune or ()))]
    subject = None if how is None else subject_of(model, config, blocks, found.ranks, found.saved, changes)
    return Plan(
        model=type(model).__name__,
        adapters=found.ranks,
        saved=found.saved,
        trainable=trainable,
        training_bytes=dense.bytes + per_entry * (factors + 3 * trainable),
        blocks={kind: {name: blocks[name].count for name in left[kind]} for kind in kinds},
        keep={kind: max(left[kind].values()) for kind in pruned if keep is not None or len(set(left[kind].values())) == 1},
        left=left,
        dense=dense,
        target=target,
        batch=batch,
        length=length,
        exports=allowed(model, Sizes.of(model, blocks, counts)),
        heads=_head_formats(model, blocks, counts),
        notes=notes,
        prediction=None if subject is None or how is None else predicted(subject, how, batch, length),
    )


def _searched(model: nn.Module, blocks: Blocks, config: APTConfig, notes: list[str]) -> tuple[dict[str, int], APTConfig]:
    """How many of each block a Controller leaves where all scores are alike, and the config with the kinds that it prunes.

    Adds to `notes` what other scores may change.
    """
    live = {name: torch.ones(block.count, dtype=torch.bool, device="cpu") for name, block in blocks.items()}
    cost = cost_of(model, blocks)
    outlook = chosen(config, blocks, lambda one: Outlook(model, blocks, one, cost, live))
    config = outlook.config
    outlook.check_density()
    counts = outlook.left()
    if outlook.pruned and outlook.competing():
        shared = "kinds" if config.uniform else "layers and kinds"
        notes.append(f"{shared} compete by their scores: these are the numbers where all scores are alike")
        failures, formats = outlook.unwritable(), allowed(model, Sizes.of(model, blocks, counts))
        if failures and not all(formats.get(name, failures) for name in ("stock", "retyped")):
            notes.append(f"other scores may leave what no stock config can say: {'; '.join(failures)}")
    return counts, config


def _checked_keep(model: nn.Module, blocks: Blocks, keep: Mapping[str, int]) -> Mapping[str, int]:
    present = {kind: max((b.count for b in blocks.values() if b.kind == kind), default=0) for kind in KINDS}
    for kind, count in keep.items():
        if kind not in KINDS:
            raise ValueError(f"keep: expected {', '.join(KINDS)}, got {kind!r}")
        if present[kind] == 0:
            raise ValueError(missing_block(model, kind, blocks, ""))
        least = 1 if kind == "hidden" else 0
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"keep: expected an int for {kind}, got {type(count).__name__}")
        if not least <= count <= present[kind]:
            raise ValueError(f"keep: expected {least} to {present[kind]} {kind}, got {count}")
    return keep


def _outside_blocks(model: nn.Module, blocks: Blocks) -> list[str]:
    """What lies in the layers of the model's row and has linears, but belongs to no block of heads or neurons: cross-attention, for one.

    Named by the outermost modules of which no linear does.
    """
    row, inside = blocks.row, {name for block in blocks.values() if block.kind != "hidden" for name in block.linears}
    modules = dict(model.named_modules())
    layers = [name for name in modules for one in (row.layers if row is not None else ()) if ends_with(one.pattern, name)]
    found: dict[str, None] = {}
    for name, module in modules.items():
        layer = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
        if layer is None or not is_linear(module) or name in inside:
            continue
        parts = name.removeprefix(f"{layer}.").split(".")
        outer = (".".join((layer, *parts[: i + 1])) for i in range(len(parts)))
        found[next(one for one in outer if not any(other == one or other.startswith(f"{one}.") for other in inside))] = None
    return list(found)


# -- parameters --------------------------------------------------------------------------------------------------------


def size_of(model: nn.Module, products: ForwardProducts | None, changes: Changes) -> Size:
    """The size of a model without adapters once `changes` are made; `products` are its `forward_products`."""
    entries = {parameter: math.prod(left(parameter, changes)) for parameter in model.parameters()}
    held = sum(count * parameter.element_size() for parameter, count in entries.items())
    return Size(sum(entries.values()), held, None if products is None else _flops(products, changes))


def _shape(linear: nn.Module) -> tuple[int, int]:
    return side_width(linear, "out"), side_width(linear, "in")


# -- floating-point operations -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ForwardProducts:
    """What one forward pass multiplies: (weight, tokens) of each linear, and (weight of O, its input dimension, pairs) of attention.

    pairs  query positions times key positions, over the batch
    """

    linears: list[tuple[nn.Parameter, int]]
    attention: list[tuple[nn.Parameter, int, int]]


def forward_products(model: nn.Module, blocks: Blocks, batch: int, length: int) -> ForwardProducts | None:
    """Found by a trial pass on meta, where nothing is computed; None where the model wants other inputs."""
    trial = on_meta(model)
    calls: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            calls[name] = calls.get(name, 0) + args[0].shape[:-1].numel()

        return hook

    for name, module in trial.named_modules():
        if is_linear(module):
            module.register_forward_pre_hook(note(name))
    try:
        with torch.no_grad():
            trial(**inputs_for(model, batch, length))
    except Exception:  # any model's own code: a plan without this number is better than none
        return None
    linears = [(_weight(model, name), count) for name, count in calls.items()]
    attention = []
    for block in blocks.values():
        if block.kind == "heads":
            queries, keys = calls.get(block.linear("q"), 0), calls.get(block.linear("k"), 0)
            weight, base = _weight(model, block.reader), stored(model.get_submodule(block.reader))
            attention.append((weight, weight_dim(base, "in"), queries * keys // batch))
    return ForwardProducts(linears, attention)


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    weight = stored(model.get_submodule(name)).weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _flops(products: ForwardProducts, changes: Changes) -> int:
    """Two for each product and sum: of tokens with weights, of queries with keys, and of the weights of attention with values."""
    linears = sum(2 * tokens * math.prod(left(weight, changes)) for weight, tokens in products.linears)
    return linears + sum(4 * pairs * left(weight, changes)[dim] for weight, dim, pairs in products.attention)


# -- formats -----------------------------------------------------------------------------------------------------------


def _head_formats(model: nn.Module, blocks: Blocks, counts: Mapping[str, int]) -> dict[int, list[str]]:
    """{heads kept in every layer: the formats that can say it}, with everything else as in `counts`."""
    most = min((block.count for block in blocks.values() if block.kind == "heads"), default=0)
    found = {}
    for count in range(1, most + 1):
        these = {name: count if blocks[name].kind == "heads" else other for name, other in counts.items()}
        found[count] = [name for name, failures in allowed(model, Sizes.of(model, blocks, these)).items() if not failures]
    return found


def _range(counts: Mapping[str, int]) -> str:
    least, most = min(counts.values()), max(counts.values())
    return str(most) if least == most else f"{least}-{most}"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _giga(flops: int | None) -> str:
    return "unknown" if flops is None else f"{flops / 1e9:,.3f}"
