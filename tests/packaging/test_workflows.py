"""The workflows ask for as little as they need, and run what was looked at."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
if not WORKFLOWS:
    pytest.skip("a source distribution has none", allow_module_level=True)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_least_rights_and_pinned_actions(path):
    text = path.read_text()
    used = re.findall(r"uses: (.*)", text)
    assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action) for action in used), used
    assert re.findall(r"^ *permissions:.*\n((?:  .*\n)*)", text, re.M) == ["  contents: read\n"]
    assert text.count("persist-credentials: false") == sum(action.startswith("actions/checkout@") for action in used)
    assert "pull_request_target" not in text and "secrets." not in text
    # what others can name (titles, branches) is never part of a command
    assert set(re.findall(r"\$\{\{ *([\w.]+)", text)) <= {"github.ref", "matrix.python", "matrix.run"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_they_are_yaml(path):
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load(path.read_text())["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    assert steps and all(("run" in step) != ("uses" in step) for step in steps)


def test_pull_requests_run_on_hosted_machines_only():
    for path in WORKFLOWS:
        text = path.read_text()
        if re.search(r"^  pull_request", text, re.M):
            assert "self-hosted" not in text, path


def test_what_they_run_exists():
    targets = set(re.findall(r"^([\w/.-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {
        target
        for path in WORKFLOWS
        for target in re.findall(r"(?:run|-): make ([\w./-]+)|- make ([\w./-]+)", path.read_text())
        for target in target
        if target
    }
    assert named and named - {".venv/built"} <= targets


def test_a_pull_request_compiles_the_kernels():
    """On a hosted machine, with a compiler that is pinned and of the release that the kept registers are of."""
    kernels = (ROOT / ".github/workflows/ci.yml").read_text().partition("\n  kernels:\n")[2]
    assert "runs-on: ubuntu-latest" in kernels and "run: make kernels" in kernels
    assert "--require-hashes -r benchmarks/nvcc.txt" in kernels
    pinned = [line for line in (ROOT / "benchmarks/nvcc.txt").read_text().splitlines() if not line.startswith("#")]
    assert pinned and all(re.fullmatch(r"nvidia-[a-z-]+==[\d.]+ --hash=sha256:[0-9a-f]{64}", line) for line in pinned)
    release = (ROOT / "benchmarks/registers.txt").read_text().splitlines()[0].rpartition(" ")[2]
    assert any(line.startswith(f"nvidia-cuda-nvcc=={release}.") for line in pinned)


def test_a_pull_request_builds_a_wheel_and_installs_it():
    wheel = (ROOT / ".github/workflows/ci.yml").read_text().partition("\n  wheel:\n")[2].partition("\n  kernels:\n")[0]
    assert "runs-on: ubuntu-latest" in wheel and "run: make wheel" in wheel
    recipe = (ROOT / "Makefile").read_text().partition("\nwheel:")[2].partition("\n\n")[0]
    case = (ROOT / "tests/install/run.sh").read_text().partition("\nsdist() {\n")[2].partition("\n}\n")[0]
    assert "tests/install/run.sh sdist" in recipe and "dist/" in recipe
    assert case.index("pip wheel ") < case.index("pip install ") < case.index("works ")
