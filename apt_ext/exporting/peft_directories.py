"""`to_peft`: an adapter that stock PEFT loads, and the cut base that it goes onto as a directory of stock `transformers`."""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..common.checks import checked_bool, checked_path
from ..common.extras import lacking
from ..common.names import covered
from ..model import APTModel
from ..storage import atomic_dir
from ..storage.per_layer import MANIFEST
from ..wrapping import peft_factors
from ..wrapping.peft_factors import TENSORS_FILE, exactly
from . import reload
from .directories import apart, check_class, complete, expressed, probe, save_stock
from .fresh import started
from .peft_parts import Parts, flat, taken_apart

_ADAPTER, _BASE = "adapter", "base"
_REMEDY = (
    "PEFT needs a stock base: prune to sizes that its config can say (uniform=True gives all layers one width, and "
    "Controller(export='stock') checks them before training), or merge the adapters with apt_ext.export(model, path, per_layer=True)"
)
# {the end of a class's name: PEFT's task}
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
# What PEFT saves for a task whether or not it is asked to, and what a class must have for it.
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
_NEEDED = {"CAUSAL_LM": "prepare_inputs_for_generation", "SEQ_2_SEQ_LM": "prepare_inputs_for_generation"}


def to_peft(model: APTModel, path: str | os.PathLike[str], *, unfinished: bool = False) -> str:
    """Write an APTModel as an adapter of PEFT into `path`/adapter and, where something is pruned, its cut base into `path`/base.

    The adapter has the ranks and scalings of each layer (rank_pattern, alpha_pattern) and what trained whole
    (modules_to_save); what shares a trained weight is saved with it, for PEFT trains copies. The base is a directory of
    stock transformers, without what blocks or adapters mask to exact zeros. Without zeros and cuts there is none: the
    adapter goes onto the model that it was trained on. `PeftModel.from_pretrained(base, f"{path}/adapter")` then gives
    the logits of `model`, which is untouched.

    Both are written beside `path`, loaded from there (the base in a fresh process, the adapter by PEFT) and compared, and
    take their place in one step; whatever raises leaves `path` as it was. It may be missing, empty, or hold an earlier
    result that nobody changed, which is replaced. It needs as much memory as the model beside it.

    unfinished  write it as it is also where a Controller has not reached its density

    Returns `path`.

    Raises TypeError (not an APTModel), ValueError (fractions in masks; widths that only `apt_ext.export(per_layer=True)`
    can say; no adapter with a rank; a path with other content; what does not come back), RuntimeError (a Controller has
    not reached its density; values that are sharded, on meta or not finite) and ImportError without peft.
    """
    if not isinstance(model, APTModel):
        raise TypeError(f"model: expected an APTModel, got {type(model).__name__}")
    if not checked_bool("unfinished", unfinished):
        model.refuse_unfinished("to_peft")
    target = checked_path(path).absolute()
    _check_target(target)
    try:
        import peft
    except ImportError as error:
        raise ImportError(lacking("to_peft", "peft", error)) from error
    inputs, expected = _probed(model)
    parts = taken_apart(model)
    written, loader = parts.base, type(parts.base).__name__
    name: str | None = getattr(getattr(parts.base, "config", None), "_name_or_path", None) or None
    if parts.changed:
        check_class(parts.base)
        written, loader = expressed(parts.base, False, remedy=_REMEDY)
        name = os.path.join(os.fspath(path), _BASE)
    fields = _fields(parts, written, model.apt_config.lora_dropout, name)
    config = peft.LoraConfig(**fields)
    config.target_modules = fields["target_modules"]  # of which it has made a set, in another order in each process
    with atomic_dir.made(target.parent), atomic_dir.stage(target.parent, target.name) as beside:
        new = beside / "new"
        adapter = new / _ADAPTER
        adapter.mkdir(parents=True)
        if parts.changed:
            with started(loader) as reloaded:
                complete(parts.base, new / _BASE, loader, reloaded, partial(save_stock, written, new / _BASE))
            (new / "exchange.safetensors").unlink(missing_ok=True)
        _save(parts, config, adapter, _card(parts, os.fspath(path), name, loader if parts.changed else None))
        _compare(parts, adapter, inputs, expected)
        atomic_dir.sync(new)
        atomic_dir.place(new, target)
    return os.fspath(path)


