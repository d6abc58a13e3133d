"""launch_plan is a pure function of shape and device: what it must never choose, and what it says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_ext._C import launch_plan

sizes = st.integers(0, 20000)


@given(M=sizes, N=sizes, K=sizes, R=st.integers(0, 200), capability=st.sampled_from([70, 80, 86, 90, 100]))
def test_every_shape_gets_a_plan_that_fits(M, N, K, R, capability):
    plan = launch_plan(M, N, K, R, capability=capability, multiprocessors=108, shared_bytes=101376 if capability == 86 else 166912)
    if plan.route == "library":
        return
    assert capability >= 80 and 0 < R <= 16 and M and N and K
    assert plan.padded or (N % 8 == 0 and K % 8 == 0)
    assert plan.rows in (16, 32)
    for span in (plan.span_N, plan.span_K):
        assert span % 64 == 0 and span >= 64
    assert 1 <= plan.up_splits_N <= -(-N // 512) and 1 <= plan.up_splits_K <= -(-K // 512)
    blocks = -(-M // plan.rows)
    assert plan.up_splits_N == 1 or blocks * plan.up_splits_N <= 2 * 108


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((8192, 4096, 4096), 32),
        ((8192, 768, 4096), 32),
        ((8192, 2048, 2048), 16),  # short rows
        ((4096, 4096, 4096), 16),  # one block of 32 for each multiprocessor
        ((4096, 768, 768), 16),
    ],
)
def test_rows_a_block(shape, rows):
    assert launch_plan(*shape, 16).rows == rows


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float32"},
        {"dtype": "float64"},
        {"R": 0},
        {"R": 17},
        {"capability": 75},
        {"multiprocessors": 0},
        {"shared_bytes": 65536},
        {"M": 10, "N": 4097},
    ],
)
def test_the_library_takes_what_the_passes_cannot(change):
    shape = {"M": 8192, "N": 4096, "K": 4096, "R": 16, **change}
    assert launch_plan(**shape).route == "library"


def test_odd_widths_are_padded_where_the_product_is_large():
    assert launch_plan(8192, 4097, 4096, 16).padded and launch_plan(8192, 4096, 383, 0).padded
    assert not launch_plan(8, 4097, 4096, 16).padded and not launch_plan(8192, 4096, 4096, 16).padded


def test_ranks_that_only_the_library_takes_are_padded():
    assert launch_plan(8192, 4096, 4096, 37).padded and launch_plan(8192, 4096, 4096, 17).padded
    assert not any(launch_plan(8192, 4096, 4096, rank).padded for rank in (0, 5, 13, 16, 24, 40))
    assert not launch_plan(8192, 4096, 4096, 37, "float32").padded and not launch_plan(8, 4096, 4096, 37).padded


@pytest.mark.parametrize(
    ("M", "width", "rows"),
    [(8192, 4096, 32), (6000, 4096, 16), (16384, 2048, 32), (8192, 2048, 16), (16384, 768, 16), (16384, 1024, 32)],
)
def test_rows_of_a_block_by_what_the_chip_holds(M, width, rows):
    for N, K in ((width, width), (256, width), (width, 256)):
        assert f"passes, {rows} rows a block" in repr(launch_plan(M, N, K, 8))


def test_a_plan_says_what_it_is():
    assert repr(launch_plan(8192, 4096, 4096, 16)).startswith("passes, 32 rows a block")
    assert repr(launch_plan(8192, 4097, 4096, 0)) == "library, padded to multiples of 8"
    with pytest.raises(ValueError, match="dtype must be float64"):
        launch_plan(1, 1, 1, 1, "int8")
