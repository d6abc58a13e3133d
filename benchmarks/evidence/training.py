"""Train a row: one loop, with what the row adds to it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import apt_ext
from apt_ext.method import Distiller, block_scores, within_density
from apt_ext.tools.data import Batch
from apt_ext.tools.phases import adapter_parameter_count
from apt_ext.tools.training import adamw, update

from .rows import Row
from .tasks import Data, Task

RANK, ALPHA, WARM_UP, MOST_NORM = 8, 16.0, 0.06, 1.0
DISTILLED = 0.75  # of the steps; from there on the task's loss alone
EVALUATIONS = 8


@dataclass
class Clock:
    """Count the seconds of training and of each step, evaluations left out.

    Keep the validation score at some steps. On CUDA the clock of the steps is the device's, which waits for nobody.
    """

    data: Data
    steps: int
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    now: int = 0
    step_seconds: list[float] = field(default_factory=list)
    _since: float | None = None
    _marks: list[Any] = field(default_factory=list)  # since when it runs: now, and the end of each step

    def run(self) -> None:
        wait(self.data.on)
        self._since = time.perf_counter()
        self._mark()

    def stop(self) -> None:
        assert self._since is not None
        wait(self.data.on)
        self.seconds, self._since = self.seconds + time.perf_counter() - self._since, None
        pairs = list(pairwise(self._marks))
        cuda = self.data.on.type == "cuda"
        self.step_seconds += [one.elapsed_time(two) / 1e3 if cuda else two - one for one, two in pairs]
        self._marks.clear()

    def _mark(self) -> None:
        if self.data.on.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        self._marks.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        self._marks[-1].record()

    def stepped(self, model: nn.Module) -> None:
        self.now += 1
        self._mark()
        if self.now % max(self.steps // EVALUATIONS, 1) == 0:
            self.stop()
            with autocast(self.data.on):
                score = self.data.score(model, "validation")
            self.history.append({"step": self.now, "seconds": self.seconds, "validation": score})
            self.run()


@dataclass(frozen=True)
class Trained:
    """Hold what training made.

    model   an APTModel, or the stock one
    kept    {kind: how many stay in each layer}
    events  the steps after which something was pruned or ranks grew; they count from 1
    """

    model: Any
    clock: Clock
    ranks: dict[str, int]
    adapter_parameters: tuple[int, int]
    kept: dict[str, list[int]]
    events: list[int]


def train(
    task: Task, row: Row, stock: Any, data: Data, density: float, rate: float, seed: int, teacher: nn.Module | None = None
) -> Trained:
    """Train `stock`, which becomes part of the result, as the row says. `rate` is the peak learning rate."""
    clock = Clock(data, task.steps)
    if row.whole:
        stock.train().requires_grad_(True)
        clock.run()
        optimizer, schedule = _optimizer(list(stock.parameters()), rate, task.steps, data.on)
        _fit(stock, data.training(seed), task.steps, clock, optimizer, schedule)
        clock.stop()
        return Trained(stock, clock, {}, (0, 0), {}, [])
    graphed = row.controlled and data.on.type == "cuda"
    model = apt_ext.get_apt_model(stock, adapter_config(task, density))
    before, counts = adapter_parameter_count(model), {name: block.count for name, block in model.blocks.items()}
    batches = data.training(seed, alike=graphed)
    clock.run()
    first = int(row.at * task.steps) if row.once else 0
    if first:
        optimizer, schedule = _optimizer(apt_ext.adapter_parameters(model), rate, first, data.on)
        _fit(model, batches, first, clock, optimizer, schedule)
    if row.once:
        counts |= _prune(model, row, data, density, seed)
    distiller = Distiller(model, teacher if row.teacher == "lora" else row.teacher, seed=seed)
    steps = task.steps - first
    optimizer, schedule = _optimizer([*apt_ext.adapter_parameters(model), *distiller.parameters()], rate, steps, data.on)
    controller = None
    asked: dict[str, Any] = {} if row.shrink is None else {"shrink": row.shrink}
    if row.controlled:
        controller = apt_ext.Controller(
            model,
            optimizer,
            steps,
            density=density if row.gradual else 1.0,
            growth=row.growth,
            kurtosis=row.kurtosis,
            seed=seed,
            **asked,
        )
    _fit(model, batches, steps, clock, optimizer, schedule, controller, distiller, graphed)
    clock.stop()
    events = [first] if row.once else []
    if controller is not None:
        controller.remove()
        events += [first + event["step"] for event in controller.history]
        if row.gradual:
            counts |= {name: int((model.get_block_mask(name) != 0).sum()) for name in model.blocks}
    kinds = dict.fromkeys(block.kind for block in model.blocks.values() if block.kind != "hidden")
    return Trained(
        model,
        clock,
        {name: adapter.rank for name, adapter in apt_ext.adapters(model) if adapter.rank},
        (before, adapter_parameter_count(model)),
        {kind: [counts[name] for name, block in model.blocks.items() if block.kind == kind] for kind in kinds},
        events,
    )


def adapter_config(task: Task, density: float = 1.0) -> apt_ext.APTConfig:
    return apt_ext.APTConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=list(task.targets),
        exclude_modules=None if task.excluded is None else list(task.excluded),
        modules_to_save=list(task.saved),
        prune=["heads", "neurons"],
        density=density,
        uniform=task.uniform,
    )


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Compute in bfloat16 on CUDA, in float32 elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def precision(device: torch.device) -> str:
    return "bfloat16 autocast over float32" if device.type == "cuda" else "float32"


@contextmanager
def attention_without_plans() -> Iterator[None]:
    """Switch off cuDNN's attention, which prepares itself anew for every length and number of heads it meets.

    That takes longer than a step. Texts differ in length, and a cut leaves other numbers of heads in every layer.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fit(
    model: Any,
    batches: Iterator[Batch],
    steps: int,
    clock: Clock,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    controller: apt_ext.Controller | None = None,
    distiller: Distiller | None = None,
    graphed: bool = False,
) -> None:
    model.train()
    learns = controller is not None and distiller is not None and distiller.teacher is not None  # from a teacher

    def progress() -> float:
        assert controller is not None
        return controller.progress

    def lines(model: Any, batch: dict[str, Any]) -> Tensor:
        given = dict(batch)
        if not given.pop("taught"):
            loss: Tensor = model(**given).loss
            return loss
        assert distiller is not None
        return distiller.loss(given, model(**given, **distiller.asks), progress)

    precision = torch.bfloat16 if clock.data.on.type == "cuda" else None
    forward_and_backward = apt_ext.GraphedStep(model, lines, autocast=precision, enabled="auto" if graphed else False)
    distilled = False
    for step in range(steps):
        taught = learns and step < DISTILLED * steps and progress() > 0
        if taught and not distilled and distiller is not None and distiller.own:
            distiller.refresh()  # what has been learned before pruning started
        distilled = distilled or taught
        forward_and_backward({**next(batches), "taught": taught})
        update(optimizer, schedule, MOST_NORM, controller)
        clock.stepped(model)


