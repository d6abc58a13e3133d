"""The command line: `apt-ext` or `python -m apt_ext`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .data import ARCHIVE, Missing
from .demo import QUICK_STEPS, STEPS, CheckFailed, demo


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 if all went well, 1 with one sentence on stderr if something is missing or a check failed."""
    options = _parser().parse_args(argv)
    try:
        demo(options.output, seed=options.seed, steps=options.steps, archive=options.data, quick=options.quick)
    except (Missing, CheckFailed) as error:
        print(f"apt-ext: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="apt-ext", description="Fine-tune with low-rank adapters while pruning (APT).")
    commands = parser.add_subparsers(required=True, metavar="command")
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
    command.add_argument("--seed", type=int, default=0, help="of head, adapters, dropout, batches (%(default)s); the split stays")
    command.add_argument("--steps", type=_positive, help=f"optimizer steps of each run ({STEPS})")
    command.add_argument("--data", type=Path, default=ARCHIVE, metavar="PATH", help="vaderSentiment's source archive (%(default)s)")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value
