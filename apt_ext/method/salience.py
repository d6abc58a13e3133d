"""How much each block of a model matters: compressed activation salience (Eq. 4-5 of the paper) and its moving average."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from .. import _C, agreement
from ..arguments import FLOATING, checked_keys, checked_mapping
from .averages import Averages


class Salience:
    """S~(j) = (sum over tokens |H_j|) * (sum over tokens |dL/dH_j|), a product of two sums, averaged over optimizer steps.

    H is what a block hands on: the input of the linear that reads it (the down projection for neurons, the output projection for heads).
    A block of several channels (a head) has the sum of their products. Only vectors of one entry a channel are kept, whatever the batch
    and length. An activation counts when its gradient arrives, so passes without gradients (a teacher's, an evaluation's) and the
    recomputation of gradient checkpointing leave the state unchanged.

    Tokens that the model's `attention_mask` [batch, length] marks 0 (padding) count on neither side, where H is [batch, length, channels];
    at the sites of a decoder behind an encoder it is `decoder_attention_mask`. The ranks of a process group add up their sums, and all have
    the scores of the joint batch.

    model    the module that is called with the batch; only these masks are looked at
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
        self._scores, self._means = Averages(decay), Averages(decay)
        self._counts = {name: count for name, (_, count) in sites.items()}
        self._signed, self._decoder = frozenset(signed), frozenset(decoder)
        self._listeners = {name: _C.Listener(name in self._signed) for name in sites}
        self._tokens: dict[str, Tensor] = {}  # the masks of the last pass with gradients
        self._handles: list[RemovableHandle] = [model.register_forward_pre_hook(self._reader_of_tokens(), with_kwargs=True)]
        for name, (module, _) in sites.items():
            self._handles.append(module.register_forward_pre_hook(self._collector(name)))
        _forget_compiled()

    @property
    def scores(self) -> dict[str, Tensor]:
        """[count] float32 each, once updated; to be read only."""
        return self._scores.named

    @property
    def means(self) -> dict[str, Tensor]:
        """[channels] each, of H up to one factor; to be read only."""
        return self._means.named

    # Hooks are functions, which a deepcopy of the model does not go into.

    def _reader_of_tokens(self) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.is_grad_enabled():
                given = {name: kwargs.get(name) for name in ("attention_mask", "decoder_attention_mask")}
                self._tokens = {name: mask != 0 for name, mask in given.items() if isinstance(mask, Tensor) and mask.dim() == 2}

        return note

    def _collector(self, name: str) -> Any:
        hear, tokens = self._listeners[name].hear, "decoder_attention_mask" if name in self._decoder else "attention_mask"
        between_graphs = torch.compiler.disable(hear)  # type: ignore[no-untyped-call]

        def collect(module: nn.Module, args: tuple[Any, ...]) -> None:
            call = between_graphs if is_compiling() else hear  # the wrapper takes as long as the call
            call(args[0], self._tokens.get(tokens), getattr(module, "handed_over", None))

        return collect

    def sums(self) -> dict[str, list[Tensor]]:
        """Of |H|, |dL/dH| and, if signed, H, [channels] each, of the sites where a gradient has come since the last update."""
        found = {name: listener.sums() for name, listener in self._listeners.items()}
        return {name: sums for name, sums in found.items() if sums}

    def forget(self) -> None:
        """What came since the last update does not count."""
        for listener in self._listeners.values():
            listener.forget()
        self._tokens = {}

    @torch.no_grad()
    def update(self) -> None:
        """Once an optimizer step, after the last backward: the passes since the last update are one batch, whatever their number.

        In a process group all ranks call it together.
        """
        sums = _over_ranks(self.sums())
        # Together in a few launches: sites of one number of channels a block.
        alike: dict[tuple[int, torch.device, torch.dtype], list[str]] = {}
        for name, (absolute, *_) in sums.items():
            alike.setdefault((len(absolute) // max(self._counts[name], 1), absolute.device, absolute.dtype), []).append(name)
        for (channels, _, _), names in alike.items():
            now = torch.cat([sums[name][0] for name in names]).mul_(torch.cat([sums[name][1] for name in names]))
            self._scores.add({name: self._counts[name] for name in names}, now if channels == 1 else now.view(-1, channels).sum(1))
            signed = [name for name in names if name in self._signed]
            if signed:
                self._means.add({name: len(sums[name][2]) for name in signed}, torch.cat([sums[name][2] for name in signed]))
        self.forget()

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
            if mean.numel() % self._counts[name]:
                raise ValueError(f"state: expected a multiple of {self._counts[name]} means for {name!r}, got {mean.numel()}")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises TypeError or ValueError, with nothing changed, for what is not the state of a Salience of these sites."""
        self.check_state(state)
        self._scores.replace(state["scores"])
        self._means.replace(state["means"])
        self.forget()


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
