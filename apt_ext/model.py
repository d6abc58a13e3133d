"""A whole model with adapters: build it, mask its blocks, save and load what was trained, and get an ordinary model back."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .adapter.layer import APTAdapter
from .adapter.state_dict import check_loadable
from .common.checks import checked_bool, checked_mapping, checked_module
from .config import APTConfig, nearest
from .distributed import agreement
from .optim.initial_state import OptimizerLike
from .optim.step_guard import guard
from .pruning.architectures.lookup import Block, Blocks
from .pruning.block_masks import (
    get_mask,
    missing_block,
    set_mask,
    take_carriers,
)
from .pruning.cost import density_of
from .pruning.cut_in_place import Cut, checked_cut
from .pruning.float32_heads import follow
from .pruning.target import KEY, Target, save_target, target_after
from .storage import checkpoint, hub, stock_saving
from .wrapping import compact_model, cut_states, model_state, peft_factors, run_state, saving, unload, use_cache
from .wrapping.bases import refuse_peft
from .wrapping.build import Adapted, build
from .wrapping.compiled import unwrap
from .wrapping.disabling import without_adapters
from .wrapping.fused_losses import tell_of_output_adapter
from .wrapping.module_hooks import drop_copied_hooks
from .wrapping.shared_inputs import link_shared_inputs
from .wrapping.state_hooks import load_cuts, save_cuts

logger = logging.getLogger("apt_ext")


def adapters(model: nn.Module) -> Iterator[tuple[str, APTAdapter]]:
    """(name, adapter) of every adapter in an APTModel or any other module, rank-0 carriers of masks included.

    Names are those before wrapping, "bert.encoder.layer.0.attention.self.query", also where DDP or torch.compile holds the APTModel.
    """
    return _adapters(checked_module("model", model))


def _adapters(model: nn.Module) -> Iterator[tuple[str, APTAdapter]]:
    prefix = ""
    for name, module in model.named_modules():
        if isinstance(module, APTModel):
            prefix = f"{name}.model." if name else "model."
        elif isinstance(module, APTAdapter):
            yield name.removeprefix(prefix), module


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every trainable Parameter that has entries, each once, in the order of the modules: factors and modules_to_save."""
    return [parameter for parameter in checked_module("model", model).parameters() if parameter.requires_grad and parameter.numel()]


def get_apt_model(model: nn.Module, config: APTConfig) -> APTModel:
    """Put adapters into `model`, in place, and freeze everything but them and `config.modules_to_save`.

    Of a model that `torch.compile` has wrapped the module inside is taken. The logger "apt_ext" says so, and says what
    of the model was drawn at random, gets a lower rank, holds experts without adapters or trains in float16.

    Every linear of heads and neurons is wrapped as well, with rank 0 if it is no target: their masks change later without changing the
    modules. What only the hidden dimensions touch (embeddings, norms, output layers) is wrapped when they are first masked.

    Raises TypeError (not a module, a model of PEFT, a quantised or fused linear), ValueError (a name that matches
    nothing, with the nearest names; a rank that does not fit; a weight that is tied or not finite; a model with
    adapters), naming the module; the model is then as before.
    """

    with build(model, config) as built:
        apt = APTModel(built.model, config, built.blocks, built.saved)
        apt._begin()
        tell_of_output_adapter(built.model)
    return apt


