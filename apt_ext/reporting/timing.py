"""Speed and memory of two models, measured in turn, so that both meet the same machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..common import memory
from ..common.clock import in_turn, spread, waiting_for
from ..common.modes import evaluating
from ..pruning.architectures.lookup import is_encoder_decoder
from ..pruning.on_meta import inputs_for, positions

Inputs = dict[str, Tensor]

_LENGTH = 128  # tokens of a sequence, where the user gives no example
_BATCH = {"cuda": 8}  # sequences; one elsewhere


def length_for(model: nn.Module) -> int:
    """The length of the sequences that are timed without an example: 128, or all positions of the model."""
    most = positions(model)
    return _LENGTH if most is None else max(min(_LENGTH, most), 1)


def random_inputs(model: nn.Module, device: torch.device) -> Inputs:
    """Random token ids, or images, by the model's config; drawn from a generator of their own."""
    generator = torch.Generator().manual_seed(0)
    text = getattr(model, "config", None)
    vocabulary = max(int(getattr(text, "vocab_size", None) or 1), 1)
    found = {}
    for name, like in inputs_for(model, _BATCH.get(device.type, 1), length_for(model)).items():
        if like.is_floating_point():
            dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
            found[name] = torch.randn(like.shape, generator=generator).to(device, dtype)
        else:
            found[name] = torch.randint(vocabulary, like.shape, generator=generator).to(device)
    return found


def checked_example(model: nn.Module, example: Any, device: torch.device) -> Inputs:
    """The tensors of `example` on the device; TypeError and ValueError for anything else.

    Without labels, whose loss is no part of a pass, unless an encoder-decoder makes its inputs of them.
    """
    if not isinstance(example, Mapping):
        raise TypeError(f"example: expected a dict of tensors, as model(**example) takes it, got {type(example).__name__}")
    odd = next((name for name, value in example.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise TypeError(f"example[{odd!r}]: expected a Tensor, got {type(example[odd]).__name__}")
    wanted = is_encoder_decoder(model) and "decoder_input_ids" not in example
    found = {name: value.detach().to(device) for name, value in example.items() if wanted or name not in ("labels", "label")}
    if not found:
        raise ValueError(f"example: expected inputs of the model, got {sorted(example)}")
    return found


def try_pass(model: nn.Module, inputs: Inputs) -> None:
    """One forward pass, as it will be timed; raises whatever the model does."""
    with evaluating(model), torch.no_grad():
        model(**inputs)


def compared(models: Mapping[str, nn.Module], inputs: Inputs, rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds and peak memory of a forward pass of these models, and how they were measured.

    "seconds", "memory"  {model: median, low and high quartile, rounds}; memory in bytes, Parameters and buffers with
                         what the pass allocates beside them; None where the system cannot say
    "ratio"              the same of the first model's seconds over the last one's, by rounds; None of one model
    """
    synchronize = waiting_for(device)
    calls: dict[str, Callable[[], object]] = {name: _call(model, inputs) for name, model in models.items()}
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        seconds = in_turn(calls, rounds, synchronize)
        peaks: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(rounds):
            for name in models if turn % 2 == 0 else reversed(list(models)):
                peak = _peak(calls[name], device, synchronize)
                if peak is not None:
                    peaks[name].append(_held(models[name]) + peak)
    first, *others = seconds.values()
    ratio = [before / after for before, after in zip(first, others[-1], strict=True)] if others else []
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "memory": {name: spread(values) for name, values in peaks.items()} if all(peaks.values()) else None,
        "ratio": spread(ratio) if ratio else None,
        "rounds": rounds,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper(),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "inputs": {name: list(value.shape) for name, value in inputs.items()},
    }


def _call(model: nn.Module, inputs: Inputs) -> Callable[[], object]:
    return lambda: model(**inputs)


def _held(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def _peak(call: Callable[[], object], device: torch.device, synchronize: Callable[[], None]) -> float | None:
    """Bytes that a call has in use at most beside what is in use before it; None where nobody counts them."""
    if device.type == "cuda":
        synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize()
        return float(torch.cuda.max_memory_allocated(device) - before)
    if device.type != "cpu" or not memory.peak_can_restart():
        return None
    memory.restart_peak()
    before = memory.resident_memory()
    call()
    return float(max(memory.peak_memory() - before, 0))
