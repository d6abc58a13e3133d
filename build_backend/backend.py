"""The build backend: setuptools' own, building against the torch that is already installed.

pip builds in an isolated environment, where an installed torch cannot be seen. Naming torch as a build requirement would fetch a
second one, perhaps another version than the one the extension will run with. So the packages of the interpreter that builds are
made visible again, behind those of the build environment, and only what is missing there too is asked for.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys


def _see_installed_packages() -> None:
    """Append sys.path as this interpreter has it without the isolation, which is made of these two variables."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    listed = subprocess.check_output([sys.executable, "-c", "import json, sys; print(json.dumps(sys.path))"], env=env, text=True)
    sys.path += [path for path in json.loads(listed) if path and path not in sys.path]


def _missing(package: str, *least: int) -> list[str]:
    try:
        parts = importlib.metadata.version(package).split(".")
    except importlib.metadata.PackageNotFoundError:
        parts = ["0"]
    installed = [int(part) for part in parts[: len(least)] if part.isdigit()]
    return [] if installed >= list(least) else [f"{package}>={'.'.join(map(str, least))}"]


def get_requires_for_build_sdist(config_settings=None):
    return _missing("setuptools", 77)


def get_requires_for_build_wheel(config_settings=None):
    # The program, not the package, is what the build runs; an environment that is not activated has it beside its interpreter.
    ninja = shutil.which("ninja") or shutil.which("ninja", path=os.path.dirname(sys.executable))
    return _missing("setuptools", 77) + _missing("torch", 2, 9) + ([] if ninja else ["ninja"])


get_requires_for_build_editable = get_requires_for_build_wheel


def _hook(name):
    def call(*args, **kwargs):
        from setuptools import build_meta  # not at the top: the requirements above are asked for before setuptools may be there

        return getattr(build_meta, name)(*args, **kwargs)

    return call


_see_installed_packages()
prepare_metadata_for_build_wheel = _hook("prepare_metadata_for_build_wheel")
prepare_metadata_for_build_editable = _hook("prepare_metadata_for_build_editable")
build_wheel = _hook("build_wheel")
build_editable = _hook("build_editable")
build_sdist = _hook("build_sdist")
