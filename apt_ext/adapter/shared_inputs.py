"""Adapters that read the same input, one after the other: the first that is called computes for all of them.

q, k, v of an attention, or gate and up, are called one by one with the same tensor. The first call reads it once for
the ranks of all, in one autograd node, and keeps the outputs of the others; they take theirs when they are called with
that very tensor, unchanged, in the same state. Whatever is not so is computed alone, with the same result.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch._C import _is_torch_function_mode_enabled

from .. import _C
from ..ops import drawn_rng

if TYPE_CHECKING:
    from .layer import APTAdapter

# weight, bias, lora_A, lora_B, mask_out, scaling, dropout
Operands = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None, float, float]
Mode = Literal["auto", "always", "never"]

_SIXTEEN = (torch.bfloat16, torch.float16)
_mode: Mode = "auto"


@contextmanager
def sharing(mode: Mode) -> Iterator[None]:
    """Within this context inputs are shared where that saves time ("auto"), wherever it is right ("always"), or never."""
    global _mode
    before, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = before


class Held:
    """Outputs that one call computed for others, and that wait for them. They go when x goes.

    waiting  {number of a member: its place among the outputs}
    leader   the member that was called
    outputs  [them], or [] once x is gone
    """

    def __init__(self, group: SharedInput, outputs: _C.SharedOutputs, members: Sequence[int], leader: int, x: Tensor) -> None:
        self.group, self.leader = group, leader
        self.waiting = {member: place for place, member in enumerate(members)}
        self.is_repeated = _in_backward()
        self.outputs = outputs_of_x = [outputs]
        self._x = weakref.ref(x, lambda _: outputs_of_x.clear())

    def take(self, member: int, x: Tensor, operands: Operands) -> Tensor | None:
        """The output of this member for this call; None where there is none, or x or the member are others than they were."""
        outputs, place = self.outputs, self.waiting.get(member)
        if place is None or not outputs or self.is_repeated != _in_backward():
            return None
        found = outputs[0].take(place, x, operands)
        if found is not None:
            del self.waiting[member]
        return found


class ThisThread(threading.local):
    """What a thread holds: of one group at a time, so that what nobody takes is gone with the next group."""

    held: Held | None = None


this_thread = ThisThread()


class SharedInput:
    """Adapters that are expected to be called with the same x, in any order. A copy of one belongs to no group.

    Those that turn out to read another x, or not to be called, are left out after the second time. That is so from the next
    first call on: a recomputation (checkpointing) computes together what its forward did.
    """

    def __init__(self, members: Sequence[APTAdapter]) -> None:
        self._members = [weakref.ref(member) for member in members]
        together = tuple(range(len(members)))
        # As of when, and for each member which are computed with it.
        self._classes: list[tuple[tuple[int, int], list[tuple[int, ...]]]] = [(_C.next_moment(), [together] * len(members))]
        self._left: dict[int, tuple[int, ...]] = {}  # who had not taken an output when this member led last
        self._parting: dict[int, tuple[int, ...]] = {}  # who is left out when it leads next
        for number, member in enumerate(members):
            member.shared = (self, number)

    def output(self, number: int, adapter: APTAdapter, x: Tensor, mask_out: Tensor | None) -> Tensor | None:
        """The output of a member for x [..., K] under its own masks, of which mask_in is known to be ones; None: compute it alone."""
        if _mode != "auto":
            if _mode == "never" or not isinstance(x, Tensor):
                return None
        elif type(x) is not Tensor or not x.is_cuda or not (x.dtype in _SIXTEEN or torch.is_autocast_enabled("cuda")):
            return None
        if type(x) is not Tensor or _is_torch_function_mode_enabled() or self._members[number]() is not adapter:
            return None
        operands = _operands(adapter, mask_out)
        if operands is None:
            return None
        held = this_thread.held
        if held is not None and held.group is self:
            taken = held.take(number, x, operands)
            if taken is not None:
                if not held.waiting:
                    self._finish(held)
                return taken
        return self._lead(number, x, operands)

    def _lead(self, number: int, x: Tensor, operands: Operands) -> Tensor | None:
        """Compute for this member and those that are expected to read the same x."""
        held = this_thread.held
        if held is not None and held.group is self:
            expected = self._expected(number)
            if len(expected) > 1 and len(self._ready_with(number, expected, x, operands)) < 2:
                return None  # a frozen one among others that learn: what they wait for stays
        if held is not None:
            held.group._finish(held)
        found = self._ready_with(number, self._together(number), x, operands)
        if len(found) < 2:
            return None
        members, layers = list(found), list(found.values())
        outputs = _C.shared_linear(x, layers, _mode == "always", drawn_rng)
        if outputs is None:
            return None
        held = Held(self, outputs, members, number, x)
        taken = held.take(number, x, operands)
        if taken is not None:
            this_thread.held = held
        return taken

    def _ready_with(self, leader: int, together: Sequence[int], x: Tensor, operands: Operands) -> dict[int, Operands]:
        """{member: its operands} of those that can be computed with the leader."""
        ready = {other: operands if other == leader else _ready(self._members[other]()) for other in together}
        learns = _learns(x, operands)
        return {other: found for other, found in ready.items() if found is not None and _learns(x, found) == learns}

    def _expected(self, leader: int) -> tuple[int, ...]:
        """Who was computed with this member so far; in a backward, in the forward that it recomputes."""
        return (self._classes_then() if _in_backward() else self._classes[-1][1])[leader]

    def _together(self, leader: int) -> tuple[int, ...]:
        """Who is computed with this member from now on."""
        if _in_backward():
            return self._expected(leader)
        apart = self._parting.pop(leader, ())
        classes = self._classes[-1][1]
        if apart and set(apart) < set(classes[leader]):
            stay = tuple(one for one in classes[leader] if one not in apart)
            classes = [apart if one in apart else stay if one in stay else of for one, of in enumerate(classes)]
            self._classes.append((_C.next_moment(), classes))
        return classes[leader]

    def _classes_then(self) -> list[tuple[int, ...]]:
        """Who was computed with whom in the forward that this backward recomputes."""
        thread, moment = _C.node_moment() or self._classes[-1][0]
        of_thread = [(at, classes) for (who, at), classes in self._classes if who == thread]
        before = [classes for at, classes in of_thread if at <= moment]
        return before[-1] if before else (of_thread or self._classes[-1:])[0][1]

    def _finish(self, held: Held) -> None:
        """Let outputs that nobody took go, and remember whose they were."""
        this_thread.held = None
        if held.is_repeated:  # which may stop early
            return
        left = tuple(sorted(held.waiting))
        if left and self._left.get(held.leader) == left:
            self._parting[held.leader] = left
        self._left[held.leader] = left


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _ready(member: APTAdapter | None) -> Operands | None:
    """The operands of a member that was not called yet; None where it does not compute as the op does, under ones on its input."""
    if member is None or member.merge.active or member.merge.foreign or member.disabled:
        return None
    if member.packing.current is not None or member.packing.store.host is not None:
        return None
    mask_in, mask_out, written = member.placed.effective(member._buffers, None, None, False)
    return None if written or mask_in is not None else _operands(member, mask_out)


def _learns(x: Tensor, operands: Operands) -> bool:
    """Whether the output of a member requires a gradient: one node would make that of a frozen one require one as well."""
    _, bias, A, B, *_ = operands
    return torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in (x, bias, A, B))


def _operands(adapter: APTAdapter, mask_out: Tensor | None) -> Operands | None:
    """The operands of an adapter whose layer is a plain one of its own, or None."""
    base = adapter._modules["base_layer"]
    if base is None or adapter.is_transposed:
        return None
    own, factors = base._parameters, adapter._parameters
    weight, A, B = own.get("weight"), factors.get("lora_A"), factors.get("lora_B")
    if weight is None or A is None or B is None or "bias" not in own:
        return None
    return weight, own["bias"], A, B, mask_out, adapter.scaling, adapter.dropout if adapter.training else 0.0
