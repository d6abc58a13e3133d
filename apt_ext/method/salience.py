"""How much each block of a model matters: compressed activation salience (Eq. 4-5 of the paper) and its moving average."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Salience:
    """S~(j) = (sum over tokens |H_j|) * (sum over tokens |dL/dH_j|), a product of two sums, averaged over optimizer steps.

    H is what a block hands on: the input of the linear that reads it (the down projection for neurons, the output projection for heads).
    A block of several channels (a head) has the sum of their products. Only vectors of one entry a channel are kept, whatever the batch
    and length. An activation counts when its gradient arrives, so passes without gradients (a teacher's, an evaluation's) and the
    recomputation of gradient checkpointing leave the state unchanged.

    Tokens that the model's `attention_mask` [batch, length] marks 0 (padding) count on neither side, where H is [batch, length, channels].

    model  the module that is called with the batch; only its attention_mask is looked at
    sites  for each block family's name: the module whose input is H, and the number of blocks in it; channels of one block are adjacent
    decay  S <- decay * S + (1 - decay) * S_now at each update (0.85 in the paper), started at 0, no bias correction
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, tuple[nn.Module, int]], decay: float = 0.85) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.scores: dict[str, Tensor] = {}  # [count] float32 each, once updated
        self._counts = {name: count for name, (_, count) in sites.items()}
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}  # of |H| and |dL/dH| since the last update, [channels] each
        self._tokens: Tensor | None = None  # the attention mask of the last pass with gradients
        self._handles: list[RemovableHandle] = [model.register_forward_pre_hook(self._note_tokens, with_kwargs=True)]
        for name, (module, _) in sites.items():
            self._handles.append(module.register_forward_pre_hook(self._collector(name)))

    def _note_tokens(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            mask = kwargs.get("attention_mask")
            self._tokens = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _collector(self, name: str) -> Any:
        def collect(module: nn.Module, args: tuple[Any, ...]) -> None:
            h = args[0]
            if not (torch.is_grad_enabled() and h.requires_grad):
                return
            tokens = self._tokens
            if tokens is not None and tokens.shape != h.shape[:-1]:
                tokens = None
            activation = _channel_sums(h.detach(), tokens)  # holds no activation: only this vector waits for the backward

            def add(gradient: Tensor) -> None:
                gradient_sum = _channel_sums(gradient, tokens)
                if name in self._sums:
                    self._sums[name][0].add_(activation)
                    self._sums[name][1].add_(gradient_sum)
                else:
                    self._sums[name] = (activation.clone(), gradient_sum)

            h.register_hook(add)

        return collect

    @torch.no_grad()
    def update(self) -> None:
        """Once an optimizer step, after the last backward: the passes since the last update are one batch, whatever their number."""
        for name, count in self._counts.items():
            if name not in self._sums:
                continue
            activation, gradient = self._sums[name]
            now = (activation * gradient).view(count, -1).sum(1)
            average = self.scores.setdefault(name, torch.zeros_like(now))
            average.mul_(self.decay).add_(now, alpha=1 - self.decay)
        self._sums, self._tokens = {}, None

    def remove(self) -> None:
        """Take every hook away; the scores stay. A second call does nothing."""
        while self._handles:
            self._handles.pop().remove()
        self._sums, self._tokens = {}, None

    def state_dict(self) -> dict[str, Any]:
        """The averages; what has come since the last update is not part of it."""
        return {name: score.clone() for name, score in self.scores.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError, with nothing changed, for a block family that is unknown or of another size."""
        for name, score in state.items():
            if self._counts.get(name) != score.numel():
                raise ValueError(f"state: expected {self._counts.get(name, 'no')} scores for {name!r}, got {score.numel()}")
        self.scores = {name: score.clone() for name, score in state.items()}
        self._sums, self._tokens = {}, None


@torch.no_grad()
def _channel_sums(values: Tensor, tokens: Tensor | None) -> Tensor:
    """Sum of |values| over all but the last dimension, [..., channels] -> [channels], without the tokens [...] that are 0.

    In float32 (float64 for float64). Selected, not multiplied: what padding holds, NaN included, does not count.
    """
    if tokens is not None:
        values = torch.where((tokens != 0).unsqueeze(-1), values, 0)
    dtype = torch.promote_types(values.dtype, torch.float32)
    sums: Tensor = torch.linalg.vector_norm(values.flatten(0, -2), ord=1, dim=0, dtype=dtype)
    return sums
