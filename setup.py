"""Builds apt_ext._C. The tree is the list of sources, here and in CMakeLists.txt; everything else is in pyproject.toml."""

import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

from setuptools import setup

# The files of a line are compiled as one: torch's headers and templates cost more than our code. The first
# line takes as long as the other two, so two compilers end together.
SOURCES = [
    ["csrc/*.cpp", "csrc/autograd/*.cpp"],
    ["csrc/ops/*.cpp", "csrc/routes/*.cpp"],
    ["csrc/cpu/*.cpp"],
]
CUDA_SOURCES = ["csrc/cuda/*.cpp", "csrc/cuda/*.cu"]
ARCHITECTURES = "8.0;9.0a;9.0+PTX"  # Ampere; Hopper with its own instructions; and what later GPUs can translate


def stop(sentence):
    sys.exit(f"apt_ext: {sentence}")


def find_compiler():
    named = os.environ.get("CXX")
    found = named or next(filter(shutil.which, ["c++", "g++"]), "")
    if not shutil.which(found.partition(" ")[0]):
        stop(f"no C++ compiler was found ({f'CXX={named}' if named else 'c++ or g++'}); install one, on Debian with `apt install g++`.")
    os.environ["CXX"] = found  # setuptools links and torch compiles with the same program


def find_torch():
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # the build needs none
    try:
        import torch
    except ImportError as error:
        stop(f"PyTorch could not be imported ({error}); install it first, for example with `python -m pip install torch`.")
    return torch


def why_no_cuda(torch, home):
    nvcc = Path(home or "", "bin", "nvcc")
    if not torch.version.cuda:
        return "this torch was built without CUDA"
    if not home or not nvcc.is_file():
        return "nvcc was not found: put it on the PATH or set CUDA_HOME"
    release = re.search(r"release (\S+),", subprocess.check_output([nvcc, "--version"], text=True))[1]
    if release.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {release} and torch {torch.__version__} of CUDA {torch.version.cuda}"
    return None


def together(lines):
    """Write one source a line that includes the files of its patterns, and return their paths."""
    found = []
    for patterns in lines:
        whole = Path("build", "together", "-".join(Path(pattern).parent.name for pattern in patterns) + ".cpp")
        files = [path for pattern in patterns for path in sorted(glob.glob(pattern))]
        text = "".join(f'#include "../../{path}"\n' for path in files)
        if not whole.is_file() or whole.read_text() != text:  # an old one that says the same is not compiled again
            whole.parent.mkdir(parents=True, exist_ok=True)
            whole.write_text(text)
        found.append(str(whole))
    return found


def build_arguments():
    find_compiler()
    torch = find_torch()
    import logging

    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of missing GPUs; none is needed to build
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    wish, obstacle = os.environ.get("APT_WITH_CUDA", ""), why_no_cuda(torch, CUDA_HOME)
    if wish not in ("", "0", "1"):
        stop(f"APT_WITH_CUDA must be 0, 1 or unset, got {wish!r}.")
    if wish == "1" and obstacle:
        stop(f"APT_WITH_CUDA=1 asks for CUDA, but {obstacle}.")
    cuda = wish != "0" and not obstacle
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";") or ARCHITECTURES
    os.environ["TORCH_CUDA_ARCH_LIST"] = asked  # torch turns it into nvcc's flags; unset, it would ask the GPUs of this machine
    archs, release = (asked, torch.version.cuda) if cuda else ("", "")
    what = f"CUDA {release}, architectures {archs}" if cuda else f"the CPU only ({obstacle or 'APT_WITH_CUDA=0'})"
    print(f"apt_ext: building for {what}, torch {torch.__version__}", flush=True)

    class Build(BuildExtension):
        def finalize_options(self):
            self.build_temp = self.build_temp or "build/objects"  # kept, for editable installs as well: only what changed compiles again
            super().finalize_options()
            self.force = True  # ninja knows what changed; without it, times alone would miss a change of torch or of flags

        def run(self):
            version = self.distribution.get_version()
            texts = {"VERSION": version, "TORCH_VERSION": torch.__version__, "CUDA_ARCHS": archs, "CUDA_VERSION": release}
            self.extensions[0].extra_compile_args["cxx"] += [f'-DAPT_{name}="{text}"' for name, text in texts.items()]
            super().run()
            # Beside the library it describes, and read before the library is loaded: another torch cannot load it.
            record = Path(self.get_ext_fullpath(self.extensions[0].name)).with_name("_built_for.py")
            torch_release = ".".join(torch.__version__.split(".")[:2])
            record.write_text(f'"""Written by setup.py."""\n\nTORCH = "{torch_release}"\nCUDA: str | None = {release or None!r}\n')

    # Without -fopenmp at::parallel_for is silently serial: its header asks for _OPENMP. Some Pythons ask for -g: ten times the size.
    options = ["-O3", "-std=c++20", "-fopenmp", "-fvisibility=hidden", "-g0", *shlex.split(os.environ.get("CXXFLAGS", ""))]
    extension = (CUDAExtension if cuda else CppExtension)(
        name="apt_ext._C",
        sources=together(SOURCES) + sorted(path for pattern in CUDA_SOURCES * cuda for path in glob.glob(pattern)),
        depends=glob.glob("csrc/**/*.*h", recursive=True),
        # Torch's headers then include the operators that they use themselves, not all 2,000.
        define_macros=[("AT_PER_OPERATOR_HEADERS", None)] + [("APT_WITH_CUDA", None)] * cuda,
        extra_compile_args={"cxx": options, "nvcc": ["-O3", "-std=c++20", "-lineinfo"]},
        extra_link_args=["-fopenmp"],
    )
    os.environ["PATH"] += os.pathsep + os.path.dirname(sys.executable)  # ninja, in an environment that is not activated
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


# Metadata and the source distribution need neither torch nor a compiler.
compiles = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"} & set(sys.argv)
setup(**(build_arguments() if compiles else {}))
