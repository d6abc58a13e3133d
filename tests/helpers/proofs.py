"""Tests that documents name as proofs: whether they exist, and whether they ran."""

import ast
import functools
import os
import re
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
DOC = ROOT / "docs/reliability.md"
PROOF = re.compile(r"`([^`]+)`(?: \((\w+)\))?")
ALL = ("", "not slow", "not slow and not evidence")  # the choices of tests that leave out none of the proofs but slow ones
NEEDS = ("", "CUDA", "root", "slow", "large")
OUTCOMES: dict[str, set[str]] = {}  # of every test, or class of tests, by its name, for test_reliability_doc.py, which comes last


def at_hand(markexpr):
    """Those of the needs that this session has."""
    nightly = markexpr == ""
    large = nightly and os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >= 64 << 30
    return {need for need, there in zip(NEEDS, (True, torch.cuda.is_available(), os.getuid() == 0, nightly, large), strict=True) if there}


def rows(text):
    """(fault, promise, [(proof, what it needs)]) of every row of the tables."""
    for line in text.splitlines():
        if line.startswith("|") and not line.startswith(("| fault ", "| ---")):
            fault, promise, proofs = (cell.strip() for cell in line.strip("|").split(" | "))
            assert PROOF.sub("", proofs).replace(",", "").strip() == "", f"expected proofs alone in {proofs}"
            yield fault, promise, PROOF.findall(proofs)


@functools.cache
def defined(path):
    """The functions and classes of a file."""
    body = ast.parse((ROOT / path).read_text()).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def exists(proof):
    if proof.startswith("make "):
        return re.search(rf"^{proof[5:]}:", (ROOT / "Makefile").read_text(), re.M) is not None
    if proof.startswith("tests/install/run.sh "):
        script = (ROOT / "tests/install/run.sh").read_text()
        return proof.split()[1] in re.search(r'^offline="(.*)"', script, re.M)[1].split()
    path, _, name = proof.partition("::")
    if not path.startswith("tests/") or not (ROOT / path).is_file():
        return False
    return name in defined(path)


def never_ran(proofs, collected, outcomes, needs):
    """Those of the pytest `proofs` whose file was `collected`, whose needs are met, and that did not run or were skipped."""
    return [
        proof
        for proof, need in proofs
        if need in needs and proof.partition("::")[0] in collected and outcomes.get(proof, {"skipped"}) == {"skipped"}
    ]


def missing(config, collected):
    """The proofs that this session should have run and did not; none where it was asked for some tests or may end early."""
    option = config.option
    if option.keyword or option.markexpr not in ALL or any("::" in arg for arg in config.args):
        return []
    if getattr(option, "lf", False) or getattr(option, "maxfail", 0):
        return []
    named = [proof for _, _, proofs in rows(DOC.read_text()) for proof in proofs]
    return never_ran(named, collected, OUTCOMES, at_hand(option.markexpr))
