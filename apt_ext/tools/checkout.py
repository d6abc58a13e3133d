"""Import what a checkout of the repository has beside the package, and no wheel has.

`apt_ext.tools.checkout.evidence` is the directory benchmarks/evidence. The path below makes this module a package
of it: sys.path stays as it is, and the processes that a command starts import the same modules by the same names.
"""

from __future__ import annotations

from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
__path__ = [str(BENCHMARKS)]


def has_evidence() -> bool:
    """Return whether benchmarks/evidence is there."""
    return (BENCHMARKS / "evidence" / "command.py").is_file()
