"""The graphs of one model's steps: which batch is replayed, which runs eagerly, and when everything is captured anew."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..common import own_capture
from ..method.score.salience import listeners_in
from .attention import MaskWatch
from .batches import Ungraphable, is_padded, signature
from .capture import CaptureFailed
from .obstacles import obstacle
from .recording import Recording, let_go, reserved, take_over
from .standing import Standing

logger = logging.getLogger("apt_ext")

_SEEN = 256  # shapes that came once and are remembered
_TRIES = 3  # failed captures after which a shape runs eagerly, where what was in the way may have gone
_FAILURES = 4  # failed captures in a row after which none is tried any more
_RESTLESS = 10  # calls in a row that each found another model

# Forward and backward of (inputs, batch, what is the same for all batches of a graph). The list, if there is one, is filled with the
# tensors that got a gradient beside those of the model. What comes back is detached.
Lines = Callable[[tuple[Any, ...], dict[str, Any], Any, list[Tensor] | None], Any]


class Replayer:
    """Runs forward and backward of a model, from a graph where that is possible. It keeps no reference to the lines, which hold it.

    captures  graphs that were captured so far
    reason    why the last call ran eagerly, in words; None where it was replayed, or was the first of its shape
    """

    def __init__(self, model: nn.Module, shapes: int, enabled: str | bool) -> None:
        self.model, self.shapes, self.enabled = model, shapes, enabled
        self.captures = 0
        self._said: set[str] = set()
        self._owned: dict[Tensor, Tensor] = {}  # {Parameter: the graph's buffer that is its gradient}
        self._volatile: frozenset[tuple[int, str]] = frozenset()
        self.reset()
        self.reason = "enabled=False" if enabled is False else self._place()
        if self.reason is not None and enabled is True:
            self._tell(self.reason)

    @property
    def graphed(self) -> bool:
        """Whether there is a graph that the next batch of its shape is replayed from."""
        return bool(self._recordings)

    @property
    def memory(self) -> int:
        """Bytes of device memory that the graphs hold."""
        return reserved(self._pools)

    def reset(self) -> None:
        """Let go of all graphs, and forget which captures failed."""
        self._begin(None)
        self._failures, self._failure, self._restless = 0, "", 0

    def run(self, lines: Lines, inputs: tuple[Any, ...], batch: dict[str, Any], fixed: Any) -> Any:
        """Run `lines`, always the same ones, on one batch; `fixed` is equal for all batches of a graph."""
        known = self._known(inputs, batch, fixed)
        if known is None:
            return lines(inputs, batch, fixed, None)
        key, tensors = known
        recording = self._recordings.get(key)
        if recording is not None and (why := recording.outdated()) is not None:
            logger.debug("GraphedStep: captures anew: %s", why)
            self._restless += 1
            self._begin(self._standing)  # graphs of other shapes are as old
            recording = None
        if recording is None:
            if key not in self._seen or self._seen[key][2].outdated() is not None:
                return self._first(lines, key, inputs, batch, fixed)
            recording = self._captured(lines, key, inputs, batch, fixed)
            if recording is None:
                return lines(inputs, batch, fixed, None)
        let_go(self._owned)
        output = recording.replay(tensors, self._device)
        take_over(recording.gradients, self._owned)
        self._restless = 0
        return output

    def _known(self, inputs: tuple[Any, ...], batch: dict[str, Any], fixed: Any) -> Any:
        """(What tells the graph of this batch apart, its tensors); None where it has to run eagerly, for a reason that is told."""
        self.reason = None
        if self.enabled is False:
            self.reason = "enabled=False"
            return None
        place = self._place()
        if place is not None:
            return self._tell(place)
        try:
            standing = Standing(self.model, self._volatile)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:  # a scripted or lazy module, a sparse buffer
            return self._tell(f"the model has a part that cannot be followed: {type(error).__name__}: {error}")
        if self._standing is None or standing != self._standing:
            self._restless += self._standing is not None
            self._begin(standing)
            if self._restless == _RESTLESS:
                self._tell("each of the last calls found another model than the one before, so nothing was captured", quietly=True)
        if self._obstacle is not None:
            return self._tell(self._obstacle)
        try:
            told, tensors = signature((inputs, batch), self._device)
        except Ungraphable as why:
            return self._tell(f"{why}")
        named: Mapping[str, Any] = inputs[0] if not batch and len(inputs) == 1 and isinstance(inputs[0], Mapping) else batch
        key = (told, fixed, is_padded(named))
        if key in self._unfit or self._failures >= _FAILURES:
            return self._tell(self._unfit.get(key, self._failure))
        if key not in self._recordings and len(self._recordings) >= self.shapes:
            self._tell(f"batches of more than {self.shapes} shapes came; pad them to fewer lengths, or raise shapes", quietly=True)
            return None
        return key, tensors

    def _place(self) -> str | None:
        """Note where the model is; why no graph can be there, or None."""
        first = next(self.model.parameters(), None)
        self._device = torch.device("cpu") if first is None else first.device
        return None if self._device.type == "cuda" else f"CUDA graphs need the model on a GPU, and it is on {self._device}"

    def _tell(self, reason: str, quietly: bool = False) -> None:
        """Note why a step runs eagerly, and say it once; quietly: also where eager steps are refused."""
        self.reason = reason
        if self.enabled is True and not quietly:
            raise RuntimeError(f"GraphedStep: this step cannot be captured, and enabled=True: {reason}")
        if reason not in self._said:
            self._said.add(reason)
            logger.warning("GraphedStep: runs eagerly: %s", reason)

    def _begin(self, standing: Standing | None) -> None:
        """Let go of what was captured for another model than this one."""
        held = getattr(self, "_recordings", None)
        self._recordings: dict[Any, Recording] = {}
        self._seen: dict[Any, tuple[MaskWatch, list[Tensor], own_capture.HostPart]] = {}
        self._tries: dict[Any, int] = {}  # captures that failed, by shape
        self._unfit: dict[Any, str] = {}  # shapes of which none is tried any more, and why
        self._standing = standing
        self._pools: list[Any] = []  # one, and another after a capture that failed
        self._pool: Any = None  # the last, unless it has failed
        if standing is not None:
            self._obstacle = obstacle(self.model)
        if held:
            held.clear()
            torch.cuda.empty_cache()

    def _first(self, lines: Lines, key: Any, inputs: tuple[Any, ...], batch: dict[str, Any], fixed: Any) -> Any:
        """The first batch of its shape: it counts, and lets whatever is made at a first call be made outside of a graph."""
        standing = self._standing
        assert standing is not None
        watch = MaskWatch(batch, padded=key[-1])
        leaves: list[Tensor] = []
        with watch.watching(), own_capture.recording(captured=False) as host:
            output = lines(inputs, batch, fixed, leaves)
        after = Standing(self.model, self._volatile)
        changed = after.changed_since(standing)
        if changed and after.memory == standing.memory and after.mode == standing.mode:  # by the forward itself, such as counters
            self._volatile |= changed
            self._standing = Standing(self.model, self._volatile)
        self._seen[key] = watch, leaves, host
        if len(self._seen) > _SEEN:
            del self._seen[next(iter(self._seen))]
        return output

    def _captured(self, lines: Lines, key: Any, inputs: tuple[Any, ...], batch: dict[str, Any], fixed: Any) -> Recording | None:
        """Capture; None where that fails, for a reason that is told."""
        watch, leaves, host = self._seen[key]
        learning = [one for module in (self.model, *host.modules) for one in module.parameters() if one.requires_grad]
        parameters = list({id(one): one for one in (*learning, *leaves)}.values())
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._pools.append(self._pool)
        listeners = listeners_in(self.model)
        try:
            made = Recording(
                lambda given: lines(given[0], given[1], fixed, None),
                (inputs, batch),
                self._device,
                parameters,
                listeners,
                self._pool,
                watch.skipping(),
            )
        except CaptureFailed as error:
            self._failures += 1
            self._tries[key] = self._tries.get(key, 0) + 1
            self._failure = str(error)
            if self._tries[key] == _TRIES or not error.passing:
                self._unfit[key] = self._failure
            self._pool = None
            torch.cuda.empty_cache()
            self._tell(self._failure)
            return None
        self._failures = 0
        self._recordings[key] = made
        self.captures += 1
        return made
