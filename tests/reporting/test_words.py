"""Numbers as the page writes them."""

import pytest

from apt_ext.reporting import words


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (words.count(22_713_216), "22.7 M"),
        (words.count(999), "999"),
        (words.count(1.1e9), "1.10 B"),
        (words.count(None), "–"),
        (words.size(90_900_000), "90.9 MB"),
        (words.size(0), "0 B"),
        (words.flops(2.724e9), "2.72 GFLOP"),
        (words.seconds(0.00671), "6.71 ms"),
        (words.seconds(1.5), "1.50 s"),
        (words.seconds(5e-6), "5.00 µs"),
        (words.percent(0.4), "40 %"),
        (words.percent(0.4321), "43.2 %"),
        (words.percent(1.0), "100 %"),
        (words.change(200, 100), "−50 %"),
        (words.change(100, 123.7), "+23.7 %"),
        (words.change(100, 100), "unchanged"),
        (words.change(0, 1), ""),
        (words.change(None, 1), ""),
        (words.span([3, 1, 2]), "1–3"),
        (words.span([1536, 1536]), "1,536"),
        (words.span([]), "none"),
    ],
)
def test_numbers(written, expected):
    assert written == expected
