"""What `apt-ext train` refuses before a model is loaded: places, other runs, and what the shapes of the model and the options decide."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

from ..config import APTConfig
from ..method.outlook import check_settings
from ..method.schedule import Steps
from ..storage import checkpoint as saved
from ..storage import state_directory
from ..wrapping.build import match
from .data import Missing, Misuse
from .messages import logger
from .models import class_of, load_tokenizer, transformers_offline
from .places import check_export, read_json
from .train_options import TrainOptions, dashed, in_options

RECORD, CHECKPOINTS, MODEL, TEACHER, REPORT = "run.json", "checkpoints", "model", "teacher", "report.html"
DISTILLER = "distiller"  # in a checkpoint
_OF_TRAINER = ("optimizer.pt", "scheduler.pt", "rng_state.pth")  # in a checkpoint, beside the model
_FEW = 100  # steps before the last event, below which a run is too short to prune
_LENGTH = 128  # tokens of a sequence that a budget of FLOPs is of


def check_output(output: Path, resume: bool) -> None:
    """Missing where there is something else, or a run that is not to go on."""
    there = {one.name for one in output.iterdir()}
    record = (output / RECORD).is_file()
    if resume:
        if not record:
            raise Missing(f"resume: expected a run of apt-ext train in {output}, found none; leave --resume out")
    elif there:
        begun = record and not checkpoints(output) and there <= {RECORD, CHECKPOINTS, TEACHER}
        if not begun:  # one that was ended before its first checkpoint begins anew
            advice = "--resume goes on with the run in it" if record else "choose another or empty it"
            raise Missing(f"output: expected a missing or empty directory, got one with other content: {output}; {advice}")
    check_export("output", output / MODEL)


def checkpoint_of(output: Path, record: dict[str, Any]) -> Path:
    """The last checkpoint of a run that was begun alike; Missing where there is none, Misuse where it was begun otherwise."""
    before = read_json("resume", output / RECORD)
    for name, words in (("model", "MODEL"), ("data", "--data")):
        if before.get(name) != record[name]:
            raise Misuse(f"resume: expected the {words} of the run in {output}, got another")
    plain = json.loads(json.dumps(record["options"]))
    for name, value in before.get("options", {}).items():
        if plain.get(name) != value:
            wanted = f"no {dashed(name)}" if value is None else f"{dashed(name)} {value}"
            raise Misuse(f"resume: expected {wanted} as in the run in {output}, got {plain.get(name)}")
    found = checkpoints(output)
    if plain["teacher"]:  # killed between the two
        found = [one for one in found if (one / DISTILLER / state_directory.MANIFEST_FILE).is_file()]
    if not found:
        raise Missing(f"resume: expected a checkpoint in {output / CHECKPOINTS}, found none; leave --resume out, and it begins anew")
    damages: list[tuple[str, str]] = []
    for one in reversed(found):
        found_damage = _damage_of(one)
        if found_damage is None:
            for damage, name in damages:
                logger.warning("%s; %s is skipped, %s is whole and taken", damage, name, one.name)
            return one
        damages.append((found_damage, one.name))
    said = "; ".join(damage for damage, _ in damages)
    raise Missing(
        f"resume: expected a whole checkpoint in {output / CHECKPOINTS}, got {said}; empty {output} and begin anew without --resume"
    )


def _damage_of(checkpoint: Path) -> str | None:
    """What keeps training from going on from this checkpoint, naming the file; None where it is whole."""
    try:
        with saved.opened(checkpoint) as one:
            one.read_through()
        if (checkpoint / DISTILLER).is_dir():
            state_directory.load(checkpoint / DISTILLER, lambda state: None)
        read_json("resume", checkpoint / "trainer_state.json")
    except (ValueError, OSError, Missing) as error:
        return str(error).removeprefix("resume: ")
    for name in _OF_TRAINER:
        file = checkpoint / name
        if not file.is_file():
            return f"{file}: expected what Trainer has saved, found no such file"
        if not zipfile.is_zipfile(file):  # what torch.save writes; its table is at the end
            return f"{file}: expected what Trainer has saved, got a file that is damaged ({file.stat().st_size} bytes)"
    return None


def checkpoints(output: Path) -> list[Path]:
    """Those of a run that are whole, the last one at the end: what Trainer writes last is there."""
    found = [file.parent for file in output.glob(f"{CHECKPOINTS}/checkpoint-*/trainer_state.json")]
    return sorted(found, key=lambda one: int(one.name.rpartition("-")[2]))


def kind_of(path: Path, text: bool) -> tuple[Any, list[str]]:
    """(the auto class of transformers that learns it, the classes that the model knows by name). Missing where there is no such model."""
    transformers = transformers_offline()
    config = class_of(path)[1]
    if not text:
        if type(config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise Missing(f"model: expected one that can have a classifier, which rows with labels need, got {type(config).__name__}")
        names = [str(name) for _, name in sorted(config.id2label.items())]
        return transformers.AutoModelForSequenceClassification, names
    encoder = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or encoder:
        raise Missing(
            f"data: expected rows with labels (.csv, .tsv, .jsonl) for {type(config).__name__}, which is no causal language model, got text"
        )
    return transformers.AutoModelForCausalLM, []


def config_of(options: TrainOptions) -> APTConfig:
    try:
        return APTConfig(
            r=options.rank,
            lora_alpha=options.lora_alpha,
            lora_dropout=options.lora_dropout,
            target_modules=options.target_modules or "all-linear",
            exclude_modules=options.exclude_modules,
            modules_to_save=options.modules_to_save,
            max_rank=options.max_rank,
            float32_factors=options.dtype != "float32",
            prune=None if options.prune is None else [*options.prune],
            density=options.density,
            schedule=options.schedule,
            round_to=options.round_to,
            uniform=options.uniform,
        )
    except (TypeError, ValueError) as error:
        raise Misuse(str(error)) from error


def check_controller(empty: Any, config: APTConfig, options: TrainOptions, steps: int) -> None:
    """Missing for what the Controller, or the export at the end, would refuse of a model of these shapes."""
    names = ("export", "budget", "floor", "joint")
    given = {name: getattr(options, name) for name in names}
    try:
        match(empty, config)  # the names of modules
        chosen = check_settings(empty, config, steps, length=options.length or _LENGTH, **given)
    except (TypeError, ValueError) as error:
        raise Missing(in_options(str(error))) from error
    if config.density < 1.0 and (last := Steps.of(options.schedule, steps).end) < _FEW:
        logger.warning(
            "the run has %d steps, %d of them before pruning ends: too few to measure which blocks matter and to learn "
            "again what is lost. 500 steps or more are a good start (--epochs or --max-steps; docs/choosing.md)",
            steps,
            last,
        )
    if config.density == 1.0:
        logger.warning("density is 1, so nothing is pruned; ranks grow")
    elif config.prune is None:
        logger.info("--prune is not given: %s are pruned", " and ".join(chosen.prune or []))


def tokenizer_of(path: Path) -> Any:
    tokenizer = load_tokenizer(path)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise Missing(f"model: expected a tokenizer with a padding or end token in {path}, got one without")
        tokenizer.pad_token = tokenizer.eos_token
        logger.info("the tokenizer has no padding token; its end token %r pads", tokenizer.eos_token)
    return tokenizer


def fingerprint(path: Path) -> str:
    files = [path] if path.is_file() else sorted(one for one in path.iterdir() if one.suffix in (".safetensors", ".bin"))
    digest = hashlib.sha256(b"" if path.is_file() else (path / "config.json").read_bytes())
    digest.update(json.dumps([(file.name, file.stat().st_size) for file in files]).encode())
    return digest.hexdigest()[:16]