def _optimizer(parameters: list[nn.Parameter], rate: float, steps: int, device: torch.device) -> tuple[Any, Any]:
    return adamw(parameters, rate, steps, WARM_UP, fused=device.type == "cuda")


def _prune(model: apt_ext.APTModel, row: Row, data: Data, density: float, seed: int) -> dict[str, int]:
    """Mask and cut in one step, and return how many stay of each block."""
    kinds = model.apt_config.prune or []  # every row names its kinds
    if row.once == "salience":
        batches = data.training(seed + 10_000)
        number = max(data.task.scored // data.task.batch, 1)
        scores: Mapping[str, Tensor] = block_scores(model, kinds, (next(batches) for _ in range(number)), row.kurtosis)
    elif row.once == "magnitude":
        scores = magnitudes(model, kinds)
    else:
        generator = torch.Generator().manual_seed(seed)
        scores = {name: torch.rand(block.count, generator=generator) for name, block in model.blocks.items() if block.kind in kinds}
    masks = within_density(model, scores, density)
    for name, mask in masks.items():
        model.set_block_mask(name, mask)
    model.cut()
    return {name: int(mask.sum()) for name, mask in masks.items()}


@torch.no_grad()
def magnitudes(model: apt_ext.APTModel, kinds: list[str]) -> dict[str, Tensor]:
    """Return {block: [count]}: the sum of |W + s B A| over the rows and columns that go with each.

    Only models of nn.Linear have such sums.
    """
    found = dict(apt_ext.adapters(model))
    scores = {}
    for name, block in model.blocks.items():
        if block.kind not in kinds:
            continue
        total = torch.zeros(block.count)
        for side in block.sides:
            adapter = found[side.module]
            assert adapter.weight is not None
            weight = (adapter.weight + adapter.scaling * adapter.Wb @ adapter.Wa).abs()
            total += weight.sum(0 if side.side == "in" else 1).cpu().view(block.count, -1).sum(1)
        scores[name] = total
    return scores
