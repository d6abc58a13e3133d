"""Controller: drives a training run. It listens to gradients, moves the masks of blocks, cuts, and lets ranks grow (APT, ICML 2024)."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..common.checks import checked_bool, checked_choice, checked_int, checked_number, checked_seed
from ..config import APTConfig, Schedule
from ..distributed import agreement
from ..distributed.dtensor import is_sharded
from ..optim.initial_state import OptimizerLike, optimizers_of
from ..optim.resize import one_search
from ..pruning.architectures.lookup import Blocks
from ..pruning.block_masks import host_mask, missing_carriers, put_carriers, take_carriers
from ..pruning.cost import budget_cost
from ..pruning.cut import decodes
from ..pruning.cut_in_place import Cut
from ..pruning.target import BUDGETS, Target
from ..storage import state_directory
from ..wrapping.run_state import note_controller
from .block_record import BlockRecord
from .history import Event, checked_history, event, line, settings_of
from .outlook import Outlook, allowance, check_export, chosen, pruned_blocks, say_unpruned
from .refusals import (
    MODES,
    apt_model_in,
    check_can_grow,
    check_change,
    check_held,
    check_place,
    check_state,
    checked_log,
    checked_scores,
    gradients_came,
    refuse_second,
)
from .schedule import Steps, step_mask
from .score.block_scores import BlockScores
from .select.groups import groups_of
from .select.rank_budget import AdapterImportance, Growth
from .select.rank_growth import RankGrowth
from .select.search import search
from .shrinking_mode import chosen_mode

logger = logging.getLogger("apt_ext")

_FORGOTTEN = 20  # optimizer steps without Controller.step() before it warns


class Controller:
    """Prunes blocks and lets ranks grow while a model trains.

        controller = apt_ext.Controller(model, optimizer, total_steps=1000, density=0.4)
        for batch in batches:
            model(**batch).loss.backward()
            controller.observe()  # after the last backward of a step, before the optimizer's step
            optimizer.step()
            optimizer.zero_grad()
            controller.step()

    It counts the optimizer's own steps: micro-batches between two of them are one batch, and one that a GradScaler skips is none. Masks end
    at exactly 0 or 1 at each event of the schedule. A block whose mask is 0 stays out, and is cut from the model there and then: weights,
    factors, gradients and the optimizer's state become smaller, and training goes on with the same Parameter objects. Density, budget,
    floors and ranks are of the sizes before the first cut. Under DDP and FSDP2 every rank makes the same calls, and
    `APTConfig.max_rank` has to leave room for the ranks. `history` is a list of dicts, one an event: step, density,
    kept {block: number}, ranks {adapter: rank}, adapter_parameters, threshold.

    Args:
        model: an APTModel, or a module that holds one (DDP, torch.compile).
        optimizer: the optimizer that trains it, a list of them, or accelerate's wrapper; it holds every adapter's trainable factors.
        total_steps: optimizer steps of the whole run; None where the schedule counts steps.
        config: whose prune, density, schedule, round_to and uniform count; None: the model's own.
        prune, density, schedule, round_to, uniform: take the place of the config's. `density=1.0` given here lets ranks grow alone; where
            only the config's default says it, the logger warns that nothing is pruned.
        budget: what density is a share of: "parameters" of the layers, "flops" (of a token in a sequence of `length`), "memory", or
            "latency", by the tables in `latency` (`apt_ext.method.measure_latency(model)` makes them; see `Latency`).
        joint: kinds compete by salience for their cost; False: each kind keeps the same share.
        floor: chunks (one head, or `round_to` neurons or dimensions) that always stay in every block.
        export: "stock" or "per_layer": whatever will be left can be written by `apt_ext.export`, without or with `per_layer=True`, or this
            raises. None: the logger says it where a stock model may not come of it.
        growth: how ranks grow, a Growth or its budget. 1 lets none grow. Without `APTConfig.max_rank` a grown factor has other storage, and
            the optimizer's state follows it. Adafactor and Muon look at a factor as a whole, so the rows that max_rank reserves change
            their steps.
        decay: of the moving averages of salience and importance.
        kurtosis: the weight of outliers in the salience (see BlockScores); None: 1 for decoders, 0 else.
        shrink: what becomes of what is pruned. "cut": every event removes it. "compact": from the first event that prunes, adapters
            compute on kept rows and columns, full-size in and out (not under FSDP2). "none": it is masked. None: "cut", unless DDP or FSDP
            hold Parameters, `max_rank` is given, the optimizer's state cannot follow or the model is compiled; then "compact", and the
            logger warns. `controller.shrink` says which.
        seed: of the generator that draws new rows.
        log: called with one line at each event, such as tqdm.write; None: the logger "apt_ext", level INFO.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, naming it; blocks that the model does not have; a density that
            the floors do not allow; an optimizer without the adapters' factors, or whose state cannot follow them as they grow or are cut
            (Adafactor); what may be left and `export` cannot write.
        RuntimeError: another Controller is at work on the model; ranks are to grow without max_rank, or the model is to be cut, under DDP
            or FSDP; hidden dimensions are to be pruned and FSDP2 has sharded the modules that would have to be wrapped for it; ranks of a
            process group disagree.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerLike,
        total_steps: int | None = None,
        *,
        config: APTConfig | None = None,
        prune: Sequence[str] | None = None,
        density: float | None = None,
        schedule: Schedule | Mapping[str, Any] | None = None,
        round_to: int | None = None,
        uniform: bool | None = None,
        budget: str = "parameters",
        length: int = 128,
        latency: Mapping[str, Mapping[int, float]] | None = None,
        joint: bool = True,
        floor: int = 1,
        export: str | None = None,
        growth: Growth | float = 4.0,
        decay: float = 0.85,
        kurtosis: float | None = None,
        shrink: str | None = None,
        seed: int = 0,
        log: Callable[[str], object] | None = None,
    ) -> None:
        with agreement.change("a new Controller") as agree:
            self.model = apt_model_in(model)
            self.optimizer = optimizer
            optimizers = optimizers_of(optimizer)
            if not optimizers:
                raise TypeError(f"optimizer: expected torch's Optimizer, accelerate's wrapper or a list of them, got {optimizer!r}")
            if total_steps is not None:
                checked_int("total_steps", total_steps, 1)
            given = {"prune": prune, "density": density, "schedule": schedule, "round_to": round_to, "uniform": uniform}
            config = self.model.apt_config if config is None else config
            if not isinstance(config, APTConfig):
                raise TypeError(f"config: expected an APTConfig, got {type(config).__name__}")
            config = replace(config, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
            growth = growth if isinstance(growth, Growth) else Growth(checked_number("growth", growth))
            checked_choice("budget", budget, BUDGETS)
            checked_int("length", length, 1)
            checked_int("floor", floor, 0)
            checked_bool("joint", joint)
            if shrink is not None:
                checked_choice("shrink", shrink, MODES)
            checked_log(log)
            inner, blocks = self.model.model, self.model.blocks
            if kurtosis is None:
                row = blocks.row
                kurtosis = float(row is not None and decodes(row, inner))
            kurtosis = checked_number("kurtosis", kurtosis, 0.0)
            refuse_second(self.model)
            self.total_steps, self.budget, self.joint, self.floor, self.log = total_steps, budget, joint, floor, log
            self.steps = Steps.of(config.schedule, total_steps)
            self.now = 0  # optimizer steps that were counted, up to total_steps
            self.history: list[Event] = []

            self._record = BlockRecord(self.model)

            def outlook_of(config: APTConfig) -> Outlook:
                cost = budget_cost(inner, blocks, budget, length, latency, pruned_blocks(inner, blocks, config))
                return Outlook(inner, blocks, config, cost, self._record.live, floor, joint)

            outlook = chosen(config, blocks, outlook_of)
            self.config, self.cost = outlook.config, outlook.cost
            self._record.prune(outlook.pruned)
            self.ranks = RankGrowth(self.model, growth, decay)
            check_held(self.ranks.adapters, optimizers)
            self.generator = checked_seed("seed", seed)

            self._dense = self.cost.total(blocks.full)
            self._initial = self.density
            self.shrink = chosen_mode(shrink, model, self.model, self.blocks, self.ranks.adapters, optimizers)
            self._by_default, self._compacted = shrink is None, False
            if growing := self.ranks.growing():
                check_can_grow(growing, optimizers, growth.budget)
            outlook.check_density()
            self.groups = outlook.groups
            check_export(outlook, export)
            placed = missing_carriers(inner, "hidden", blocks["hidden"]) if "hidden" in self.blocks else {}
            settings = (total_steps, self.config.to_dict(), budget, length, latency, joint, floor, growth, decay, kurtosis)
            agree(repr((*settings, self.shrink)), list(self._record.masks.values()), list(self.ranks.initial.items()))

            # From here on something changes. Carriers are placed now, because modules do not change while training.
            put_carriers(inner, placed)
            try:
                self.scores = BlockScores(self.model, {block.kind for block in self.blocks.values()}, decay, kurtosis)
            except BaseException:
                take_carriers(inner, placed)
                raise
            self._observed, self._stepped, self._taken, self._since = False, False, False, 0  # _taken: counted when its change is made
            self._handles = [one.register_step_post_hook(self._note_step) for one in optimizers]
            note_controller(self.model, self)
        say_unpruned(inner, self.blocks, self.config, density is not None)
        self.importance.advice.of_growth(model, self.ranks.growing())

    # -- what others may ask -----------------------------------------------------------------------------------------

    @property
    def blocks(self) -> Blocks:
        """The blocks that it prunes, as they are now."""
        return self._record.pruned

    @property
    def density(self) -> float:
        """The share of the budget's cost before the first cut that blocks with a mask above 0 have, whoever has set the masks."""
        return self.cost.total(self._record.counts()) / self._dense if self._dense else 1.0

    @property
    def progress(self) -> float:
        """0 until density begins to fall, 1 from the last event on, linear between: the weight of a distillation loss in the paper."""
        return min(max((self.now - self.steps.warm_end) / (self.steps.end - self.steps.warm_end), 0.0), 1.0)

    @property
    def done(self) -> bool:
        """Whether the last event has been: masks and ranks do not change any more."""
        return self.now >= self.steps.end

    @property
    def listening(self) -> bool:
        """Whether it still has hooks on the model: until the last event has been or `remove` is called."""
        return self.scores.salience.listening

    @property
    def adapter_parameters(self) -> int:
        """Entries of all factors in use, frozen ones too, of the sizes before the first cut: the budget is of ranks."""
        return self.ranks.parameters(self.ranks.ranks())

    @property
    def importance(self) -> AdapterImportance:
        """Of its adapters with a rank."""
        return self.ranks.importance

    def original(self, name: str) -> Tensor:
        """What is kept of block `name`, in the numbering before the first cut: int64 [kept], ascending. ValueError for an unknown name."""
        return self._record.original(name)

    # -- the loop ----------------------------------------------------------------------------------------------------

    def observe(self) -> None:
        """Call it before every optimizer step, after the last backward: reads the gradients while they are there.

        Raises RuntimeError where there are none: no backward since the last step, or zero_grad() was first; where `step()` did not follow
        the optimizer's last step.
        """
        if self.listening:
            self._follow_cut("observe")
            came = gradients_came(self.importance.adapters.values(), bool(self.blocks), self.scores.salience.heard)
            if self._stepped:
                raise RuntimeError(
                    "observe: expected step() after the optimizer's step, got another backward first; call backward(), observe(), "
                    "optimizer.step() and step() in this order"
                )
            self._observed = came
            self.importance.observe()

    def step(self) -> None:
        """Call it after every optimizer step: counts it and, where the schedule says so, moves masks and lets ranks grow. Without an
        optimizer step since the last call (micro-batches, a step that GradScaler skipped) nothing is counted.

        Raises RuntimeError where observe() was not called; where masks were set by others, where salience is not finite or 0 everywhere,
        where a change is refused (a merged adapter, a Parameter that DDP holds without max_rank, ranks of a process group that disagree)
        with masks and ranks as before; the next call of step() makes the change.
        """
        self._since = 0
        if not (self._stepped or self._taken):
            self.scores.salience.drop_overflow()
            return
        if not self.done:
            self._follow_cut("step")
            if self._stepped:
                observed, self._observed, self._stepped = self._observed, False, False
                if not observed:
                    raise RuntimeError("step: expected observe() before the optimizer's step, got none that found the gradients")
                self.scores.salience.update()
                self.importance.update()
                self._taken = True
        threshold = None
        if self.now != self.total_steps:  # equal: a run that takes longer than it was said to
            self.now += 1
            try:
                threshold = self._change() if self.now <= self.steps.end else None
            except BaseException:
                self.now -= 1
                raise
        self._stepped = self._taken = False
        if self.now == self.steps.end:
            self._tell_model()
            self._record.let_take_part(False)
            self.scores.salience.remove()
        if threshold is not None:
            self._note_event(threshold)

    def _follow_cut(self, call: str) -> None:
        """Go on with what is left of a model that was cut, by whomever. RuntimeError where a backward came before the cut."""
        kept = self._record.follow_cut()
        if kept is None:
            return
        fits = self.scores.follow_cut(kept)
        self.importance.follow_cut()
        blocks, config = self._record.pruned, self.config
        self.groups = groups_of(self.model.model, blocks, config.round_to, config.uniform, self.floor) if blocks else []
        if not fits:
            remedy = "call step() again" if call == "step" else "run the backward again"
            raise RuntimeError(
                f"{call}: the model was cut between a backward and this call, so what that backward told of its blocks has other sizes "
                f"and was dropped; cut between step() and a backward; now call zero_grad(), and {remedy}"
            )

    def remove(self) -> None:
        """Take every hook off the model and the optimizer; masks and ranks stay as they are."""
        self._record.let_take_part(False)
        self.scores.salience.remove()
        while self._handles:
            self._handles.pop().remove()

    def _note_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        overflow = getattr(optimizer, "found_inf", None)  # GradScaler leaves it to a fused optimizer to skip
        if isinstance(overflow, Tensor) and bool(overflow.item()):
            return
        self._stepped = True
        self._since += 1
        if not self.done:
            self._tell_model()
        if self._since == _FORGOTTEN and not self.done:
            warnings.warn(
                f"Controller: {_FORGOTTEN} optimizer steps without Controller.step(): masks and ranks do not change; call observe() "
                "before and step() after each of them",
                stacklevel=4,
            )

    def _tell_model(self) -> None:
        """Leave on the model the density that it is to reach, and whether it has; nothing where nothing is pruned."""
        if self.blocks:
            self.model.target = Target(self.config.density, self.budget, self.done)

    # -- changes -----------------------------------------------------------------------------------------------------

    def _change(self) -> float | None:
        """What the schedule says for this step; the salience of the last chunk that stays, where it is an event."""
        event = self.now in self.steps.events
        with agreement.change(f"step {self.now} of the Controller") as agree, one_search():
            masks, threshold = self._next_masks(hard=event)
            ranks = self.ranks.next(self.now, self.steps) if event else {}
            cuts = event and self._cuts(masks)
            if masks or ranks or cuts:
                touched = {side.module for name in masks for side in self.blocks[name].sides} | ranks.keys()
                check_change(self.model, touched, ranks, self.optimizer)
                cut = self._checked_cut(masks) if cuts else None
                gone = [] if cut is None else list(cut.gone.kept.values())
                agree(list(masks), list(masks.values()), sorted(ranks.items()), list(self.ranks.ranks().items()), gone)
                self._make(masks, ranks, cut)
        if not event:
            return None
        self._record.note_live()
        if self.shrink == "compact" and not self._compacted and not self._record.everything_is_kept():
            self._turn_compact()
        self.importance.restart()
        return threshold

    def _cuts(self, masks: Mapping[str, Tensor]) -> bool:
        """Whether there is something to cut at this event, which brings these masks."""
        gone = any(not bool({**self._record.masks, **masks}[name].all()) for name in self.blocks)
        if gone and self.shrink == "cut" and self._by_default and self.model.blocks.origin is None:  # or compiled, or wrapped, by now
            self.shrink = chosen_mode(None, self.model, self.model, self.blocks, self.ranks.adapters, optimizers_of(self.optimizer))
        return gone and self.shrink == "cut"

    def _checked_cut(self, masks: Mapping[str, Tensor]) -> Cut:
        """A cut at the zeros of what it prunes; those that others have set elsewhere may come back."""
        ones = {name: torch.ones(block.count, device="cpu") for name, block in self.model.blocks.items()}
        pruned = {name: self._record.masks[name] for name in self.blocks}
        return self.model.checked_cut(self.optimizer, {**ones, **pruned, **masks})

    def _make(self, masks: Mapping[str, Tensor], ranks: Mapping[str, int], cut: Cut | None) -> None:
        for name, mask in masks.items():
            self.model.set_block_mask(name, mask)
            self._record.masks[name] = mask
        if cut is not None:
            self.model.make_cut(cut)
            self._follow_cut("step")
        self._record.let_take_part(self.now < self.steps.end)
        self.ranks.grow(ranks, self.optimizer, self.generator)

    def _next_masks(self, hard: bool) -> tuple[dict[str, Tensor], float]:
        """The masks that change at this step, and the salience for its cost of the last chunk that stays."""
        density = self.steps.density(self.now, min(self.config.density, self._initial), self._initial)
        if density is None or not self.blocks:
            return {}, float("inf")
        if self.steps.begins_window(self.now):
            self.scores.look_for_outliers()
        budget = allowance(density, self._dense)
        record, counts = self._record, self._record.counts()
        live = {name: record.live[name] for name in self.blocks}
        found = search(checked_scores("step", self.scores.scores()), live, self.groups, self.cost, counts, budget, self.joint)
        for name in found.keep:
            if not torch.equal(host_mask(self.model.model, self.blocks[name]), record.masks[name]):
                raise RuntimeError(
                    f"step: expected block {name!r} under the mask that this Controller gave it, got another; nobody else sets the "
                    f"masks of {self.config.prune} while it is at work: call remove() and make another for the steps that are left"
                )
        old, keep = torch.cat([record.masks[name] for name in found.keep]), torch.cat(list(found.keep.values()))
        last = hard and (not self.steps.per_step or self.now == self.steps.end)
        new = keep.to(old.dtype) if last else step_mask(old, keep, self.steps.window)
        masks = dict(zip(found.keep, torch.split(new, [self.blocks[name].count for name in found.keep]), strict=True))
        return {name: mask for name, mask in masks.items() if not torch.equal(mask, record.masks[name])}, found.threshold

    def _turn_compact(self) -> None:
        if not any(is_sharded(adapter.lora_A) for adapter in self.importance.adapters.values()):
            self.model.compact()
        self._compacted = True

    def _note_event(self, threshold: float) -> None:
        kept, ranks = self._record.counts(), self.ranks.ranks()
        self.history.append(event(self.now, self.density, kept, ranks, self.adapter_parameters, threshold))
        (self.log or partial(logger.info, "%s"))(line(self.history[-1], self.config.density, self.blocks))

    # -- stop and go on ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values: with the model's and the optimizer's states, all that a run needs to go on. Taken after `step`."""
        self._follow_cut("state_dict")
        record = self._record
        others = record.others()
        live = {**record.live, **{name: mask != 0 for name, mask in others.items()}}
        return {
            "step": self.now,
            "scores": self.scores.state_dict(),
            "importance": self.importance.state_dict(),
            "generator": self.generator.get_state(),
            "masks": {name: mask.clone() for name, mask in {**record.masks, **others}.items()},
            "live": {name: kept.clone() for name, kept in live.items()},
            "ranks": self.ranks.ranks(),
            "initial": {
                "density": self._initial,
                "parameters": self.ranks.parameters(self.ranks.initial),
                "ranks": dict(self.ranks.initial),
            },
            "schedule": settings_of(self),
            "shrink": self.shrink,
            "history": copy.deepcopy(self.history),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, after the model and the optimizer have loaded theirs. It goes on bit for bit with the same `shrink`.

        Nothing has changed when this raises TypeError or ValueError (it is no state of a Controller made alike, or damaged; the model's
        masks or ranks are not those of the state; the schedule is another) or RuntimeError (this Controller has finished, or was removed).
        """
        self._follow_cut("load_state_dict")
        masks = {name: self.model.get_block_mask(name).cpu() for name in self.model.blocks}
        check_state(state, {**self.state_dict(), "masks": masks})
        history = checked_history("state['history']", state["history"], state["step"])
        self.scores.check_state(state["scores"])
        self.importance.check_state(state["importance"])
        step = state["step"]
        if step < self.steps.end and not self.listening:
            raise RuntimeError(f"load_state_dict: this Controller listens no more; make another to go on from step {step}")
        density = self.cost.total({name: int((mask != 0).sum()) for name, mask in masks.items()}) / self._dense if self.blocks else 0.0
        check_place(step, self.steps.end, self.total_steps, [masks[name] for name in self.blocks], density, self.config.density)
        if state["step"] and self.blocks and not state["scores"]["salience"]["scores"]:
            raise ValueError(f"state['scores']: expected the salience of blocks after {state['step']} steps, got none")
        self.ranks.check_initial(state["initial"])
        if self.shrink == "compact" and not all(bool(live.all()) for live in state["live"].values()):
            self._turn_compact()  # it may be refused, and what follows cannot
        self.scores.load_state_dict(state["scores"])
        self.importance.load_state_dict(state["importance"])
        self.generator.set_state(state["generator"].cpu())
        self.now, self.history = state["step"], history
        self._record.masks, self._record.live = masks, {name: live.cpu().clone() for name, live in state["live"].items()}
        self._record.let_take_part(self.now < self.steps.end)
        self._initial = state["initial"]["density"]
        self.ranks.begin(state["initial"]["ranks"])
        self._observed, self._stepped, self._taken, self._since = False, False, False, 0
        if self.now:
            self._tell_model()
        if self.done:
            self.scores.salience.remove()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `state_dict()` into the directory `path`, which is made if it is missing, as safetensors and JSON.

        It may be the directory of the model's `save_pretrained`. Whenever the process is killed, `load` finds the old state or the new.
        """
        state_directory.save(path, self.state_dict())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from what `save` wrote, after the model and the optimizer have loaded theirs; ValueError naming the file."""
        state_directory.load(path, self.load_state_dict)
