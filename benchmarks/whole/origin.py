"""Where figures come from: the machine, the versions, the commit."""

from __future__ import annotations

import importlib.metadata

import torch

from apt_ext.tools.measuring import commit_here

from . import models

LIBRARIES = ("torch", "transformers", "peft")


def version(library):
    """Return the version of a library, or None where it is not installed."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def header(work, device, liger):
    """Describe what is measured, and on what."""
    return {
        "commit": commit_here(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "versions": {library: version(library) for library in LIBRARIES},
        "liger_kernel": liger,
        "cudnn_attention": False,
        "model": work.name,
        "sizes": work.sizes,
        "batch": list(work.batch),
        "dtype": "bfloat16",
        "rank": models.RANK,
    }


def words(part):
    """Say in a line what the figures of a part hold for."""
    sequences, length = part["batch"]
    liger = part["liger_kernel"]
    kernels = f"Liger {liger['version']}" if liger["version"] else f"no Liger ({liger['absent']})"
    where = f"{part['device']}, torch {part['versions']['torch']}, commit {part['commit']}"
    return f"{part['model']}, {sequences} x {length} tokens, {part['dtype']}, {kernels}; {where}"