class APTModel(Adapted):
    """A model with adapters; made by `get_apt_model` or `APTModel.from_pretrained`. `forward` and unknown attributes are the model's own.

    An instance's class is a subclass with the name and the forward signature of the model's class, by which Trainer finds labels
    and columns.

    model       the model itself, with adapters in the place of linears
    apt_config  the APTConfig that it was built with
    blocks      {name: Block}: what can be pruned: "<layer>.heads", "<layer>.neurons" ("encoder.<layer>..." and "decoder.<layer>...", with
                "decoder.<layer>.cross_heads", in encoder-decoders), and "hidden", the dimensions of the residual stream
    saved       the names of the modules that train whole, and of lone Parameters that do
    target      the Target of the last Controller that worked on it; None: none did
    controller_state  the Controller's state in the Trainer checkpoint that was loaded last; None: there was none
    trained_by  how many processes trained that together; None: no such checkpoint was loaded
    use_cache_before  `use_cache` of the model's config when the adapters came, which Trainer changes; None: it says none
    """

    controller_state: dict[str, Any] | None = None
    trained_by: int | None = None
    use_cache_before: bool | None = None
    _target: Target | None = None

    def __init__(self, model: nn.Module, config: APTConfig, blocks: Blocks, saved: list[str]) -> None:
        super().__init__()
        self._register_state_dict_hook(save_target)  # type: ignore[no-untyped-call]
        self._register_state_dict_hook(save_cuts)  # type: ignore[no-untyped-call]
        self._register_load_state_dict_pre_hook(load_cuts, with_module=True)  # type: ignore[no-untyped-call]
        self.model = model
        self.apt_config = config
        self._blocks = blocks
        self.saved = saved
        self._chained = False
        self.use_cache_before = use_cache.said(model)
        link_shared_inputs(model, blocks.values())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # copy and pickle look for special methods, and for anything on an object that has no model yet: those are not the model's
            if name == "model" or name.startswith("__"):
                raise
            return getattr(super().__getattr__("model"), name)

    @property
    def blocks(self) -> Blocks:
        """{name: Block}: what can be pruned."""
        return self._blocks

    @blocks.setter
    def blocks(self, blocks: Mapping[str, Block]) -> None:
        self._blocks = blocks if isinstance(blocks, Blocks) else Blocks(self._blocks.row, blocks)
        stock_saving.note(self)
        link_shared_inputs(self.model, blocks.values())

    @property
    def target(self) -> Target | None:
        """What the last Controller that worked on it was to leave; None: none did."""
        return self._target

    @target.setter
    def target(self, target: Target | None) -> None:
        self._target = target
        stock_saving.note(self)

    @property
    def hidden_left(self) -> Tensor | None:
        """The hidden dimensions that cuts have left, int64 [left], as numbered before the first; None: all."""
        origin = self.blocks.origin
        left = None if origin is None else origin.left.get("hidden")
        return None if left is None or bool(left.all()) else left.nonzero().flatten()

    @property
    def density(self) -> float:
        """The share of the layers' parameters before the first cut that masks above 0 keep; embeddings and adapters do not count."""
        return density_of(self.model, self.blocks)

    # -- blocks ------------------------------------------------------------------------------------------------------

    def set_block_mask(self, name: str, mask: Tensor) -> None:
        """Mask block `name` consistently on everything that it touches; a fractional value acts once.

        mask [count], floating, values in [0, 1], any device. Nothing has changed when this raises ValueError (unknown name, shape, value),
        TypeError, or RuntimeError (an adapter of the block is merged; ranks of a process group disagree).
        """
        with agreement.change(f"set_block_mask {name!r}") as agree:
            set_mask(self.model, name, self.block(name), mask, agree)

    def get_block_mask(self, name: str) -> Tensor:
        """A copy of the mask of block `name`, float32 [count]. ValueError for an unknown name."""
        return get_mask(self.model, self.block(name))

    def block(self, name: str) -> Block:
        """The block of this name; ValueError names what is near, TypeError what is no name."""
        if not isinstance(name, str):
            raise TypeError(f"name: expected a str, got {type(name).__name__}")
        if name not in self.blocks:
            raise ValueError(missing_block(self.model, name, self.blocks, nearest(name, self.blocks)))
        return self.blocks[name]

    def cut(self, optimizer: OptimizerLike | None = None) -> APTModel:
        """Remove what the masks prune (exact zeros) from the model in place, keep its adapters, and return it; training goes on.

        Weights, factors, masks, gradients and the state of `optimizer` (one, a list, or accelerate's wrapper) are cut with it; every
        Parameter stays the same object, and the blocks are numbered anew. An optimizer that is not given raises at its next step. Where
        `shrink` lets one head or neuron stay, it stays here under its mask of zero. A rank may then be above min(N, K) of its linear. A
        Controller at work goes on with what is left, if this comes after its `step` and before the next backward.

        Nothing has changed when this raises ValueError (layers that have to keep the same heads, nothing kept of the residual stream) or
        RuntimeError (an adapter is merged; optimizer state that cannot be resized; a Parameter that DDP or FSDP holds; ranks of a process
        group that disagree).
        """
        with agreement.change("cut") as agree:
            cut = self.checked_cut(optimizer)
            agree(*cut.gone.kept.values())
            self.make_cut(cut)
        return self

    def checked_cut(self, optimizer: OptimizerLike | None = None, masks: Mapping[str, Tensor] | None = None) -> Cut:
        """A cut that was checked as `cut` does and has not been made; `masks` {block: [count]} are to come before it is."""
        return checked_cut(self.model, self.blocks, optimizer, masks)

    def make_cut(self, cut: Cut) -> None:
        """Make a cut of this model that was checked."""
        if not cut.is_empty:
            self.blocks = cut.make()

    def compact(self, on: bool = True, dense: str = "keep", chain: bool = False) -> None:
        """`APTAdapter.compact` for every adapter: forward and backward cost what is kept from now on. Modules that train whole do not.

        With `chain` the linears of a block of neurons hand over kept channels alone, [..., kept] in whole 16 bytes instead of [..., N], so
        activations between them cost what is kept, too; what computes there must be elementwise and finite at 0, as in every architecture
        of the table. Their shapes then follow the masks: a compiled model compiles once more at the first change. A weight that is tied to
        another module's is kept whatever `dense` says.

        The copies take the bytes of what is kept, beside all weights. Where little or nothing is pruned that
        is a second set of weights, and one line of the logger "apt_ext" says so. `cut` needs none.

        Nothing has changed when this raises TypeError, ValueError or RuntimeError (an adapter is merged, sharded by FSDP or on meta; not
        enough memory).
        """
        if checked_bool("chain", chain) and on is False:
            raise ValueError("chain must be False where on is False, since full-size layers hand over all channels, got True")
        undo, chained = compact_model.compact(self.model, on, dense), self._chained
        try:
            self._chained = on and chain
            self._link_chains()
        except BaseException:
            undo()
            self._chained = chained
            raise
        compact_model.say_memory(self.model)

    def _link_chains(self) -> None:
        compact_model.link_chains(self.model, self.blocks.values() if self._chained else ())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        drop_copied_hooks(self)
        self._link_chains()  # copies of adapters are not chained
        link_shared_inputs(self.model, self.blocks.values())  # and share nothing
        self._begin()

    # -- counting ----------------------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) entries; rows that max_rank reserves and the rank does not use yet count in neither."""
        counts = {parameter: parameter.numel() for parameter in self.parameters()}
        for _, adapter in adapters(self):
            counts[adapter.lora_A] = adapter.rank * adapter.in_features
            counts[adapter.lora_B] = adapter.rank * adapter.out_features
        trainable = sum(count for parameter, count in counts.items() if parameter.requires_grad)
        return trainable, sum(counts.values())

    def print_trainable_parameters(self) -> None:
        """Print them as PEFT does."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / max(total, 1):.4f}")

    # -- the target --------------------------------------------------------------------------------------------------

    @property
    def target_density(self) -> float | None:
        """The density that the last Controller was to reach; None where no Controller has pruned this model."""
        return None if self.target is None else self.target.density

    @property
    def target_reached(self) -> bool:
        """False from a Controller's first optimizer step until its last event, and for good where it never came to that."""
        return self.target is None or self.target.reached

    def refuse_unfinished(self, call: str) -> None:
        """Raise RuntimeError, with the present and the target density, where `target_reached` is False. `call` begins the message."""
        if self.target is None and self.apt_config.prune and self.apt_config.density < self.density == 1.0:
            logger.warning(
                "%s: nothing is pruned, because no Controller has worked on this model, whose config asks for a density of %g; train with "
                "apt_ext.Controller or, in Trainer, apt_ext.hf.APTCallback",
                call,
                self.apt_config.density,
            )
        if self.target is not None and not self.target_reached:
            raise RuntimeError(
                f"{call}: the model is not finished: its masks keep {self.density:.4f} of the layers' "
                f"parameters, and its Controller, whose target is a density of {self.target.density:g} ({self.target.budget}), has "
                "not made its last event; train on to that, load a checkpoint from after it, or pass unfinished=True to take the "
                "model as it is"
            )

    # -- the base model ----------------------------------------------------------------------------------------------

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within this context every adapter is the model's own linear, without masks; a merged one is unmerged and merged again after.

        Modules that train whole (modules_to_save) stay as they are trained.
        """
        with without_adapters(self.model):
            yield

    def merge_and_unload(self, *, unfinished: bool = False) -> nn.Module:
        """The model itself with adapters and masks merged into its linears, which are back in their places; full shapes, frozen as it was.

        This APTModel has no adapters and no blocks afterwards, and `use_cache` of the model's config is what it was when the adapters came.
        RuntimeError where a merged weight would not be finite, where dimensions of the residual stream or others that a norm
        runs over are pruned (a stock norm over all of them computes something else;
        `shrink` cuts them), and where a Controller has not reached its density unless `unfinished`; all is then as before. Every layer is
        checked before the first is written, and nothing of the size of a weight is allocated.
        """
        if not checked_bool("unfinished", unfinished):
            self.refuse_unfinished("merge_and_unload")
        unload.merge_and_unload(self.model, self.blocks)
        use_cache.restore(self.model, self.use_cache_before)
        self.blocks = Blocks(self.blocks.row)
        return self.model

    # -- save and load -----------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Write adapters, masks, the modules that train whole and what cuts have left into the directory `path`, made if it is missing.

        Three files: apt_config.json, apt_model.safetensors, and apt_manifest.json with their sizes and hashes; other files there stay.
        They are complete on the disk before anything changes, and take the place of older ones in one step: whenever the process is killed,
        `from_pretrained` finds the old state or the new, whole, and the next save removes what was left over.
        ValueError where `path`, or a directory of such a name in it, is in the way; OSError (disk full, read-only) leaves what was there.
        The `save_pretrained` of the model inside, which a Trainer that was given it calls, writes the same.

        options of the stock method, as Trainer and accelerate give them:
            is_main_process  False: nothing is written
            state_dict       gathered values, as FSDP needs it; None: the model's own
            push_to_hub      refused with RuntimeError
        Where one of the first two is given, the tensors go into model.safetensors, with a Controller's state, and a Trainer resumes from
        that. Others do not matter.
        """
        if options.get("push_to_hub"):
            stock_saving.refuse_push()
        if options.get("is_main_process", True):
            saving.save(self, path, options.get("state_dict"), for_trainer=not options.keys().isdisjoint(("is_main_process", "state_dict")))

    def push_to_hub(self, repo_id: str, *, unfinished: bool = False, **options: Any) -> str:
        """Export the shrunk model, verified as by `apt_ext.export`, and upload the directory to the Hub; returns the URL of the commit.

        repo_id  "you/model", made if it is missing. Weights there of earlier pushes go in the same commit; files of other names stay
        options  private, token (None: the one of `hf auth login` or HF_TOKEN), commit_message, revision (a branch, made if it is missing),
                 create_pr, and tokenizer, max_shard_size, per_layer, metrics of `apt_ext.export`

        RuntimeError where a Controller has not reached its density unless `unfinished`, without a token, and for what the Hub answers;
        ValueError and TypeError of `apt_ext.export`; ImportError without huggingface_hub. The model inside has the same method.
        """
        if not checked_bool("unfinished", unfinished):
            self.refuse_unfinished("push_to_hub")
        return hub.send(self, repo_id, unfinished=unfinished, **options)

    @classmethod
    def from_pretrained(cls, base_model: nn.Module, path: str | os.PathLike[str]) -> APTModel:
        """`base_model` with the adapters that `save_pretrained` wrote to the directory `path`, in place as in `get_apt_model`.

        The files are read into memory, no larger than this model explains; pickle is never read, links are not followed. What was saved
        after a cut cuts `base_model` alike, which may be the model as it was or one that was cut alike. A base of another name or class
        than the adapters were trained on is named in one line of the logger "apt_ext". Raises ValueError naming the
        file when it is missing, damaged or made for another model; `base_model` is then as before.
        """
        with checkpoint.opened(path) as saved:
            config = saved.config()

            with build(base_model, config, saved.saved_in) as built:
                apt = cls(built.model, config, built.blocks, built.saved)
                if saved.stream:
                    model_state.place_stream_carriers(built.model, built.blocks)
                with saved.tensors(apt.own_state(), apt.blocks.full) as tensors:
                    apt.controller_state, apt.trained_by = run_state.controller_state(tensors), run_state.processes_of(tensors)
                    apt.load_own_state(tensors if apt.trained_by is None else run_state.own(tensors), check=True)
                apt.target = saved.target
                apt._begin()
            if saved.base is not None:
                saved.base.tell_of_another(apt.model)
            return apt

    @classmethod
    def from_peft(cls, base_model: nn.Module, peft: Any, config: APTConfig | None = None) -> APTModel:
        """Put the factors of an adapter that PEFT trained into `base_model`, in place as in `get_apt_model`.

        peft    a directory that PEFT wrote (safetensors), or a PeftModel with one adapter over another copy of the
                model; it is only read
        config  None: PEFT's ranks, scalings, dropout, targets and modules_to_save, by name. Another must have all of
                those targets, with their ranks and scalings (`APTConfig.from_peft(lora_config, density=0.5)`)

        A rank above min(out_features, in_features), which PEFT allows, becomes that, with the same product. Raises
        what `APTConfig.from_peft` does, and ValueError naming the file, tensor or module that does not fit;
        `base_model` is then as before.
        """
        lora = peft_factors.read(peft)
        refuse_peft("base_model", checked_module("base_model", base_model))
        unwrapped = unwrap(base_model)
        try:
            settings = lora.config(unwrapped.module) if config is None else config
        finally:
            unwrapped.restore()

        with build(base_model, settings) as built:
            apt = cls(built.model, settings, built.blocks, built.saved)
            found = dict(adapters(apt))
            lora.check(built.model, found, built.saved)
            lora.write(built.model, found)
            apt._begin()
        return apt

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """torch's own, with one wait for each device, whatever the number of adapters."""
        with model_state.settled_state(self.model):
            return super().state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """torch's own, and nothing is loaded where it raises. A state with masks of hidden dimensions brings what carries them; one from
        before they were masked sets them to ones. A state of a model that was cut cuts this one alike, without an optimizer's state.

        TypeError for no dict or no tensor, ValueError for another size, for a state that was cut less than this model and what an adapter
        refuses, RuntimeError for keys where `strict`.
        """
        checked_mapping("state_dict", state_dict)
        processes = run_state.processes_of(state_dict)
        complete = processes is not None  # without the base
        if complete:
            run_state.check(state_dict, run_state.scalings_of(self.model))
        controller, state_dict = run_state.controller_state(state_dict), run_state.without_run(state_dict)
        target_after(self.target, state_dict)  # refused before anything changes
        left = cut_states.read(state_dict, self.blocks)  # likewise
        placed: dict[str, nn.Module] = {}
        if model_state.holds_stream_masks(state_dict, self.blocks, "model."):
            placed = model_state.place_stream_carriers(self.model, self.blocks)
        try:
            if left is None:
                cut_states.refuse_less_cut(state_dict, self.blocks, "model.")
            with cut_states.cut_to(self.model, self.blocks, left) as blocks:
                state_dict = model_state.with_carriers(self.model, state_dict, "model.")
                own = {key: value for key, value in cut_states.without(state_dict).items() if key != KEY}
                if complete:
                    self._check_own(run_state.own(own), blocks)
                check_loadable(self, own, strict and not complete)
        except BaseException:
            take_carriers(self.model, placed)
            raise
        self.blocks = blocks
        loaded = super().load_state_dict(state_dict, strict and not complete, assign)
        self.controller_state, self.trained_by = controller, processes
        self._guard_trained()  # with `assign` Parameters are others
        return type(loaded)([], []) if complete else loaded

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> APTModel:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        follow(self, fn)
        return self

    def _begin(self) -> None:
        """Complete a new model, or a copy."""
        stock_saving.install(self)
        self._guard_trained()

    def _guard_trained(self) -> None:
        """Let no optimizer step a Parameter that trains while its state has another shape."""
        guard(*(parameter for parameter in self.parameters() if parameter.requires_grad))

    def own_state(self) -> dict[str, Tensor]:
        """What belongs in a checkpoint, with the keys of the inner model's state_dict: adapters without frozen bases, and `saved`.

        Of a model that was cut, what cuts have left, too (see `cut_states`).
        """
        return model_state.own_state(self.model, self.saved) | cut_states.tensors_of(self.blocks)

    def load_own_state(self, tensors: Mapping[str, Tensor], check: bool = False) -> None:
        """Load what `own_state` returned; a state that was cut cuts this model alike.

        check  the tensors were not checked: ValueError unless they are this model's in name, shape and dtype

        Nothing has changed when this raises, but what an adapter refuses leaves adapters unmerged.
        """
        with cut_states.cut_to(self.model, self.blocks, cut_states.read(tensors, self.blocks)) as blocks:
            own = cut_states.without(tensors)
            if check:
                self._check_own(own, blocks)
            model_state.load_own_state(self.model, self.saved, own)
        self.blocks = blocks

    def _check_own(self, own: Mapping[str, Tensor], blocks: Blocks) -> None:
        """ValueError unless the tensors are those of this model, which has these blocks now."""
        cut_states.raise_rank_limits(self.model, blocks)
        limits = {name: adapter.rank_limit for name, adapter in adapters(self)}
        checkpoint.check(own, model_state.own_state(self.model, self.saved), limits)
