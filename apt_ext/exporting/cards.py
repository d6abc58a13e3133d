"""The model card and the provenance of an exported directory: what it is, where it comes from, how it is loaded.

Nothing in them depends on when or where they were written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._version import __version__
from ..common.checks import checked_mapping, checked_number
from ..config import APTConfig
from ..model import APTModel
from ..pruning.architectures.lookup import Blocks
from ..pruning.cost import density_of
from ..pruning.target import Target
from ..storage.base_model import BaseModel, ranks_of
from ..storage.remote_code import CODE, auto_class_of

CARD, PROVENANCE = "README.md", "provenance.json"
_TASKS = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
}  # what the Hub calls them


@dataclass(frozen=True)
class Origin:
    """What an APTModel knows of how a model came about, before it is shrunk.

    full     {block: how many there were before anything was pruned}
    density  the share of the layers' parameters that is kept
    """

    full: dict[str, int]
    density: float
    target: Target | None
    config: APTConfig
    ranks: dict[str, int]

    @classmethod
    def of(cls, model: nn.Module) -> Origin | None:
        """That of an APTModel; None for another module."""
        if not isinstance(model, APTModel):
            return None
        return cls(model.blocks.full, density_of(model.model, model.blocks), model.target, model.apt_config, ranks_of(model.model))


def checked_metrics(metrics: Any) -> dict[str, float]:
    """{name: number}; TypeError and ValueError name the entry."""
    found = {}
    for name, value in checked_mapping("metrics", {} if metrics is None else metrics).items():
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise ValueError(f"metrics: expected printable names of metrics, got {name!r:.100}")
        found[name] = int(value) if isinstance(value, int) and not isinstance(value, bool) else checked_number(f"metrics[{name!r}]", value)
    return found


def write(
    directory: Path,
    name: str,
    written: Any,
    blocks: Blocks,
    origin: Origin | None,
    metrics: Mapping[str, float],
    tokenizer: bool,
) -> None:
    """Write both files for `written`, whose stock files are in `directory`.

    name       by which the commands of the card load it: a directory or a repository of the Hub
    blocks     those of `written`
    tokenizer  whether one is in the directory
    """
    base, code = BaseModel.of(written), (directory / CODE).is_file()
    kept = {block: one.count for block, one in blocks.items()}
    says = _provenance(written, base, kept, origin, metrics, code)
    (directory / PROVENANCE).write_text(json.dumps(says, indent=2) + "\n", encoding="utf-8")
    auto = auto_class_of(type(written), type(written.config))
    parts = [
        f"---\n{_metadata(name, base, auto, metrics, code)}\n---\n",
        f"# {name}\n",
        _summary(written, base, origin),
        _load(name, type(written).__name__, auto, code, tokenizer),
        _kept(blocks, origin),
        _metrics(metrics),
        f"Versions, settings and ranks of the run are in `{PROVENANCE}`.\n",
    ]
    (directory / CARD).write_text("\n".join(filter(None, parts)), encoding="utf-8")


def _provenance(
    written: Any, base: BaseModel, kept: dict[str, int], origin: Origin | None, metrics: Mapping[str, float], code: bool
) -> dict[str, Any]:
    import transformers

    found: dict[str, Any] = {
        "apt_ext": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "base": asdict(base),
        "class": type(written).__name__,
        "loads_with": "trust_remote_code=True or apt_ext.load_export" if code else "stock transformers",
        "parameters": sum(parameter.numel() for parameter in written.parameters()),
        "kept": kept,
        "metrics": dict(metrics),
    }
    if origin is not None:
        found |= {
            "before": origin.full,
            "density": origin.density,
            "target": None if origin.target is None else origin.target.to_dict(),
            "config": origin.config.to_dict(),
            "ranks": origin.ranks,
        }
    return found


def _metadata(name: str, base: BaseModel, auto: str | None, metrics: Mapping[str, float], code: bool) -> str:
    """The card's YAML, as the Hub reads it."""
    from huggingface_hub import EvalResult, ModelCardData

    task = _TASKS.get(auto or "")
    more: dict[str, Any] = {}
    if metrics and task is not None:  # the Hub takes no result without a task; what the data were is not known here
        results = [EvalResult(task, "unknown", "Unknown", metric, value) for metric, value in metrics.items()]
        more = {"model_name": name, "eval_results": results}
    tags = ["apt_ext", "structured-pruning", "lora", *(["custom_code"] if code else [])]
    data = ModelCardData(library_name="transformers", base_model=base.hub_name, pipeline_tag=task, tags=tags, **more)
    return str(data.to_yaml()).rstrip()


