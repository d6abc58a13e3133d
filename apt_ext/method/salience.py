"""How much each block of a model matters: compressed activation salience (Eq. 4-5 of the paper) and its moving average."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import _C, agreement
from ..arguments import FLOATING, checked_keys, checked_mapping, checked_number


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
        if not 0.0 <= checked_number("decay", decay) < 1.0:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.scores: dict[str, Tensor] = {}  # [count] float32 each, once updated
        self.means: dict[str, Tensor] = {}  # [channels] each, of H up to one factor
        self._counts = {name: count for name, (_, count) in sites.items()}
        self._signed, self._decoder = frozenset(signed), frozenset(decoder)
        self._sums: dict[str, list[Tensor]] = {}  # of |H|, |dL/dH| and, if signed, H since the last update, [channels] each
        self._tokens: dict[str, Tensor] = {}  # the masks of the last pass with gradients
        self._handles: list[RemovableHandle] = [model.register_forward_pre_hook(self._note_tokens, with_kwargs=True)]
        for name, (module, _) in sites.items():
            self._handles.append(module.register_forward_pre_hook(self._collector(name)))
        _forget_compiled()

    def _note_tokens(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            given = {name: kwargs.get(name) for name in ("attention_mask", "decoder_attention_mask")}
            self._tokens = {name: mask != 0 for name, mask in given.items() if isinstance(mask, Tensor) and mask.dim() == 2}

    def _collector(self, name: str) -> Any:
        def collect(module: nn.Module, args: tuple[Any, ...]) -> None:
            h = args[0]
            if not (torch.is_grad_enabled() and h.requires_grad):
                return
            tokens = self._tokens.get("decoder_attention_mask" if name in self._decoder else "attention_mask")
            if tokens is not None and tokens.shape != h.shape[:-1]:
                tokens = None
            full: Any = getattr(module, "full_width", lambda sums: sums)  # where kept lanes are handed over alone
            sums = [full(_channel_sums(h, tokens))]  # holds no activation: only these vectors wait for the backward
            if name in self._signed:
                sums.append(full(_channel_sums(h, tokens, signed=True)))

            def add(gradient: Tensor) -> None:
                found = [sums[0], full(_channel_sums(gradient, tokens)), *sums[1:]]
                before = self._sums.get(name)
                self._sums[name] = found if before is None else list(torch._foreach_add(before, found))

            h.register_hook(add)

        return torch.compiler.disable(collect)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def update(self) -> None:
        """Once an optimizer step, after the last backward: the passes since the last update are one batch, whatever their number.

        In a process group all ranks call it together.
        """
        self._add_up_ranks()
        names = [name for name in self._counts if name in self._sums]
        if names:
            products = torch._foreach_mul([self._sums[name][0] for name in names], [self._sums[name][1] for name in names])
            counts = [self._counts[name] for name in names]
            now = [one if len(one) == count else one.view(count, -1).sum(1) for one, count in zip(products, counts, strict=True)]
            self._average(self.scores, names, now)
        signed = [name for name in names if name in self._signed]
        self._average(self.means, signed, [self._sums[name][2] for name in signed])
        self._sums, self._tokens = {}, {}

    def _average(self, averages: dict[str, Tensor], names: list[str], now: list[Tensor]) -> None:
        """A few launches for all of them, whatever their number."""
        if names:
            old = [averages.setdefault(name, torch.zeros_like(value)) for name, value in zip(names, now, strict=True)]
            torch._foreach_mul_(old, self.decay)
            torch._foreach_add_(old, now, alpha=1 - self.decay)

    def _add_up_ranks(self) -> None:
        """One collective for all sites; DDP takes the mean of the gradients, so does this."""
        world = agreement.ranks()
        if world == 1 or not self._sums:
            return
        names = [name for name in self._counts if name in self._sums]
        every = [tensor for name in names for tensor in self._sums[name]]
        flat = torch.cat(every)
        torch.distributed.all_reduce(flat)
        for tensor, total in zip(every, torch.split(flat, [len(tensor) for tensor in every]), strict=True):
            tensor.copy_(total)
        for name in names:
            self._sums[name][1].div_(world)

    @property
    def listening(self) -> bool:
        """Whether the hooks are there."""
        return bool(self._handles)

    @property
    def heard(self) -> bool:
        """Whether a gradient has come to any site since the last update."""
        return bool(self._sums)

    def drop_overflow(self) -> None:
        """After a step that was skipped: forget what came since the last update if it is not finite. Waits for the device."""
        if self._sums and not all(bool(torch.isfinite(tensor).all()) for sums in self._sums.values() for tensor in sums):
            self._sums = {}

    def remove(self) -> None:
        """Take every hook away; the scores stay. A second call does nothing."""
        if self._handles:
            while self._handles:
                self._handles.pop().remove()
            _forget_compiled()
        self._sums, self._tokens = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """The averages; what has come since the last update is not part of it."""
        return {
            "scores": {name: score.clone() for name, score in self.scores.items()},
            "means": {name: mean.clone() for name, mean in self.means.items()},
        }

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
        self.scores = {name: score.clone() for name, score in state["scores"].items()}
        self.means = {name: mean.clone() for name, mean in state["means"].items()}
        self._sums, self._tokens = {}, {}


def _forget_compiled() -> None:
    """torch.compile does not look at hooks again: a model that was compiled and called without them would go on without them, silently."""
    torch.compiler.reset()


@torch.no_grad()
def _channel_sums(values: Tensor, tokens: Tensor | None, signed: bool = False) -> Tensor:
    """Sum of |values| (or values) over all but the last dimension, [..., channels] -> [channels], of the tokens [...] (bool) that are True.

    In float32 (float64 for float64). What padding holds, NaN included, does not count.
    """
    if values.device.type in ("cpu", "cuda") and values.dtype in FLOATING and not torch.compiler.is_compiling():
        return _C.channel_sums(values, tokens, signed)
    flat = values.flatten(0, -2)
    if tokens is not None:  # selected, not multiplied
        flat = torch.where(tokens.view(-1, 1), flat, 0)
    dtype = torch.promote_types(values.dtype, torch.float32)
    return flat.sum(0, dtype=dtype) if signed else torch.linalg.vector_norm(flat, ord=1, dim=0, dtype=dtype)
