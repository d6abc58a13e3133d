"""Compiles every kernel for each architecture without a GPU, and fails on a spill, a stack frame or a change of registers.

`--update` writes the table, registers.txt, that it otherwise compares with.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_name("registers.txt")
ARCHITECTURES = ["sm_80", "sm_90a"]
# torch's builder adds these to setup.py's flags, so what compiles here compiles there too.
FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-D__CUDA_NO_HALF_OPERATORS__", "-D__CUDA_NO_HALF_CONVERSIONS__"]
FLAGS += ["-D__CUDA_NO_BFLOAT16_CONVERSIONS__", "-D__CUDA_NO_HALF2_OPERATORS__"]
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<frame>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def demangle(name: str) -> str:
    if shutil.which("c++filt"):
        name = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"_INTERNAL_\w+::|\(anonymous namespace\)::|\bapt::", "", name)  # the first holds a hash of the path
    return re.sub(r"^void |\(.*", "", name)


def compile_kernels(nvcc: str, source: Path, arch: str) -> list[dict[str, str]]:
    command = [nvcc, *FLAGS, f"-arch={arch}", "-cubin", "-Xptxas", "-v", "-o", os.devnull, str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{source.relative_to(ROOT)} does not compile for {arch}:\n{result.stderr}")
    return [{**found.groupdict(), "arch": arch, "file": source.name} for found in ENTRY.finditer(result.stderr)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the table instead of comparing with it")
    update = parser.parse_args().update
    nvcc = shutil.which("nvcc") or sys.exit("nvcc was not found on the PATH")
    release = re.search(r"release (\S+),", subprocess.check_output([nvcc, "--version"], text=True))[1]

    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        lists = pool.map(lambda job: compile_kernels(nvcc, *job), product(sources, ARCHITECTURES))
        kernels = [kernel for found in lists for kernel in found]
    if not kernels:
        sys.exit("no kernel was found in nvcc's output")
    for kernel in kernels:
        kernel["name"] = demangle(kernel["name"])
    lines = sorted(f"{k['arch']:7} {k['registers']:>3}  {k['file']:16} {k['name']}" for k in kernels)
    print("\n".join(lines))

    spilling = [k for k in kernels if any(int(k[kind]) for kind in ("frame", "stores", "loads"))]
    for k in spilling:
        print(f"{k['file']} {k['name']}, {k['arch']}: {k['frame']} bytes stack frame, {k['stores']} stored, {k['loads']} loaded")
    if spilling:
        sys.exit("kernels must keep everything in registers")

    header = f"# registers a thread, nvcc {release}"
    if update:
        TABLE.write_text("\n".join([header, *lines]) + "\n")
        return
    kept_header, *kept = TABLE.read_text().splitlines()
    changes = [f"- {line}" for line in kept if line not in lines] + [f"+ {line}" for line in lines if line not in kept]
    print("\n".join(changes) or f"{len(lines)} kernels, no spills, registers as kept in {TABLE.name}")
    if changes and header == kept_header:  # another nvcc allocates otherwise; that is no fault of the code
        sys.exit("registers changed; if that is meant, run benchmarks/registers.py --update and commit the table")


if __name__ == "__main__":
    main()
