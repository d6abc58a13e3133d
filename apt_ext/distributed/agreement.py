"""The ranks of a process group agree on a change of masks or rank before any of them makes it.

    change    within it, a change is checked, agreed on by every rank, and made; nested changes are covered by the outermost
    alone     within it, nothing is exchanged: for what a rank does to adapters of its own

Neither DDP nor FSDP2 looks at masks and ranks: ranks that disagree train different models and report no error. So a change is proposed
first, as a digest of a few dozen bytes, through the store with which the process group was set up, and not through a collective: one
rank alone in a collective hangs or breaks the others' connections, and a store has a timeout of its own and disturbs nothing in flight.

Three keys a round. The first rank to come writes its proposal, the others compare theirs with it and count themselves. The verdict is
written once, by compare-and-set, by whoever knows it first: the last of the ranks that agree, one that does not, one that refuses, or one
that has waited too long. Every rank acts on that one verdict, so either all make the change or none does.
"""

from __future__ import annotations

import ctypes
import hashlib
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_AGREED = "agreed"
_SHOWN = 300  # characters of a refusal that the other ranks repeat

_inside: ContextVar[str] = ContextVar("apt_ext.agreement", default="")  # "", "change" or "alone"
_group: weakref.ref[Any] | None = None  # the process group whose rounds are counted
_number = 0


def ranks() -> int:
    """How many ranks have to agree: 1 without a process group, and within `alone`."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or _inside.get() == "alone":
        return 1
    return 1 if distributed.get_backend() == "fake" else distributed.get_world_size()  # "fake": torch's pretended world, nobody else comes


@contextmanager
def alone() -> Iterator[None]:
    """Changes within are this rank's own: nothing is exchanged or broadcast. For ranks that hold different models on purpose."""
    token = _inside.set("alone")
    try:
        yield
    finally:
        _inside.reset(token)


@contextmanager
def change(what: str) -> Iterator[Callable[..., None]]:
    """Yields `agree`: call it once, when everything is checked and before anything changes, with the values that must be equal everywhere.

        with agreement.change("set_masks of layer 3") as agree:
            mask = checked(mask)        # what raises here is reported to the other ranks, which then raise too
            agree(mask, old_mask)       # RuntimeError on every rank unless all propose this, tensors compared bit by bit; a function of
                                    # nothing stands for what it returns, and is called where there are others to agree with
            old_mask.copy_(mask)

    A change within a change exchanges nothing, so a batch of them costs one exchange: agree on all of it, then make each. In one process
    it costs nothing. A rank that waits for the others gives up after half the process group's timeout, before torch's own watchdogs, and
    the change is then refused on the ranks that come later, too.
    """
    if _inside.get() or ranks() == 1:
        yield _nothing_to_ask
        return
    token = _inside.set("change")
    asked = False

    def agree(*values: object) -> None:
        nonlocal asked
        asked = True
        _exchange(what, digest(values))

    try:
        yield agree
    except BaseException as error:
        if not asked:
            _refuse(what, error)
        raise
    finally:
        _inside.reset(token)


def digest(values: object) -> str:
    """16 hexadecimal digits that identify tensors (dtype, shape and bytes), plain values, functions by what they return, and lists and
    tuples of them."""
    hashed = hashlib.sha256()

    def take(value: object) -> None:
        if isinstance(value, list | tuple):
            hashed.update(f"({len(value)}".encode())
            for item in value:
                take(item)
        elif isinstance(value, Tensor):
            hashed.update(f"{value.dtype}{tuple(value.shape)}".encode())
            if value.numel() and not value.is_meta:
                value = value.detach().cpu().contiguous()
                hashed.update(ctypes.string_at(value.data_ptr(), value.nbytes))
        elif callable(value):
            take(value())
        else:
            hashed.update(f"{value!r},".encode())

    take(values)
    return hashed.hexdigest()[:16]


def _nothing_to_ask(*values: object) -> None:
    """`agree` of a single process, and of a change that another one covers."""


@dataclass
class _Round:
    """One exchange as a rank sees it. Its keys are made anew for each round; ranks that make the same changes count rounds alike."""

    store: Any
    number: int
    rank: int
    world: int

    def _key(self, name: str, back: int = 0) -> str:
        return f"apt_ext/{self.number - back}/{name}"

    def propose(self, what: str, values: str) -> str:
        """Propose `what` with these values and wait: the verdict."""
        proposal = f"{what} ({values})"
        other, _, first = self.store.compare_set(self._key("first"), "", f"{self.rank} {proposal}").decode().partition(" ")
        if first != proposal:
            return self.settle(f"rank {other} proposes {first}, rank {self.rank} {proposal}")
        if self.store.add(self._key("came"), 1) == self.world:
            for name in ("first", "came", "verdict"):
                self.store.delete_key(self._key(name, back=1))  # every rank has left that round
            return self.settle(_AGREED)
        return self._wait(what)

    def _wait(self, what: str) -> str:
        timeout = self.store.timeout.total_seconds() / 2
        start = time.monotonic()
        # Asked again and again: a blocking wait would hold the store's lock, which torch's watchdogs need, and could not be interrupted.
        while not self.store.check([self._key("verdict")]):
            waited = time.monotonic() - start
            if waited >= timeout:
                came = self.store.add(self._key("came"), 0)
                return self.settle(f"rank {self.rank} waited {timeout:g} s for {what}, to which {came} of {self.world} ranks came")
            time.sleep(min(0.0002 + waited / 10, 0.1, timeout - waited))
        return self.store.get(self._key("verdict")).decode()  # type: ignore[no-any-return]

    def settle(self, verdict: str) -> str:
        """The verdict of the round: this one, unless there is one already."""
        return self.store.compare_set(self._key("verdict"), "", verdict).decode()  # type: ignore[no-any-return]


def _next_round() -> _Round:
    global _group, _number
    distributed = torch.distributed
    if _group is None or _group() is not distributed.group.WORLD:
        _group, _number = weakref.ref(distributed.group.WORLD), 0
    _number += 1
    return _Round(distributed.distributed_c10d._get_default_store(), _number, distributed.get_rank(), distributed.get_world_size())


def _exchange(what: str, values: str) -> None:
    """RuntimeError unless all ranks propose the same."""
    verdict = _next_round().propose(what, values)
    if verdict != _AGREED:
        raise RuntimeError(f"{what}: the ranks disagree, and nothing has changed: {verdict}. All make the same changes in the same order")


def _refuse(what: str, error: BaseException) -> None:
    """This rank raises `error` instead of proposing: the others need not wait for it."""
    this = _next_round()
    with suppress(RuntimeError):  # a lost connection must not hide the error
        this.settle(f"rank {this.rank} refuses {what} with {f'{type(error).__name__}: {error}'[:_SHOWN]}")
