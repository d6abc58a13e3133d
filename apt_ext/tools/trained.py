"""A model that training has left in a directory: what `apt-ext train` wrote, a Trainer's checkpoint, or what `save_pretrained` wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import apt_ext

from .data import Missing
from .models import check_weights, class_of, empty_model, load, load_tokenizer, package_file, transformers_offline
from .places import read_json
from .train_checks import CHECKPOINTS, MODEL, RECORD, checkpoints

_TASKS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "CausalLM", "MaskedLM")
_CONFIG, _WEIGHTS = "apt_config.json", ("apt_model.safetensors", "model.safetensors")


@dataclass(frozen=True)
class Trained:
    """A checkpoint and what is known of it.

    record  what `apt-ext train` has noted of its run; {} where another program wrote the checkpoint
    """

    directory: Path
    base: Path
    record: dict[str, Any]
    values: dict[str, Any]

    @classmethod
    def of(cls, given: Path, base: str | None) -> Trained:
        """The last checkpoint in a directory of `apt-ext train`, or the one that `given` is. Missing for others, and without a base."""
        directory = given
        if (given / RECORD).is_file():
            found = checkpoints(given)
            if not found:
                raise Missing(f"checkpoint: expected one in {given / CHECKPOINTS}, found none")
            directory = found[-1]
        if not (directory / _CONFIG).is_file():
            raise Missing(
                f"checkpoint: expected a directory that APTModel.save_pretrained, a Trainer or apt-ext train wrote, found no {_CONFIG} in "
                f"{directory}"
            )
        above = next((one for one in (directory, *directory.absolute().parents[:2]) if (one / RECORD).is_file()), None)
        record = read_json("checkpoint", above / RECORD) if above is not None else {}
        values = read_json("checkpoint", directory / _CONFIG)
        name = base or record.get("base") or (values.get("base") or {}).get("name")
        if not name:
            raise Missing(f"base: expected --base MODEL, the model that was trained, which {directory / _CONFIG} does not name")
        path = package_file(str(name))
        check_weights(path)
        return cls(directory, path, record, values)

    def load(self) -> apt_ext.APTModel:
        """The trained model over its base. Missing for a base that it does not fit."""
        kind, config = self._class()
        stock = load(self.base, kind, head=True, **config)
        try:
            return apt_ext.APTModel.from_pretrained(stock, self.directory).eval()
        except (ValueError, TypeError) as error:
            raise Missing(f"checkpoint: {error}") from error

    def tokenizer(self) -> Any:
        """That of the checkpoint, or of the base; None where neither has one."""
        for place in (self.directory, self.base):
            try:
                return load_tokenizer(place)
            except Missing:
                continue
        return None

    def _class(self) -> tuple[Any, dict[str, Any]]:
        """(the class that was trained, what its config says of the labels), as far as something has noted it."""
        transformers = transformers_offline()
        named = self.record.get("class") or (self.values.get("base") or {}).get("kind")
        kind = getattr(transformers, str(named), None) or self._with_head()
        _, there = class_of(self.base)
        expected = getattr(kind, "config_class", None)
        if expected is not None and not isinstance(there, expected):
            raise Missing(
                f"checkpoint: expected a base with a {expected.__name__}, because a {kind.__name__} was trained, got a "
                f"{type(there).__name__} in {self.base}"
            )
        if "config" in self.record:
            return kind, self.record["config"]
        labels = self._labels(kind)
        return kind, {} if labels is None else {"num_labels": labels}

    def _with_head(self) -> Any:
        """The base's own class, or, where it has no such modules as were saved, one for a task that has."""
        transformers = transformers_offline()
        own, config = class_of(self.base)
        for kind in (own, *(getattr(transformers, f"AutoModelFor{task}") for task in _TASKS)):
            table = getattr(kind, "_model_mapping", None)
            if table is None or type(config) in table:
                modules = dict(empty_model(self.base, kind).named_modules())
                if all(name in modules for name in self.values.get("saved", [])):
                    return kind
        return own

    def _labels(self, kind: Any) -> int | None:
        """How many labels the head in the checkpoint has, where that is another number than the base's."""
        from safetensors import SafetensorError, safe_open

        shapes: dict[str, list[int]] = {}
        for name in _WEIGHTS:
            if (self.directory / name).is_file():
                try:
                    with safe_open(self.directory / name, "pt") as file:
                        shapes |= {key: list(file.get_slice(key).get_shape()) for key in file.keys()}
                except (SafetensorError, OSError) as error:
                    raise Missing(f"checkpoint: expected tensors in {self.directory / name}, got {error}") from error
        empty = empty_model(self.base, kind)
        for name, parameter in empty.named_parameters():
            there = shapes.get(f"model.{name}", shapes.get(name))
            if there and there[1:] == list(parameter.shape[1:]) and there[0] != parameter.shape[0] == empty.config.num_labels:
                return there[0]
        return None

    def controller(self, model: apt_ext.APTModel) -> apt_ext.Controller | None:
        """The Controller of a run of `apt-ext train` as it was at this checkpoint; None where nothing has noted it."""
        state = getattr(model, "controller_state", None)
        options = self.record.get("options")
        if state is None or options is None:
            return None
        names = ("density", "budget", "joint", "floor", "growth", "decay", "kurtosis", "shrink", "seed")
        given = {name: options[name] for name in names} | ({"length": options["length"]} if options["length"] else {})
        optimizer = torch.optim.AdamW(apt_ext.adapter_parameters(model))
        controller = apt_ext.Controller(model, optimizer, self.record["steps"], **given)
        controller.load_state_dict(state)
        return controller

    def losses(self) -> list[dict[str, Any]] | None:
        """What Trainer has logged; None where it has not."""
        file = self.directory / "trainer_state.json"
        return read_json("checkpoint", file).get("log_history") if file.is_file() else None

    @property
    def exported(self) -> Path | None:
        """The export of the run."""
        place = self.directory.parent.parent / MODEL
        return place if self.record and (place / "config.json").is_file() else None