def _check_target(target: Path) -> None:
    """ValueError unless this directory is missing, empty, or an earlier result that nobody changed."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ValueError(f"path: expected a directory, a missing or an empty one, got another kind of file: {target}")
    inside = list(target.iterdir()) if target.exists() else []
    ours = {child.name for child in inside} <= {_ADAPTER, _BASE} and all(
        child.is_dir() and not child.is_symlink() and atomic_dir.unchanged(child, MANIFEST) for child in inside
    )
    if not ours:
        raise ValueError(
            f"path: expected a missing or empty directory, or an unchanged earlier result of to_peft, got one with other content: "
            f"{target}; choose another or empty it"
        )


def _probed(model: APTModel) -> tuple[dict[str, Tensor], Tensor | None]:
    """Inputs and the first output for them; none where the model is not transformers' or wants other inputs."""
    return probe(model) if hasattr(model, "dummy_inputs") else ({}, None)


def _fields(parts: Parts, written: nn.Module, dropout: float, name: str | None) -> dict[str, Any]:
    """The fields of the LoraConfig: r and lora_alpha are those of most layers, the others are named."""
    ranks = {name: len(pair.A) for name, pair in parts.pairs.items()}
    alphas = {name: _alpha(pair.scaling, ranks[name]) for name, pair in parts.pairs.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    kind, task = type(written), _task(parts, written)
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {exactly(name): rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {exactly(name): own for name, own in alphas.items() if own != alpha},
        "target_modules": _shortest(list(parts.pairs), parts.base),
        "modules_to_save": list(parts.saved) or None,
        "lora_dropout": dropout,
        "fan_in_fan_out": all(type(parts.base.get_submodule(name)).__name__ == "Conv1D" for name in parts.pairs),
        "task_type": task,
        "auto_mapping": None if task else {"base_model_class": kind.__name__, "parent_library": kind.__module__},
        "base_model_name_or_path": name,
        "inference_mode": True,
    }


def _alpha(scaling: float, rank: int) -> int | float:
    """The lora_alpha whose quotient by `rank` is the scaling, a whole number where it is one."""
    alpha = scaling * rank
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) and round(alpha) / rank == scaling else alpha


def _task(parts: Parts, written: nn.Module) -> str | None:
    """PEFT's task for the class, where PEFT then saves no module that did not train; None: PEFT takes any class."""
    task = next((task for end, task in _TASKS.items() if type(written).__name__.endswith(end)), None)
    if task is None or not hasattr(written, _NEEDED.get(task, "forward")):
        return None
    heads = [name for name, _ in parts.base.named_modules() if name.endswith(_HEADS.get(task, ("/",)))]
    return task if all(covered(name, list(parts.saved)) for name in heads) else None


def _shortest(targets: list[str], base: nn.Module) -> list[str]:
    """The last parts of the targets' names where no other module ends so, else whole names."""
    others = {name for name, _ in base.named_modules(remove_duplicate=False)} - set(targets)
    taken = {name.rpartition(".")[2] for name in others}
    return sorted({name if name.rpartition(".")[2] in taken else name.rpartition(".")[2] for name in targets})


