"""A process that loads what was written, as somebody else's would. It starts early: importing takes it longer than loading."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from . import reload

Reloaded = Callable[[Path, str, Path], dict[str, Any]]


@contextmanager
def started(kind: str) -> Iterator[Reloaded]:
    """Start a process that imports torch, transformers and its class `kind`, for the first call of what this yields.

    `reloaded(directory, loader, exchange)` gives the answer of reload.py, or {"error": what it raised}. Each call has a process of
    its own, in which a stock class loads without apt_ext; that of another call, or of code that comes with the directory, starts then.
    """
    waiting = [_start(kind)]

    def reloaded(directory: Path, loader: str, exchange: Path) -> dict[str, Any]:
        by_code = loader.startswith("Auto")
        if by_code or not waiting:  # transformers copies code of a directory before it runs it
            waiting.append(_start(kind, **{"HF_MODULES_CACHE": str(exchange.with_name("modules"))} if by_code else {}))
        process = waiting[-1]
        said, errors = process.communicate(json.dumps([str(directory), loader, str(exchange)]))
        waiting.remove(process)
        if process.returncode < 0:
            raise RuntimeError(
                f"export: expected the process that loads what was written to end, but signal {-process.returncode} ended it "
                "(9: often for lack of memory); nothing was replaced, so export again"
            )
        if not directory.is_dir():
            raise RuntimeError(f"export: expected {directory} to stay until it is checked, but somebody has removed it")
        if process.returncode:
            return {"error": _reported(errors) or f"exit status {process.returncode}"}
        line = next((line for line in said.splitlines() if line.startswith(reload.MARK)), None)
        if line is None:
            raise RuntimeError(f"export: expected an answer of the process that loads what was written, got none: {_reported(errors)}")
        answer: dict[str, Any] = json.loads(line.removeprefix(reload.MARK))
        return answer

    try:
        yield reloaded
    finally:
        for process in waiting:
            process.kill()
            process.communicate()


def _start(kind: str, **more: str) -> subprocess.Popen[str]:
    # The packages that this process sees, and as many threads, on which the last bits depend.
    same = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-P", reload.__file__, kind]
    environment, pipe = {**os.environ, **same, **more}, subprocess.PIPE
    return subprocess.Popen(command, text=True, env=environment, stdin=pipe, stdout=pipe, stderr=pipe)  # noqa: S603  # our own script


def _reported(stderr: str) -> str:
    """What a Python process raised, then what it printed before: transformers lists the tensors that do not fit."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", stderr).splitlines()
    begins = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    if not begins:
        return "\n".join(lines).strip()
    raised = iter(lines[begins[-1] + 1 :])
    message = [next((line for line in raised if not line.startswith(" ")), ""), *raised]
    before = [line.rstrip() for line in lines[: begins[0]] if line.strip()]
    return "\n".join([*message, *before]).strip()