def _summary(written: Any, base: BaseModel, origin: Origin | None) -> str:
    of = f" of `{base.title}`" if base.name else ""
    revision = f" (revision `{base.revision}`)" if base.revision else ""
    count = sum(parameter.numel() for parameter in written.parameters())
    lines = [
        f"A `{type(written).__name__}`{of}{revision} with {count:,} parameters, fine-tuned with low-rank adapters while it was "
        "pruned ([APT](https://arxiv.org/abs/2401.12200), by apt_ext). The adapters are merged and the pruned parts are gone.\n"
    ]
    if origin is not None:
        target = origin.target
        reached = "" if target is None or target.reached else ", which was not reached"
        aim = f"; the target was {target.density:g} of the {target.budget}{reached}" if target is not None else ""
        lines.append(f"Density: {origin.density:.4f} of the layers' parameters are kept{aim}.\n")
    return "\n".join(lines)


def _load(name: str, kind: str, auto: str | None, code: bool, tokenizer: bool) -> str:
    loader = auto or kind
    arguments = ', dtype="auto", trust_remote_code=True' if code else ', dtype="auto"'
    names = ", ".join(sorted([loader, *(["AutoTokenizer"] if tokenizer else [])]))
    commands = [f"from transformers import {names}\n", f'model = {loader}.from_pretrained("{name}"{arguments})']
    if tokenizer:
        commands.append(f'tokenizer = AutoTokenizer.from_pretrained("{name}")')
    text = "## Load\n\n```python\n" + "\n".join(commands) + "\n```\n"
    if code:
        text += (
            f"\nIts layers have widths of their own, which no stock config says: `{CODE}` in this directory makes them, and "
            "`trust_remote_code=True` lets it run. With apt_ext installed no code of the directory has to run:\n\n"
            f'```python\nimport apt_ext\n\nmodel = apt_ext.load_export("{name}")  # a directory\n```\n'
        )
    return text


def _kept(blocks: Blocks, origin: Origin | None) -> str:
    """Tables of what is left: of each kind over all layers, and of every layer."""
    full = {} if origin is None else origin.full
    parts = list(dict.fromkeys(block.part for block in blocks.values()))
    if not parts:
        return ""

    def shown(counts: list[int]) -> str:
        return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"

    rows = ["| | kept | before |", "| --- | --- | --- |"]
    for part in parts:
        names = [name for name, block in blocks.items() if block.part == part]
        before = shown([full[name] for name in names if name in full] or [0]) if full else "unknown"
        each = "" if part == "hidden" else " a layer"
        rows.append(f"| {part.replace('_', ' ')}{each} | {shown([blocks[name].count for name in names])} | {before} |")
    layers: dict[str, dict[str, str]] = {}
    for name, block in blocks.items():
        if block.layer >= 0:
            of = f" of {full[name]}" if name in full else ""
            layers.setdefault(f"{block.stack}{block.layer}", {})[block.part] = f"{block.count}{of}"
    each_layer = [part for part in parts if part != "hidden"]
    table = [f"| layer | {' | '.join(each_layer)} |", "| --- " * (len(each_layer) + 1) + "|"]
    table += [f"| {layer} | {' | '.join(found.get(part, '') for part in each_layer)} |" for layer, found in layers.items()]
    return "## What is kept\n\n" + "\n".join(rows) + "\n\n" + "\n".join(table) + "\n"


def _metrics(metrics: Mapping[str, float]) -> str:
    if not metrics:
        return ""
    rows = [f"| {name.replace('|', '/')} | {value:g} |" for name, value in metrics.items()]
    return "## Metrics\n\n" + "\n".join(["| metric | value |", "| --- | --- |", *rows]) + "\n"
