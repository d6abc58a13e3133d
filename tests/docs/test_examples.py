"""Every example runs at a small size, and so does the notebook, cell by cell."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from apt_ext.pruning.architectures import lookup

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NEEDS = {"lightning_callback": ["lightning"], "from_peft": ["peft"], "accelerate_loop": ["accelerate"]}
LAST = {
    "accelerate_loop": r"loss [\d.]+, density 0\.\d+, written to smaller-model",
    "lightning_callback": r"density 0\.\d+, written to smaller-model",
    "trainer_csv": r"written to smaller-model: .*config\.json, model\.safetensors, .*tokenizer\.json, tokenizer_config\.json",
    "decoder_generation": r"generated \[3, 4, 5, 6, 7, 8, 9, 10, 1\d.*\]",
    "from_peft": r"density 0\.\d+; smaller/base and smaller/adapter give the same logits",
    "own_architecture": r"loss [\d.]+; 70,402 parameters became [23]\d,\d{3}",
}
# The libraries' own: deprecations among themselves, and loaders that ask for workers.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch, loaded_here):
    """A directory of its own, and a table of architectures that is as before afterwards."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lookup, "ARCHITECTURES", list(lookup.ARCHITECTURES))


def test_every_example_is_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(LAST)


@pytest.mark.parametrize("name", LAST)
def test_it_runs(name, monkeypatch, capsys):
    for module in NEEDS.get(name, []):
        pytest.importorskip(module)
    monkeypatch.setattr(sys, "argv", [name, "--quick"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out.strip().splitlines()[-1]
    assert re.fullmatch(LAST[name], said), said


def test_the_notebook_runs():
    path = EXAMPLES / "quickstart.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert all(not cell.get("outputs") for cell in notebook["cells"]), "expected cells without outputs"
    names = {}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)  # noqa: S102
    assert names["small"].config.intermediate_size < 64


def test_the_notebook_is_the_quickstart():
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    guide = re.findall(r"^```python\n(.*?)\n```", (ROOT / "docs/quickstart.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"] == guide


def test_the_notebook_is_valid():
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4))
