"""What to install where an import fails: the module that is not there, which may be another than the one that was imported."""

from __future__ import annotations

_EXTRAS = {
    "transformers": "hf",
    "huggingface_hub": "hf",
    "accelerate": "hf",
    "jsonargparse": "cli",
    "matplotlib": "report",
    "jinja2": "report",
}


def lacking(who: str, module: str, error: ImportError) -> str:
    """Say what `who` needs beside `module`, whose import raised `error`, and the command that installs what is missing.

    A module that is there and fails, or lacks another one, is not told to be missing.
    """
    absent = _absent(error)
    if absent == module:
        return f"{who} needs {module}; run: python -m pip install {_wanted(module)}"
    said = f"{who} needs {module}, which is installed and cannot be imported: {error}"
    return f"{said}; run: python -m pip install {_wanted(absent)}" if absent else said


def _absent(error: BaseException | None) -> str:
    """The module that was not found, which a lazy import tells only as the cause of its own error; "" where all were."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            return error.name.partition(".")[0]
        error = error.__cause__
    return ""


def _wanted(module: str) -> str:
    return f'"apt_ext[{_EXTRAS[module]}]"' if module in _EXTRAS else module
