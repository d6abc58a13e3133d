"""How much each block of a model matters: compressed activation salience (Eq. 4-5 of the paper) and its moving average."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ... import _C
from ...common.checks import FLOATING, checked_int, checked_keys, checked_mapping
from ...distributed import agreement
from ...wrapping.module_hooks import ModuleHook
from .attention_masks import Passes
from .moving_average import Averages


class Salience:
    """S~(j) = (sum over tokens |H_j|) * (sum over tokens |dL/dH_j|), a product of two sums, averaged over optimizer steps.

    H is what a block hands on: the input of the linear that reads it (the down projection for neurons, the output projection for heads).
    A block of several channels (a head) has the sum of their products. Only vectors of one entry a channel are kept, whatever the batch
    and length. An activation counts when its gradient arrives, so passes without gradients (a teacher's, an evaluation's) and the
    recomputation of gradient checkpointing leave the state unchanged. (Checkpointing itself makes transformers ask for the gradient of the
    first layer's input, which hidden dimensions then hear as well.)

    Tokens that `attention_mask` [batch, length] marks 0 (padding) count on neither side, where H is [batch,
    length, channels]; elsewhere (a feed-forward in chunks) all count, with a warning. It is the mask of the
    outermost module that was called and takes one with the batch: the model, its body, one stack of two.
    Without a mask all tokens count. With one of another shape, and in layers that were called by hand, all
    count as well, with one warning. At the sites of a decoder behind an encoder it is
    `decoder_attention_mask`, or `attention_mask` of a decoder that is called alone.

    The ranks of a process group add up their sums, and all have the scores of the joint batch. A copy of the
    model (deepcopy, pickle, torch.save) is not listened to and has no hooks.

    model    the module that is given the masks, by name or in the order of its forward; only they are looked at
    sites    for each block family's name: the module whose input is H, and the number of blocks in it; channels of one block are adjacent
    decay    S <- decay * S + (1 - decay) * S_now at each update (0.85 in the paper), started at 0, no bias correction
    signed   the names of sites whose sum of H with its sign is averaged as well, in `means`
    decoder  the names of sites in a decoder behind an encoder
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[str, tuple[nn.Module, int]],
        decay: float = 0.85,
        signed: Collection[str] = (),
        decoder: Collection[str] = (),
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a Module, got {type(model).__name__}")
        for name, site in checked_mapping("sites", sites).items():
            if not (isinstance(site, tuple) and len(site) == 2 and isinstance(site[0], nn.Module)):
                raise TypeError(f"sites[{name!r}] must be (the module that reads H, the number of blocks in it), got {site!r:.80}")
            checked_int(f"sites[{name!r}][1]", site[1], 0)
        self._scores, self._means = Averages(decay), Averages(decay)
        self._counts = {name: count for name, (_, count) in sites.items()}
        self._signed, self._decoder = frozenset(signed), frozenset(decoder)
        self._listeners = {name: _C.Listener(name in self._signed) for name in sites}
        behind = [module for name, (module, _) in sites.items() if name in self._decoder]
        others = [module for name, (module, _) in sites.items() if name not in self._decoder]
        self._passes = Passes(model, behind, others)
        self._unmasked: set[str] = set()  # sites whose activations are not [batch, length, channels]
        # {(site, kind): why padding counted there} since the last update
        self._doubts: dict[tuple[str, str], str] = {}
        self._said: set[str] = set()  # kinds that a warning has said
        self._model = weakref.ref(model)
        self._handles: list[RemovableHandle] = self._passes.hooks()
        for name, (module, _) in sites.items():
            self._handles.append(module.register_forward_pre_hook(ModuleHook(module, self._hearer(name))))
        _listening.add(self)
        _forget_compiled()

    @property
    def scores(self) -> dict[str, Tensor]:
        """[count] float32 each, once updated; to be read only."""
        return self._scores.named

    @property
    def means(self) -> dict[str, Tensor]:
        """[channels] each, of H up to one factor; to be read only."""
        return self._means.named

    def _hearer(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        hear, mask = self._listeners[name].hear, "decoder_attention_mask" if name in self._decoder else "attention_mask"

        def collect(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not torch.is_grad_enabled():
                return
            if not args:
                raise TypeError(f"site {name!r}: expected H as the first positional argument of {type(module).__name__}")
            here = self._passes.here()
            if here is None:
                tokens = None
                if self._passes.told:
                    why = "its layer was called outside of any module that takes the batch"
                    self._doubts[name, "by hand"] = why
            else:
                tokens = here.masks.get(mask)
                if mask in here.unread:
                    self._doubts[name, "unread"] = here.unread[mask]
            if not hear(args[0], tokens, getattr(module, "input_positions", None)) and tokens is not None:
                self._warn_of_padding(name, args[0], mask, tokens)

        return collect

    def _warn_of_padding(self, name: str, h: Tensor, mask: str, tokens: Tensor) -> None:
        if name not in self._unmasked:
            self._unmasked.add(name)
            warnings.warn(
                f"Salience: padding counts at site {name!r}, whose activation is {list(h.shape)} where {mask} is {list(tokens.shape)}",
                stacklevel=4,
            )

    def _say_doubts(self, heard: Collection[str]) -> None:
        """Warn once of each kind of reason why padding counted at one of the sites `heard`."""
        for (name, kind), why in self._doubts.items():
            if name in heard and kind not in self._said:
                self._said.add(kind)
                warnings.warn(
                    f"Salience: all tokens count at site {name!r}, padding too, because {why}; call the "
                    "model or its body with attention_mask [batch, length], 0 for padding, or leave "
                    "padding out of the batch",
                    stacklevel=4,
                )

    def sums(self) -> dict[str, list[Tensor]]:
        """Of |H|, |dL/dH| and, if signed, H, [channels] each, of the sites where a gradient has come since the last update."""
        found = {name: listener.sums() for name, listener in self._listeners.items()}
        return {name: sums for name, sums in found.items() if sums}

    def listeners_in(self, modules: Collection[nn.Module]) -> list[_C.Listener]:
        """What listens in one of `modules`, if the hooks are there."""
        return list(self._listeners.values()) if self.listening and self._model() in modules else []

    def forget(self) -> None:
        """What came since the last update does not count."""
        for listener in self._listeners.values():
            listener.forget()
        self._passes.forget()
        self._doubts.clear()

    @torch.no_grad()
    def update(self) -> None:
        """Once an optimizer step, after the last backward: the passes since the last update are one batch, whatever their number.

        In a process group all ranks call it together.
        """
        heard = self.sums()
        self._say_doubts(heard)
        sums = _over_ranks(heard)
        # Together in a few launches: sites of one number of channels a block.
        alike: dict[tuple[int, torch.device, torch.dtype], list[str]] = {}
        for name, (absolute, *_) in sums.items():
            channels, over = divmod(len(absolute), max(self._counts[name], 1))
            if over:
                raise ValueError(f"sites[{name!r}]: expected a multiple of {self._counts[name]} channels, got {len(absolute)}")
            alike.setdefault((channels, absolute.device, absolute.dtype), []).append(name)
        for (channels, _, _), names in alike.items():
            now = torch.cat([sums[name][0] for name in names]).mul_(torch.cat([sums[name][1] for name in names]))
            each = now if channels < 2 else now.view(-1, channels).sum(1)  # 0 where a cut has left no block
            self._scores.add({name: self._counts[name] for name in names}, each)
            signed = [name for name in names if name in self._signed]
            if signed:
                self._means.add({name: len(sums[name][2]) for name in signed}, torch.cat([sums[name][2] for name in signed]))
        self.forget()

    def select(self, sites: Mapping[str, Tensor]) -> None:
        """Go on with what a cut has left: of each of these sites the blocks `sites` ([count] bool, on the host)."""
        scores, means = self._scores.state(), self._means.state()
        for name, kept in sites.items():
            if name in scores:
                scores[name] = scores[name][kept.to(scores[name].device)]
            if name in means:
                each = len(means[name]) // max(len(kept), 1)
                means[name] = means[name][kept.to(means[name].device).repeat_interleave(each)]
            self._counts[name] = int(kept.sum())
        self._scores.replace(scores)
        self._means.replace(means)

    @property
    def listening(self) -> bool:
        """Whether the hooks are there."""
        return bool(self._handles)

    @property
    def heard(self) -> bool:
        """Whether a gradient has come to any site since the last update."""
        return any(listener.heard for listener in self._listeners.values())

    def drop_overflow(self) -> None:
        """After a step that was skipped: forget what came since the last update if it is not finite. Waits for the device."""
        if not all(bool(torch.isfinite(tensor).all()) for sums in self.sums().values() for tensor in sums):
            self.forget()

    def remove(self) -> None:
        """Take every hook away; the scores stay. A second call does nothing."""
        if self._handles:
            while self._handles:
                self._handles.pop().remove()
            _forget_compiled()
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "Controller, Salience: expected to stay with the model that they listen to, got a copy or a pickle "
            "of one; make another for a copy of the model, and give it state_dict()"
        )

    def state_dict(self) -> dict[str, Any]:
        """The averages; what has come since the last update is not part of it."""
        return {"scores": self._scores.state(), "means": self._means.state()}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """TypeError or ValueError unless `state` is that of a Salience of these sites."""
        for key, values in checked_keys("state", state, ("scores", "means")).items():
            for name, found in checked_mapping(f"state[{key!r}]", values).items():
                if not isinstance(found, Tensor) or found.dtype not in FLOATING or found.dim() != 1:
                    raise TypeError(f"state[{key!r}][{name!r}]: expected a floating tensor of one dimension, got {found!r:.80}")
        for name, score in state["scores"].items():
            if self._counts.get(name) != score.numel():
                raise ValueError(f"state: expected {self._counts.get(name, 'no')} scores for {name!r}, got {score.numel()}")
        if not self._signed.issuperset(state["means"]):
            raise ValueError(f"state: expected means of {sorted(self._signed)}, got {sorted(state['means'])}")
        for name, mean in state["means"].items():
            if mean.numel() % max(self._counts[name], 1):
                raise ValueError(f"state: expected a multiple of {self._counts[name]} means for {name!r}, got {mean.numel()}")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises TypeError or ValueError, with nothing changed, for what is not the state of a Salience of these sites."""
        self.check_state(state)
        self._scores.replace(state["scores"])
        self._means.replace(state["means"])
        self.forget()


_listening: weakref.WeakSet[Salience] = weakref.WeakSet()


def listeners_in(model: nn.Module) -> list[_C.Listener]:
    """Return everything that listens to `model` or to a module within it."""
    modules = set(model.modules())
    return [listener for one in list(_listening) for listener in one.listeners_in(modules)]


def _forget_compiled() -> None:
    """torch.compile does not look at hooks again: a model that was compiled and called without them would go on without them, silently."""
    torch.compiler.reset()


def _over_ranks(sums: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """Added up over the ranks of a process group, in one collective; DDP takes the mean of the gradients, so does this."""
    world = agreement.ranks()
    if world == 1 or not sums:
        return sums
    every = [tensor for found in sums.values() for tensor in found]
    flat = torch.cat(every)
    torch.distributed.all_reduce(flat)
    totals = iter(torch.split(flat, [len(tensor) for tensor in every]))
    added = {name: [next(totals) for _ in found] for name, found in sums.items()}
    for found in added.values():
        found[1].div_(world)
    return added
