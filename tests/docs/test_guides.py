"""The guides' code runs as it stands there, block after block; they are short, and quote messages that there are."""

import ast
import importlib.util
import os
import re
from pathlib import Path

import pytest
from liger_patches import keep_llama

import apt_ext

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GUIDES = ("quickstart", "choosing", "trainer", "peft", "decoder", "deploy", "multi-gpu", "friends", "planning")
NEEDS = re.compile(r"# needs: (.+)")


def blocks(name):
    """The Python blocks of a guide that can run here: `# needs: a, b` at the top of one names modules beyond `apt_ext[hf]`."""
    found = re.findall(r"^```python\n(.*?)^```", (DOCS / f"{name}.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    for code in found:
        needs = NEEDS.match(code)
        if all(importlib.util.find_spec(module.strip()) for module in (needs[1].split(",") if needs else ())):
            yield code


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT reads it
@pytest.mark.parametrize("name", GUIDES)
def test_its_code_runs(name, tmp_path, monkeypatch, loaded_here):
    pytest.importorskip("transformers")
    keep_llama(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    code = list(blocks(name))
    assert code, "expected a block of Python"
    names = {"__name__": "__main__"}
    for number, block in enumerate(code, 1):
        exec(compile(block, f"{name}.md, block {number}", "exec"), names)  # noqa: S102


@pytest.mark.parametrize("name", ["quickstart", "choosing", "decoder", "multi-gpu"])
def test_it_is_short(name):
    prose = re.sub(r"^```.*?^```", "", (DOCS / f"{name}.md").read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert len(prose.split()) <= 500


def test_the_reference_has_every_public_name():
    listed = set(re.findall(r"^::: apt_ext\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(dir(apt_ext)) - {"__version__"} == listed


def literals():
    """Every text of the package, an f-string with "…" for its values."""
    for path in (ROOT / "apt_ext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    yield from (path.read_text(encoding="utf-8") for path in (ROOT / "csrc").rglob("*.*"))


def test_quoted_messages_are_those_of_the_source():
    quoted = re.findall(r"^### `(.*)`$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(quoted) >= 15
    known = list(literals())
    for message in quoted:
        pattern = re.compile(".*".join(re.escape(part) for part in message.split("…")), re.DOTALL)
        assert any(pattern.search(text) for text in known), message
