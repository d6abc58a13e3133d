"""The command line: `apt-ext` or `python -m apt_ext`."""

from __future__ import annotations

import argparse
import glob
import json
import os
import select
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import TextIO

import torch

from ..config import APTConfig
from ..method.planner import plan
from ..method.prediction.prediction import asked
from . import doctor, layer_bench
from .arguments import parser
from .data import Missing, Misuse
from .demo import CheckFailed, demo
from .export_command import export_checkpoint
from .messages import say, warnings_on_stderr
from .models import empty_model, package_file
from .places import directory_for, directory_of, replace_json
from .processes import stopped_by_signals
from .report_command import report_of
from .shrinking import Settings, shrink_model, shrink_random, table

_CLOSED_PIPE = 141  # as a shell says that a program ended by SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status, with one sentence on stderr unless that is 0 or 141.

    0        done
    1        something is missing or failed; with --debug the traceback is shown before the sentence
    2        the arguments cannot be meant; argparse raises SystemExit(2) for those that it finds itself
    128 + n  signal n ended the command, and the processes that it had started
    141      nobody reads the output
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with stopped_by_signals(), warnings_on_stderr():
            return _status(words)
    except KeyboardInterrupt as stopped:
        ended = getattr(stopped, "signal", signal.SIGINT)
        say(f"ended by {ended.name}{getattr(stopped, 'advice', '')}")
        return 128 + ended


def _status(words: list[str]) -> int:
    """The exit status of a command that no signal ended."""
    debug = "--debug" in words
    try:
        try:
            options = _parser().parse_args(words)
            options.argv = words
            options.run(options)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where an error can be told
    except Exception as error:
        unread = isinstance(error, BrokenPipeError) and (_unread(sys.stdout) or _unread(sys.stderr))
        _drop(sys.stdout)
        if unread:
            return _CLOSED_PIPE
        if debug:
            traceback.print_exc()
        worded = isinstance(error, (Missing, CheckFailed))
        say(str(error) if worded else f"{type(error).__name__}: {error}" + ("" if debug else " (--debug shows the traceback)"))
        return 2 if isinstance(error, Misuse) else 1
    return 0


def _drop(stream: TextIO | None) -> None:
    """Forget what is buffered and cannot be written: Python would try again at its end, and complain."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _unread(stream: TextIO | None) -> bool:
    """Whether a stream is a pipe that nobody reads any more."""
    poll = select.poll()
    with suppress(OSError, ValueError, AttributeError):  # a stream that is no file, or none
        poll.register(stream.fileno(), 0)  # type: ignore[union-attr]
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    return False


def _demo(options: argparse.Namespace) -> None:
    with directory_for("output", options.output):
        demo(options.output, seed=options.seed, steps=options.steps, archive=options.data, quick=options.quick)


def _plan(options: argparse.Namespace) -> None:
    keep = _once(options.keep) if options.keep else None
    step = {name: getattr(options, name) for name in ("gpus", "sharding", "batch", "liger", "checkpointing", "rates")}
    try:
        config = APTConfig(
            r=options.rank,
            target_modules=options.target_modules or "all-linear",
            density=options.density,
            prune=options.prune,
        )
        asked(**step)
    except ValueError as error:
        raise Misuse(str(error)) from error
    model = empty_model(package_file(options.model))
    dtype = options.dtype or (None if options.gpus is None else "bfloat16")
    if dtype is not None:
        model.to(getattr(torch, dtype))
    try:
        found = plan(model, config, keep=keep, length=options.length, **step)
    except ValueError as error:
        raise Missing(str(error)) from error
    print(json.dumps(found.to_dict(), indent=2) if options.json else found)


def _shrink(options: argparse.Namespace) -> None:
    settings = Settings(
        keep=_once(options.keep),
        batch=options.batch,
        length=options.length,
        score=options.score,
        test=options.test,
        steps=options.steps,
        recover=options.recover,
        rounds=options.rounds,
        commit=options.commit,
        seed=options.seed,
    )
    if options.random and (options.steps or options.recover):
        raise Misuse("random: expected no --steps and no --recover, which random Parameters do not need")
    with ExitStack() as stack:
        stack.enter_context(directory_for("output", options.output))
        if options.json:
            stack.enter_context(directory_of("json", options.json))
        try:
            if options.random:
                report = shrink_random(Path(options.model), options.output, settings, devices=options.device)
            else:
                text = [path for given in options.text or [] for path in _matching(given)]
                report = shrink_model(
                    options.model,
                    options.output,
                    settings,
                    text=text,
                    reviews=options.reviews,
                    rows=options.data or [],
                    columns=(options.text_column, options.label_column),
                    devices=options.device,
                )
        except ValueError as error:
            raise Missing(str(error)) from error
    print(table(report))
    print(f"Written: {options.output / 'model'} (smaller), {options.output / 'dense'} (before), {options.output / 'report.json'}.")
    if options.json:
        kept = {"command": _without_places(options.argv), **report}
        replace_json(options.json, kept)


def _train(options: argparse.Namespace) -> None:
    """Options of `train` are jsonargparse's, which only it needs."""
    from .train import train
    from .train_options import in_options, parsed
    from .train_table import table as train_table

    words = [word for word in options.words if word != "--debug"]
    settings = parsed(words)
    try:
        report = train(settings, words)
    except ValueError as error:
        raise Missing(in_options(str(error))) from error
    if report is None:
        return
    print(train_table(report))
    if settings.json is not None:
        replace_json(settings.json, {**report, "command": _without_places(["train", *words])}, indent=2)


