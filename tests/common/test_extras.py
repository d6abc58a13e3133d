"""What to install where an import fails."""

import builtins
import sys

import pytest

from apt_ext.common.extras import lacking
from apt_ext.tools.cli import main


def test_what_is_not_there_is_what_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError) as found:
        import jinja2  # noqa: F401
    assert lacking("the page", "jinja2", found.value) == 'the page needs jinja2; run: python -m pip install "apt_ext[report]"'
    lazy = ModuleNotFoundError("could not import module 'Trainer'")
    lazy.__cause__ = found.value
    for error in (found.value, lazy):
        said = lacking("train", "transformers", error)
        assert "transformers, which is installed and cannot be imported" in said and said.endswith('"apt_ext[report]"')
    broken = lacking("train", "transformers", ImportError("libcudart.so: cannot open"))
    assert broken.endswith("imported: libcudart.so: cannot open")
    assert lacking("to_peft", "peft", ModuleNotFoundError(name="peft")).endswith("pip install peft")


def test_a_command_names_what_transformers_lacks(monkeypatch, tmp_path, capsys):
    real = builtins.__import__

    def lacks(name, *more, **also):
        if name == "transformers":
            raise ModuleNotFoundError("No module named 'jinja2'", name="jinja2")
        return real(name, *more, **also)

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(builtins, "__import__", lacks)
    assert main(["plan", str(tmp_path), "--density", "0.5"]) == 1
    said = capsys.readouterr().err
    assert "No module named 'jinja2'" in said and '"apt_ext[report]"' in said
