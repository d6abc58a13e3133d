"""`apt-ext doctor`: what is installed, what was built, whether it computes, and what to do about each thing found."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import _C, ops, reference

OK, WARNING, BROKEN = "ok", "warning", "broken"
_EXTRAS = {"cli": "apt-ext train", "hf": "Trainer and export", "demo": "apt-ext demo", "report": "report.html"}
_EPS = {torch.float32: 2e-6, torch.bfloat16: 1e-2}  # of docs: the error over the sum of magnitudes
_SIZES = (5, 24, 16, 4)  # tokens, out, in, rank


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `remedy` says what to do, "" where nothing is to be done."""

    name: str
    state: str
    found: str
    remedy: str = ""


def findings() -> list[Finding]:
    """All of them."""
    return list(_all())


def _all() -> Iterator[Finding]:
    info = ops.build_info()
    yield Finding("python", OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("torch", OK, f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}")
    built = f"apt_ext {info['version']} for torch {info['torch_version']}, "
    built += f"CUDA {info['cuda_version']} ({', '.join(info['cuda_archs'])})" if info["cuda"] else "CPU alone"
    yield Finding("build", OK, f"{built}; CPU kernels for {info['cpu_capability']}, {torch.get_num_threads()} of {os.cpu_count()} threads")
    yield from _gpus(info)
    yield from _build_tools(info)
    yield from _extras()
    for device in ("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))) if torch.cuda.is_available() else ("cpu",):
        for dtype in _EPS:
            yield _computes(device, dtype)


def _gpus(info: dict[str, Any]) -> Iterator[Finding]:
    driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if not torch.cuda.is_available():
        if driver is None:
            yield Finding("gpu", OK, "none: no NVIDIA driver here")
        elif torch.version.cuda is None:
            yield Finding(
                "gpu",
                WARNING,
                f"a driver {driver}, and a torch without CUDA",
                "install a torch with CUDA (pytorch.org), then rebuild apt_ext: pip install --force-reinstall --no-deps .",
            )
        else:
            yield Finding(
                "gpu", WARNING, f"a driver {driver} that torch cannot use", f"update the driver to one of CUDA {torch.version.cuda}"
            )
        return
    yield Finding("driver", OK, driver or "unknown: there is no nvidia-smi")
    if not info["cuda"]:
        yield Finding(
            "kernels",
            WARNING,
            "a GPU, and a build for the CPU alone: layers on the GPU are refused",
            "rebuild where nvcc is found: APT_WITH_CUDA=1 python -m pip install --no-build-isolation --force-reinstall --no-deps .",
        )
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        name = f"{found.name}, compute capability {found.major}.{found.minor}, {found.total_memory / 2**30:.0f} GiB"
        if info["cuda"]:
            try:
                _C.check_gpu(found.name, found.major, found.minor, ";".join(info["cuda_archs"]))
            except RuntimeError as error:
                yield Finding(
                    f"cuda:{number}", BROKEN, f"{name}: {error}", f'rebuild with TORCH_CUDA_ARCH_LIST="{found.major}.{found.minor}"'
                )
                continue
        yield Finding(f"cuda:{number}", OK, name)


def _build_tools(info: dict[str, Any]) -> Iterator[Finding]:
    """What a build from source would need; nothing that runs needs it."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++"))), None)
    version = _said(compiler.split()[0], "--version") if compiler else None
    if version is None:
        yield Finding("compiler", WARNING, "none, so apt_ext cannot be built here", "install one, on Debian: apt install g++")
    else:
        yield Finding("compiler", OK, version)
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc")
    release = re.search(r"release (\d+\.\d+)", _said(nvcc, "--version", lines=None) or "") if nvcc else None
    if torch.version.cuda is None:
        return
    if release is None:
        state = OK if info["cuda"] else WARNING
        yield Finding("nvcc", state, "none", "" if info["cuda"] else "put nvcc on the PATH or set CUDA_HOME, and rebuild")
    elif release[1].partition(".")[0] != torch.version.cuda.partition(".")[0]:
        yield Finding("nvcc", WARNING, f"{release[1]}, torch has {torch.version.cuda}", f"install the CUDA toolkit {torch.version.cuda}")
    else:
        yield Finding("nvcc", OK, release[1])


def _extras() -> Iterator[Finding]:
    """Each package that an extra names, with its version."""
    try:
        wanted = metadata.requires("apt_ext") or []
        known = metadata.metadata("apt_ext").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        yield Finding("extras", WARNING, "apt_ext is not installed, so its extras are not known", "python -m pip install -e .")
        return
    for extra, purpose in _EXTRAS.items():
        if extra not in known:
            yield Finding(
                f"extra {extra}", WARNING, "the installed package does not name it", "install apt_ext anew: python -m pip install ."
            )
            continue
        lacking, there = [], []
        for line in wanted:
            found = re.match(rf"([\w.-]+)\s*([^;]*);.*extra == ['\"]{extra}['\"]", line)
            if found is None or found[1].replace("-", "_") == "apt_ext":
                continue
            name, rule = found[1], found[2].strip()
            version = _version(name)
            least = re.search(r">=\s*([\d.]+)", rule)
            if version is None or least is not None and _numbers(version) < _numbers(least[1]):
                lacking.append(f"{name}{rule}" + (f" (found {version})" if version else ""))
            else:
                there.append(f"{name} {version}")
        text = ", ".join([*there, *(f"no {one}" for one in lacking)])
        remedy = f'for {purpose}: python -m pip install "apt_ext[{extra}]"' if lacking else ""
        yield Finding(f"extra {extra}", WARNING if lacking else OK, text or "nothing", remedy)


def _version(name: str) -> str | None:
    """The version of a package that can be imported."""
    try:
        return metadata.version(name) if importlib.util.find_spec(name) is not None else None
    except (metadata.PackageNotFoundError, ImportError, ValueError):
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])


def _computes(device: str, dtype: torch.dtype) -> Finding:
    """A tiny forward and backward of the op, compared with the formula in reference.py, in float64 on the CPU."""
    name = f"{device} {str(dtype).removeprefix('torch.')}"
    try:
        worst = _largest_error(device, dtype)
    except Exception as error:  # whatever a broken build or driver raises
        return Finding(name, BROKEN, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "rebuild apt_ext against this torch")
    share = f"forward and backward within {worst:.1e} of reference.py (allowed {_EPS[dtype]:.0e})"
    if worst > _EPS[dtype]:
        return Finding(name, BROKEN, share, "rebuild apt_ext, and if it stays so, report it with the output of apt-ext doctor --json")
    return Finding(name, OK, share)


def _largest_error(device: str, dtype: torch.dtype) -> float:
    tokens, out, inside, rank = _SIZES
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).double()

    values = [drawn(tokens, inside), drawn(out, inside), drawn(out), drawn(rank, inside), drawn(out, rank)]
    masks = [(torch.arange(size) % 3 != 0).double() for size in (inside, out)]
    upstream = drawn(tokens, out)
    results = []
    for function, place, kind in ((ops.apt_linear, device, dtype), (reference.apt_linear, "cpu", torch.float64)):
        x, weight, bias, a, b = (value.to(place, kind) for value in values)
        leaves = [one.requires_grad_() for one in (x, bias, a, b)]
        y = function(x, weight, bias, a, b, masks[0].to(place, torch.float32), masks[1].to(place, torch.float32), 2.0)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, upstream.to(place, kind))])
    # The sum of magnitudes: the same formula of absolute values.
    x, weight, bias, a, b = (value.abs() for value in values)
    leaves = [one.requires_grad_() for one in (x, bias, a, b)]
    y = reference.apt_linear(x, weight, bias, a, b, masks[0], masks[1], 2.0)
    sizes = [y.detach(), *torch.autograd.grad(y, leaves, upstream.abs())]
    errors = [float((got.cpu().double() - wanted).norm() / size.norm()) for got, wanted, size in zip(*results, sizes, strict=True)]
    return max(errors) if all(error == error for error in errors) else float("inf")


def _said(program: str, *arguments: str, lines: int | None = 1) -> str | None:
    """The first line, or all, of what a program prints; None where there is no such program or it fails."""
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=20)  # noqa: S603  # of the PATH, or named by the user
    except (OSError, subprocess.TimeoutExpired):
        return None
    text = done.stdout.strip()
    return "\n".join(text.splitlines()[:lines]) if done.returncode == 0 and text else None


def as_dict(found: list[Finding]) -> dict[str, Any]:
    """All of it, for programs."""
    return {
        "build": ops.build_info(),
        "findings": [asdict(one) for one in found],
        "broken": [one.name for one in found if one.state == BROKEN],
    }


def as_text(found: list[Finding]) -> str:
    """A line each, and one for what to do."""
    width = max(len(one.name) for one in found)
    lines = []
    for one in found:
        lines.append(f"{one.state:8} {one.name:{width}}  {one.found}")
        if one.remedy:
            lines.append(f"{'':8} {'':{width}}  -> {one.remedy}")
    return "\n".join(lines)
