"""docs/method.md names a test for each property of the method, 1 to 42, and each of them exists."""

import re

from proofs import ROOT, exists

ROWS = re.findall(r"^\| ([\d, ]+) \| (.+?) \| (.+) \|$", (ROOT / "docs/method.md").read_text(), re.M)


def test_every_property_has_a_test_that_exists():
    numbers = [int(number) for cell, _, _ in ROWS for number in cell.split(",")]
    assert sorted(numbers) == list(range(1, 43))
    for cell, _, tests in ROWS:
        named = re.findall(r"`([^`]+)`", tests)
        assert named and [name for name in named if not exists(name)] == [], cell


def test_the_parts_it_names_exist():
    named = set(re.findall(r"`((?!tests/)[\w/]+\.py)`", (ROOT / "docs/method.md").read_text()))
    assert named and all((ROOT / "apt_ext" / name).is_file() for name in named)