def _export(options: argparse.Namespace) -> None:
    loader = export_checkpoint(options.checkpoint, options.base, options.output, options.per_layer, options.unfinished)
    print(f"Written: {options.output}, which {loader} loads.")


def _report(options: argparse.Namespace) -> None:
    print(f"Written: {report_of(options.directory, options.base, options.output, options.rounds)}.")


def _doctor(options: argparse.Namespace) -> None:
    found = doctor.findings()
    print(json.dumps(doctor.as_dict(found), indent=2) if options.json else doctor.as_text(found))
    broken = [one.name for one in found if one.state == doctor.BROKEN]
    if broken:
        raise Missing(f"doctor: expected an installation that works, got {len(broken)} broken: {', '.join(broken)}")


def _bench(options: argparse.Namespace) -> None:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise Missing("device: expected a CUDA device that torch can use, found none")
    with directory_of("json", options.json) if options.json is not None else nullcontext():
        found = layer_bench.bench_layers(device, options.rounds, options.rank)
        print(layer_bench.table(found))
        if options.json is not None:
            replace_json(options.json, found)


def _results(options: argparse.Namespace) -> None:
    """Refuse what only benchmarks/evidence can do."""
    raise Missing(
        "results: expected a checkout of the repository, which has benchmarks/evidence, got an installed package; "
        "run it after this in a checkout: python -m pip install -e ."
    )


def _matching(given: str) -> list[Path]:
    """The files of a name or pattern, in order; the name itself where there is none, for whoever reads it to say so."""
    return [Path(path) for path in sorted(glob.glob(given))] or [Path(given)]


def _without_places(argv: list[str]) -> str:
    """The command line, without where its results went."""
    places = ("--output", "--json", "--commit")
    kept = [word for i, word in enumerate(argv) if word.partition("=")[0] not in (*places, "--debug") and argv[i - 1] not in places]
    return shlex.join(["apt-ext", *kept])


def _once(pairs: list[tuple[str, int]]) -> dict[str, int]:
    """A kind that is given twice is a mistake."""
    kinds = [kind for kind, _ in pairs]
    twice = next((kind for kind in kinds if kinds.count(kind) > 1), None)
    if twice is not None:
        raise Misuse(f"keep: expected each kind once, got {twice} more than once")
    return dict(pairs)


def _parser() -> argparse.ArgumentParser:
    return parser(
        {
            "demo": _demo,
            "plan": _plan,
            "shrink": _shrink,
            "train": _train,
            "export": _export,
            "report": _report,
            "doctor": _doctor,
            "bench": _bench,
            "results": _results,
        }
    )
