"""Work in processes that end with this one, and what a signal does to it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from threading import Thread, current_thread, main_thread
from types import FrameType
from typing import Any, ParamSpec, TypeVar

from .data import Missing
from .messages import log_to_stderr

_P = ParamSpec("_P")
_T = TypeVar("_T")
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_held: list[int] | None = None  # signals that came while a process was being started


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end. `advice`: what the user can do about it, after a semicolon."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)
        self.advice = ""


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Within this context SIGINT, SIGTERM and SIGHUP raise Stopped in the main thread, unless they are ignored.

    The second one ends the process at once: the exception of the first may have been caught on its way.
    """
    if current_thread() is not main_thread():
        yield
        return
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            os._exit(128 + number)
        asked = True
        if _held is None:
            raise Stopped(number)
        _held.append(number)

    before = {number: signal.signal(number, ask) for number in _ENDING if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def worker_pool(workers: int, begin: Callable[..., object] | None = None, *arguments: Any) -> ProcessPoolExecutor:
    """New processes that call `begin(*arguments)` first, and end when this process does, however it ends. Give them work by `submit`."""
    return ProcessPoolExecutor(workers, get_context("spawn"), _begin, (begin, arguments))


def submit(pool: Executor, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
    """Call `function` in a process of the pool. A Ctrl-C in the terminal reaches this process alone, which ends the others.

    A process that starts is known to this one, and has what it needs, before a signal is heard.
    """
    global _held
    _held = []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)  # a process that starts now inherits it
    try:
        future = pool.submit(function, *args, **kwargs)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        asked, _held = _held, None
    if asked:
        raise Stopped(asked[0])
    return future


def run_apart(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Call `function` in a new process and return, or raise, what it does. Missing where the process dies."""
    with worker_pool(1) as pool:
        try:
            return submit(pool, function, *args, **kwargs).result()
        except BrokenProcessPool as error:
            raise Missing(
                f"{function.__name__}: expected a result of the process that runs it, but the process died (killed, or out of memory)"
            ) from error
        except BaseException as error:
            if not isinstance(error, Exception):  # nobody waits for the result
                end_workers()
            raise


def end_workers() -> None:
    """Kill the worker processes of this process, and what they have started."""
    workers = active_children()
    below = [pid for worker in workers if worker.pid is not None for pid in _below(worker.pid)]
    for worker in workers:
        worker.kill()
    _kill(below)


def _begin(begin: Callable[..., object] | None, arguments: tuple[Any, ...]) -> None:
    """A worker starts; it has inherited that no signal but SIGKILL ends it."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGHUP})
    Thread(target=_end_with_parent, daemon=True).start()
    log_to_stderr()
    if begin is not None:
        begin(*arguments)


def _end_with_parent() -> None:
    """A pool's worker waits for work on a pipe that it holds both ends of: when its parent is killed, it does not notice."""
    parent = parent_process()
    assert parent is not None  # of a worker
    parent.join()
    _kill(_below(os.getpid()))
    os._exit(1)


def _below(process: int) -> list[int]:
    """The processes that a process has started, and those that they have; none where only the system knows (not Linux)."""
    found: list[int] = []
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, file.read_text().split())
    return [*found, *(pid for child in found for pid in _below(child))]


def _kill(processes: list[int]) -> None:
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
