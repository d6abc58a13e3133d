"""What a compiler does not ask of a kernel launch."""

import re
from pathlib import Path

CUDA = sorted((Path(__file__).resolve().parents[2] / "csrc/cuda").glob("*.cu*"))


def launches():
    for path in CUDA:
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            if "<<<" in line:
                yield f"{path.name}:{number + 1}", re.match(r"\s*(\w+)", line)[1], "\n".join(lines[number + 1 : number + 6])


def test_every_launch_is_checked_under_its_name():
    found = list(launches())
    assert len(found) >= 4
    assert [place for place, kernel, after in found if f'check_launch("{kernel}");' not in after] == []


def test_every_kernel_has_the_name_that_tools_filter_by():
    assert [place for place, kernel, _ in launches() if not kernel.startswith("apt_")] == []


def test_no_kernel_asserts_on_data():
    """A device-side assert ends the context: nothing could be caught, and nothing be used afterwards."""
    assert [path.name for path in CUDA if re.search(r"\b(?<!static_)assert\s*\(|__trap|trap;", path.read_text())] == []
