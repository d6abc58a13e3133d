"""The code of docs/deploy.md runs in its order, and the guide stays short."""

import importlib.util
import pathlib
import re
import sys

import pytest
import torch

pytest.importorskip("transformers")
GUIDE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "deploy.md"


def missing(block):
    """The packages that the first line of a block asks for and that are not here."""
    needs = re.match(r"# needs: (.*)\n", block)
    names = [name.strip() for name in needs[1].split(",")] if needs else []
    return [name for name in names if importlib.util.find_spec(name) is None]


@pytest.mark.usefixtures("loaded_here")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")  # of torch.onnx
def test_the_guides_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", sys.path[:])
    torch.use_deterministic_algorithms(False)  # which torch.export would put into the graph
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) >= 5 and any("onnxruntime" in block for block in blocks)
    names = {}
    for block in blocks:
        if not missing(block):
            exec(block, names)  # noqa: S102  # of our own guide
    assert capsys.readouterr().out.splitlines()[0] == names["loader"] == "BertForSequenceClassification"


def test_the_guide_is_short():
    text = re.sub(r"```.*?```", "", GUIDE.read_text(), flags=re.DOTALL)
    assert len(text.split()) <= 500
