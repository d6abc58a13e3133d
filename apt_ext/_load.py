"""Refuse a torch this build does not fit before the compiled module is loaded: afterwards it is an undefined symbol."""

from __future__ import annotations

_REBUILD = "python -m pip install --no-build-isolation --force-reinstall --no-deps ."

try:
    import torch
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("apt_ext needs torch 2.9 or newer, which is not installed: python -m pip install torch") from error

try:
    from . import _built_for
except ImportError as error:
    raise ImportError(f"apt_ext has not been built here; in its source tree run: {_REBUILD}") from error

_found = ".".join(torch.__version__.split(".")[:2])
if _found != _built_for.TORCH:
    raise ImportError(f"apt_ext was built for torch {_built_for.TORCH} and found torch {torch.__version__}; rebuild it: {_REBUILD}")
