"""Run as a script (`export` imports what both need): load a directory with stock transformers alone, and say what came.

reload.py KIND imports torch, transformers and its class KIND, and waits for a line of JSON, [DIRECTORY, CLASS, EXCHANGE]; without one it
ends. It prints MARK and then, in the same line,
{"tensors": {name: [dtype, shape, SHA-256]}, "class": its full name, "seconds": {what: how long}}. Where
the file EXCHANGE (safetensors) holds inputs, the first output of the model for them takes their place. CLASS is a class of
transformers, an auto class, with which the code in the directory runs, or "apt_ext" for `apt_ext.load_export`.
"""

import hashlib
import json
import os
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from threading import Event
from typing import Any

import torch

MARK = "apt_ext has loaded: "  # begins the line of the answer: others may print in this process, too
_PIECE = 4 << 20  # bytes that a thread copies from a device at once


def listed(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and buffers. Of those that no state_dict holds only whole numbers: a loader makes the others anew (rotary frequencies in
    float32, where a conversion of the model had rounded them), and an output shows whether they are right.
    """
    stated = model.state_dict().keys()
    every = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for tensors in every for name, tensor in tensors if name in stated or not tensor.is_floating_point()}


def digests(found: dict[str, torch.Tensor], ended: Event | None = None) -> dict[str, list[Any]]:
    """Hash tensors, {name: [dtype, shape, SHA-256]}, with no copy of them on the host but a small piece a thread.

    ended  once it is set the rest is not hashed, and there is no answer: RuntimeError
    """
    for device in {tensor.device for tensor in found.values() if tensor.is_cuda}:
        torch.cuda.synchronize(device)  # whatever stream makes them: they are read on others

    def hashed(tensor: torch.Tensor) -> str:
        if ended is not None and ended.is_set():
            raise RuntimeError("digests: expected to hash all tensors, but it was ended before")
        return _sha256(tensor)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # copies from a device and SHA-256 let other threads run
        hashes = {id(tensor): pool.submit(hashed, tensor) for tensor in found.values()}
        return {name: [str(tensor.dtype), list(tensor.shape), hashes[id(tensor)].result()] for name, tensor in found.items()}


def _sha256(tensor: torch.Tensor) -> str:
    if not (tensor.is_cuda and tensor.is_contiguous()):
        return hashlib.sha256(_content(tensor.cpu().contiguous())).hexdigest()
    seen, stream = hashlib.sha256(), torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
    staging = torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True)
    with torch.cuda.stream(stream):
        for piece in tensor.reshape(-1).view(torch.uint8).split(_PIECE):  # type: ignore[no-untyped-call]
            here = staging[: len(piece)]
            here.copy_(piece, non_blocking=True)
            stream.synchronize()
            seen.update(_content(here))
    return seen.hexdigest()


def _content(tensor: torch.Tensor) -> Any:
    """The bytes of a contiguous tensor on the host, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def first_output(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The first output that is a tensor, in evaluation mode."""
    with torch.no_grad():
        outputs = model(**inputs)
    return next(value for value in outputs.to_tuple() if isinstance(value, torch.Tensor))


def prepare(kind: str) -> None:
    """Import what loading takes."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    with suppress(ImportError):  # which loading then says
        import safetensors.torch  # noqa: F401
        import transformers

        getattr(transformers, kind, None)


def main(directory: str, kind: str, exchange: str) -> None:
    """Load, and print what came."""
    from safetensors.torch import load_file, save_file

    times = [time.perf_counter()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # of layers with nothing left, which are meant
        if kind == "apt_ext":
            import apt_ext

            model: Any = apt_ext.load_export(directory)
        else:
            sys.modules["apt_ext"] = None  # type: ignore[assignment]  # an import of it would fail
            import transformers

            transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
            code = {"trust_remote_code": True} if kind.startswith("Auto") else {}
            model = getattr(transformers, kind).from_pretrained(directory, dtype="auto", local_files_only=True, **code)
    model.eval()
    times.append(time.perf_counter())
    tensors = digests(listed(model))  # what came, before a forward may change a buffer
    times.append(time.perf_counter())
    if os.path.exists(exchange):
        save_file({"output": first_output(model, load_file(exchange)).contiguous()}, exchange)
    times.append(time.perf_counter())
    found: dict[str, Any] = {"tensors": tensors, "class": f"{type(model).__module__}.{type(model).__qualname__}"}
    seconds = [end - start for start, end in pairwise(times)]
    print(MARK + json.dumps({**found, "seconds": dict(zip(("load", "hash", "output"), seconds, strict=True))}))


if __name__ == "__main__":
    prepare(*sys.argv[1:])
    if line := sys.stdin.readline():
        main(*json.loads(line))