def _save(parts: Parts, config: Any, directory: Path, card: str) -> None:
    from safetensors.torch import save_file

    tensors = {f"{name}.lora_{factor}.weight": getattr(pair, factor) for name, pair in parts.pairs.items() for factor in "AB"}
    tensors |= flat(parts.saved)
    plain = {f"base_model.model.{name}": value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    save_file(plain, directory / TENSORS_FILE, metadata={"format": "pt"})
    config.save_pretrained(str(directory))
    (directory / "README.md").write_text(card, encoding="utf-8")
    atomic_dir.seal(directory, MANIFEST)


def _card(parts: Parts, path: str, name: str | None, loader: str | None) -> str:
    """The text of README.md in `path`/adapter; `loader` is the class that loads our base, None: there is none of ours."""
    ranks, kind = [len(pair.A) for pair in parts.pairs.values()], loader or type(parts.base).__name__
    hub = f"base_model: {name}\n" if name and loader is None else ""
    base = f"{name}, pruned, for {loader} of transformers" if loader else name or "the model that it was trained on"
    stock = type(parts.base).__module__.partition(".")[0] == "transformers"
    lines = [f"from transformers import {kind}", ""] if stock else [""]
    lines += [f'base = {kind}.from_pretrained("{name or "..."}", dtype="auto")' if stock else "base = ...  # as it was trained on"]
    return f"""---
library_name: peft
{hub}tags:
- lora
- apt_ext
---

# LoRA adapter

Written by apt_ext {__version__}, which fine-tunes while it prunes (APT, arXiv 2401.12200).

- base model: {base}
- ranks: {min(ranks)} to {max(ranks)} in {len(ranks)} linears, {sum(ranks)} in all; adapter_config.json has each
- modules that trained whole: {", ".join(parts.saved) or "none"}

```python
from peft import PeftModel
{chr(10).join(lines)}
model = PeftModel.from_pretrained(base, "{os.path.join(path, _ADAPTER)}")
```
"""


def _compare(parts: Parts, directory: Path, inputs: dict[str, Tensor], expected: Tensor | None) -> None:
    """ValueError unless PEFT, around the base of `parts`, loads the same from `directory` and computes the same with it."""
    import peft

    devices = {parameter.device.index for parameter in parts.base.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=list(devices)), warnings.catch_warnings():  # PEFT draws factors before it loads them
        warnings.simplefilter("ignore")  # PEFT's on tied weights, which are saved together
        try:
            loaded: Any = peft.PeftModel.from_pretrained(parts.base, str(directory))
            found = peft_factors.read(loaded)
        except (ValueError, TypeError, RuntimeError, KeyError, AttributeError) as error:
            raise ValueError(f"model: expected PEFT to load the adapter again, but it does not: {type(error).__name__}: {error}") from error
        difference = _difference(parts, found)
        if difference:
            raise ValueError(f"model: expected PEFT to load the same adapter again, but {difference}")
        if expected is None:
            return
        loaded.eval()
        far = apart(reload.first_output(loaded, inputs).to(expected), expected)
    if far:
        raise ValueError(
            f"model: expected PEFT to compute the same, but an output differs by {far}; masks that were set by hand on single adapters, "
            "not by set_block_mask, may differ from those of their blocks"
        )


def _difference(parts: Parts, found: peft_factors.Lora) -> str | None:
    """What is not the same in what PEFT has loaded, in words; None if nothing is."""
    ours, theirs = flat(parts.saved), flat(found.saved)
    for name, pair in parts.pairs.items():
        ours |= {f"{name}.lora_A": pair.A, f"{name}.lora_B": pair.B}
    for name, pair in found.pairs.items():
        theirs |= {f"{name}.lora_A": pair.A, f"{name}.lora_B": pair.B}
    if ours.keys() != theirs.keys():
        return f"their tensors differ: {sorted(ours.keys() ^ theirs.keys())[:4]}"
    for name, value in ours.items():
        if value.shape != theirs[name].shape or not torch.equal(theirs[name].to(value), value):
            return f"the values of {name} differ"
    for name, pair in parts.pairs.items():
        if not math.isclose(pair.scaling, found.pairs[name].scaling, rel_tol=1e-9):
            return f"the scaling of {name} is {found.pairs[name].scaling:g} instead of {pair.scaling:g}"
    return None
