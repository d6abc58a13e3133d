"""apt-ext doctor: each thing that can be wrong is found, with what to do; and apt-ext bench."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from apt_ext import ops
from apt_ext.common import clock
from apt_ext.tools import doctor, layer_bench
from apt_ext.tools.cli import main


def found(name):
    return next(one for one in doctor.findings() if one.name == name)


@pytest.fixture
def says(monkeypatch):
    """What programs print; None: there is no such program."""

    def put(**programs):
        monkeypatch.setattr(doctor, "_said", lambda program, *_, **__: programs.get(program.rpartition("/")[2].replace("-", "_")))

    return put


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that torch can use, and a build for some."""

    def put(major, archs, cuda=True):
        properties = SimpleNamespace(name="A GPU", major=major, minor=0, total_memory=80 << 30)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(doctor, "_largest_error", lambda device, dtype: 0.0)
        info = {**ops.build_info(), "cuda": cuda, "cuda_version": "13.0" if cuda else None, "cuda_archs": archs}
        monkeypatch.setattr(ops, "build_info", lambda: info)

    return put


def test_what_works_is_said_and_exits_with_0(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr()
    assert not shown.err and f"torch         {torch.__version__}" in shown.out and "of reference.py (allowed 2e-06)" in shown.out
    assert main(["doctor", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["broken"] == [] and values["build"] == ops.build_info()
    assert {"cpu float32", "cpu bfloat16", "compiler"} <= {one["name"] for one in values["findings"]}


def test_it_needs_no_extra():
    """Nor does --version, and what needs one says which."""
    program = (
        "import sys\n"
        "for name in ('transformers', 'accelerate', 'jsonargparse', 'yaml', 'matplotlib', 'peft'): sys.modules[name] = None\n"
        "from apt_ext.tools.cli import main\n"
        "assert main(['doctor']) == 0\n"
        "assert main(['train', 'm', '--data', 'a.csv', '--output', 'o']) == 1\n"
        "main(['--version'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "extra hf" in done.stdout and "no transformers" in done.stdout and 'pip install "apt_ext[hf]"' in done.stdout
    assert done.stderr == 'apt-ext: train needs jsonargparse; run: python -m pip install "apt_ext[cli]"\n'


@pytest.mark.parametrize("wrong", ["forward", "backward", "raises", "nan"])
def test_an_op_that_computes_something_else_is_broken(monkeypatch, capsys, wrong):
    right = ops.apt_linear

    def op(x, *arguments):
        if wrong == "raises":
            raise RuntimeError("no kernel image is available")
        y = right(x, *arguments)
        if wrong == "forward":
            return y * 1.1
        return y * float("nan") if wrong == "nan" else y + 0.1 * (x.sum() - x.detach().sum())

    monkeypatch.setattr(ops, "apt_linear", op)
    assert main(["doctor"]) == 1
    shown = capsys.readouterr()
    assert shown.err == "apt-ext: doctor: expected an installation that works, got 2 broken: cpu float32, cpu bfloat16\n"
    assert "broken   cpu float32" in shown.out and "-> rebuild apt_ext" in shown.out


def test_a_driver_without_a_torch_for_it(says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    says(nvidia_smi="570.1")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert found("gpu").state == doctor.WARNING and "install a torch with CUDA" in found("gpu").remedy
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "update the driver to one of CUDA 13.0" in found("gpu").remedy
    says()
    assert found("gpu").state == doctor.OK


def test_a_gpu_that_the_build_has_no_code_for(gpu, says):
    says(nvidia_smi="570.1")
    gpu(7, ["8.0", "9.0a"])
    assert found("cuda:0").state == doctor.BROKEN and found("cuda:0").remedy == 'rebuild with TORCH_CUDA_ARCH_LIST="7.0"'
    gpu(8, ["8.0", "9.0a"])
    assert found("cuda:0").state == doctor.OK and "compute capability 8.0, 80 GiB" in found("cuda:0").found
    gpu(8, [], cuda=False)
    assert found("kernels").state == doctor.WARNING and "APT_WITH_CUDA=1" in found("kernels").remedy


def test_tools_of_a_build(gpu, says, monkeypatch):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    gpu(8, [], cuda=False)
    says(nvcc="Cuda compilation tools, release 12.8, V12.8.93", **{"c++": "c++ 14"})
    assert found("nvcc").found == "12.8, torch has 13.0" and found("nvcc").state == doctor.WARNING
    says(nvcc="Cuda compilation tools, release 13.0, V13.0.1")
    assert found("nvcc").state == doctor.OK
    says()
    assert found("nvcc").state == doctor.WARNING and "set CUDA_HOME" in found("nvcc").remedy
    assert found("compiler").state == doctor.WARNING and "apt install g++" in found("compiler").remedy


def test_extras(monkeypatch):
    wanted = [
        "torch>=2.11",
        'torch>=99; extra == "hf"',
        'no-such-package>=1; extra == "hf"',
        'apt_ext[cli]; extra == "hf"',
        'numpy; extra == "demo"',
    ]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: wanted)
    monkeypatch.setattr(doctor.metadata, "metadata", lambda name: SimpleNamespace(get_all=lambda key: ["hf", "demo"]))
    hf = found("extra hf")
    assert hf.state == doctor.WARNING and "no torch>=99 (found 2." in hf.found and "no no-such-package>=1" in hf.found
    assert hf.remedy == 'for Trainer and export: python -m pip install "apt_ext[hf]"'
    assert found("extra demo").state == doctor.OK and found("extra demo").found.startswith("numpy ")
    assert found("extra cli").state == doctor.WARNING and "install apt_ext anew" in found("extra cli").remedy

    def none(name):
        raise doctor.metadata.PackageNotFoundError

    monkeypatch.setattr(doctor.metadata, "requires", none)
    assert found("extras").state == doctor.WARNING


def test_bench(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(clock, "_ROUND", 0.0)
    monkeypatch.setitem(layer_bench._SHAPES, "cpu", ((4, 16, 8),))
    assert main(["bench", "--device", "cpu", "--rounds", "2", "--rank", "2", "--json", str(tmp_path / "b.json")]) == 0
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [row["passes"] for row in rows] == ["forward", "forward and backward"]
    assert all(ratio["median"] > 0 for row in rows for ratio in row["ratio"].values()) and len(rows[0]["ratio"]) == 5
    assert "4 tokens, 8 -> 16, forward: F.linear" in capsys.readouterr().out


def test_bench_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--device", "cuda"]) == 1
    assert "device: expected a CUDA device that torch can use, found none" in capsys.readouterr().err
