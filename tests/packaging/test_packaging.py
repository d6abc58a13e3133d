"""The build, as far as it can be tested without compiling: what is packed, what is asked for, and what a failure says."""

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ["build_ext", "--help"]  # should a check be missed, nothing is compiled


def run_setup(*arguments, **environment):
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "setup.py", *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture
def backend():
    spec = importlib.util.spec_from_file_location("backend", ROOT / "build_backend/backend.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path


def test_sdist_holds_all_that_a_build_needs_and_nothing_built(tmp_path):
    result = run_setup("-q", "egg_info", "--egg-base", str(tmp_path), "sdist", "-d", str(tmp_path))
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        packed = {name.partition("/")[2] for name in opened.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*") if path.is_file()}
    needed = {
        "setup.py",
        "pyproject.toml",
        "CMakeLists.txt",
        "LICENSE",
        "build_backend/backend.py",
        "apt_ext/py.typed",
        "apt_ext/_C.pyi",
        "apt_ext/method/prediction/rates.json",
        "apt_ext/reporting/page.html",
    }
    needed.add("apt_ext/reporting/page.html")
    needed |= {str(path.relative_to(ROOT)) for path in (ROOT / "benchmarks/evidence").glob("*.py")}  # in no wheel
    assert sources | needed <= packed
    assert not [name for name in packed if name.endswith((".so", ".pyc", "_built_for.py"))]


def test_backend_asks_for_nothing_that_is_installed(backend):
    asked = backend.get_requires_for_build_wheel()
    assert asked == backend.get_requires_for_build_editable()
    assert not [requirement for requirement in asked if requirement.startswith("torch")]
    assert "torch" not in "".join(backend.get_requires_for_build_sdist())


def test_backend_asks_for_what_is_missing_or_too_old(backend, monkeypatch):
    installed = {"setuptools": "76.9", "torch": "2.8.1+cpu"}
    monkeypatch.setattr(backend.importlib.metadata, "version", installed.__getitem__)
    monkeypatch.setattr(backend.shutil, "which", lambda *args, **kwargs: None)
    assert backend.get_requires_for_build_wheel() == ["setuptools>=77", "torch>=2.9", "ninja"]
    assert backend.get_requires_for_build_sdist() == ["setuptools>=77"]
    installed.update(setuptools="77.0.3", torch="2.9.0a0+git1234")
    assert backend.get_requires_for_build_wheel() == ["ninja"]

    def absent(package):
        raise backend.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(backend.importlib.metadata, "version", absent)
    assert backend.get_requires_for_build_wheel() == ["setuptools>=77", "torch>=2.9", "ninja"]


def test_backend_sees_installed_packages_through_the_isolation(tmp_path):
    # What pip does: a site customisation ahead of everything that takes the installed packages off the path.
    isolation = "import sys; sys.path = [path for path in sys.path if not path.endswith('-packages')]"
    (tmp_path / "sitecustomize.py").write_text(isolation)
    find = "import importlib.util as u; print(bool(u.find_spec('torch'))); import backend; print(bool(u.find_spec('torch')))"
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT / 'build_backend'}", "PYTHONNOUSERSITE": "1"}
    result = subprocess.run([sys.executable, "-c", find], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.stdout.split() == ["False", "True"], result.stderr


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"PATH": "", "CXX": ""}, "no C++ compiler was found (c++ or g++)"),
        ({"CXX": "no-such-compiler -m64"}, "no C++ compiler was found (CXX=no-such-compiler -m64)"),
        # Any program passes for a compiler: these stop before one is run.
        ({"CXX": sys.executable, "APT_WITH_CUDA": "1", "CUDA_HOME": "/nonexistent"}, "APT_WITH_CUDA=1 asks for CUDA, but "),
        ({"CXX": sys.executable, "APT_WITH_CUDA": "yes"}, "APT_WITH_CUDA must be 0, 1 or unset, got 'yes'"),
    ],
)
def test_a_build_that_cannot_succeed_says_why_in_one_sentence(environment, expected):
    result = run_setup(*BUILD, **environment)
    assert result.returncode == 1
    assert result.stderr.startswith(f"apt_ext: {expected}") and result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_setup_and_cmake_glob_the_same_sources():
    glob = re.compile(r"csrc/(?:\w+/)?\*\.(?:cpp|cu)\b")
    lists = [sorted(glob.findall((ROOT / name).read_text())) for name in ("setup.py", "CMakeLists.txt")]
    folders = sorted(f"csrc/{folder.name}" for folder in (ROOT / "csrc").iterdir() if folder.is_dir())
    assert lists[0] == lists[1] == sorted(["csrc/*.cpp", *(f"{folder}/*.cpp" for folder in folders), "csrc/cuda/*.cu"])


def test_kernel_files_include_no_torch_header():
    kernels = [path for path in (ROOT / "csrc/cuda").iterdir() if path.suffix in (".cu", ".cuh")]
    assert kernels
    kernels += [ROOT / "csrc/backend.h", ROOT / "csrc/scalar.h"]
    assert not [path.name for path in kernels if re.search(r'#include [<"](torch|ATen|c10)/', path.read_text())]
