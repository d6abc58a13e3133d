"""Find which tokens of a pass count, by the masks that a model was called with."""

from __future__ import annotations

import inspect
import threading
from bisect import bisect_right
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ... import _C
from ...wrapping.module_hooks import ModuleHook

MASKS = ("attention_mask", "decoder_attention_mask")
_TOKENS = ("input_ids", "inputs_embeds", "input_values", "input_features")  # names of a batch of tokens
_IMAGES = ("pixel_values",)  # names of a batch without padding


@dataclass(frozen=True)
class Pass:
    """One call of a model or of its body.

    masks   of MASKS, those that the call was given: [batch, length] bool, False for padding
    unread  of MASKS, those that do not say which tokens are padding: what was given instead, in words
    """

    masks: dict[str, Tensor]
    unread: dict[str, str]


@dataclass(frozen=True)
class _Entrance:
    """A module that takes a batch.

    masked     it takes the attention mask with the batch; False: it takes images, which have no padding
    positions  the names of the arguments that may be given without theirs
    inside     ids of all modules within it
    renamed    the names under which its masks count, where they are others: a decoder that is called alone
               takes its own mask as attention_mask
    """

    module: nn.Module
    masked: bool
    positions: list[str]
    inside: frozenset[int]
    renamed: dict[str, str]


class Passes:
    """The masks of the passes with gradients since the last `forget`, by thread.

    A pass begins where a module is entered that takes a batch together with `attention_mask`: the model, its
    body, an encoder or a decoder. Of such modules within each other the outermost counts, for all of its
    pass: what the inner ones are given was made of it. The pass ends where that module is left, by an error
    as well. A module that takes images and no mask is a pass of its own, without padding.

    A thread numbers the nodes of its graphs. A recomputation runs in a node made together with the pass that
    it repeats.

    model    counts whatever its arguments are called; within it count modules that hold one of the next two
    decoder  modules in a decoder behind an encoder that ask for `decoder_attention_mask`
    others   modules that ask for `attention_mask`
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: Collection[nn.Module] = (),
        others: Collection[nn.Module] = (),
    ) -> None:
        self.forget()
        self._entrances = []
        for module in model.modules():
            parameters, inside = _parameters(module), frozenset(map(id, module.modules()))
            masked = "attention_mask" in parameters and not parameters.keys().isdisjoint(_TOKENS)
            images = "attention_mask" not in parameters and not parameters.keys().isdisjoint(_IMAGES)
            ask = [any(id(one) in inside for one in modules) for modules in (decoder, others)]
            if module is model or ((masked or images) and any(ask)):
                positions = [name for name, parameter in parameters.items() if parameter.kind in _POSITIONAL]
                alone = ask == [True, False] and "decoder_attention_mask" not in parameters
                renamed = {"attention_mask": "decoder_attention_mask"} if alone else {}
                masked = masked or module is model
                self._entrances.append(_Entrance(module, masked, positions, inside, renamed))
        self.told = any("attention_mask" in _parameters(entrance.module) for entrance in self._entrances)

    def hooks(self) -> list[RemovableHandle]:
        """Begin to listen; the hooks, to be removed by the caller."""
        handles = []
        for entrance in self._entrances:
            module = entrance.module
            enter: Callable[..., None] = partial(self._enter, entrance)
            handles.append(module.register_forward_pre_hook(ModuleHook(module, enter), with_kwargs=True))
            handles.append(module.register_forward_hook(ModuleHook(module, self._leave), always_call=True))
        return handles

    def here(self) -> Pass | None:
        """Return the pass that runs or is recomputed here, or None in modules that were called outside of any."""
        task = _task()
        entered = self._entered().get(task)  # at each site of each forward
        if entered:
            return entered[-1][1]
        if task == _NONE:
            return None
        thread, node = _C.node_moment() or _C.next_moment()
        passes = self._passes.get(thread, [])
        before = bisect_right(passes, node, key=_first)
        return passes[before - 1][1] if before else None

    def forget(self) -> None:
        """Drop all passes."""
        # {thread: (first node, the pass or None after its end), in order}
        self._passes: dict[int, list[tuple[int, Pass | None]]] = {}
        # Of this thread, {backward or _NONE: the modules that were entered and not left, each with its pass}.
        self._here = threading.local()

    def __len__(self) -> int:
        return sum(map(len, self._passes.values()))

    def _entered(self) -> dict[int, list[tuple[_Entrance, Pass]]]:
        found: dict[int, list[tuple[_Entrance, Pass]]] | None = getattr(self._here, "entered", None)
        if found is None:
            found = self._here.entered = {}
        return found

    def _enter(
        self,
        entrance: _Entrance,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if not torch.is_grad_enabled():
            return
        entered = self._entered().setdefault(_task(), [])
        while entered and (entered[-1][0] is entrance or id(module) not in entered[-1][0].inside):
            entered.pop()  # one that an interrupt, or an error in compiled code, left without a word
        if entered and entrance.masked:
            entered.append((entrance, entered[-1][1]))
            return
        begun = _pass_of(entrance, args, kwargs)
        entered.append((entrance, begun))
        self._note(begun)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        task = _task()
        entered = self._entered().get(task)
        if entered and entered[-1][0].module is module:
            _, left = entered.pop()
            back = entered[-1][1] if entered else None
            if not entered:
                del self._entered()[task]
            if back is not left:
                self._note(back)

    def _note(self, one: Pass | None) -> None:
        """Nodes made from now on are of this pass."""
        thread, node = _C.next_moment()
        self._passes.setdefault(thread, []).append((node, one))


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_NONE = -1  # torch's number of the backward that runs where none does


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):  # a forward of torch.jit or of C++ has no signature
        return {}


def _pass_of(entrance: _Entrance, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass:
    given = {**dict(zip(entrance.positions, args, strict=False)), **kwargs}
    begun = Pass({}, {})
    for name in MASKS:
        mask, counts_as = given.get(name), entrance.renamed.get(name, name)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            begun.masks[counts_as] = mask != 0
        elif mask is not None:
            kind = type(mask).__name__
            got = f"of shape {list(mask.shape)}" if isinstance(mask, Tensor) else f"in a {kind}"
            begun.unread[counts_as] = f"{type(entrance.module).__name__} was called with {name} {got}"
    return begun


def _first(one: tuple[int, Pass | None]) -> int:
    return one[0]


def _task() -> int:
    """The number of the backward that runs here, or _NONE."""
    return torch._C._current_graph_task_id()
