"""DDP, FSDP2 and the agreement of ranks: two gloo processes, started once, make the checks of wrapped_checks and agreement_checks."""

import json
import pathlib
import re
import subprocess
import sys

import pytest
import torch
import two_ranks

from apt_ext import APTAdapter, agreement

WORKER = pathlib.Path(__file__).with_name("two_ranks.py")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A function that fails with a rank's traceback unless the named check went well on both."""
    outcome = tmp_path_factory.mktemp("two") / "outcome"
    ranks = []
    for rank in range(2):
        with outcome.with_suffix(f".{rank}.log").open("w") as log:
            ranks.append(subprocess.Popen([sys.executable, str(WORKER), str(outcome), str(rank)], stdout=log, stderr=log))
    try:
        for process in ranks:
            process.wait(timeout=150)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    files = [outcome.with_suffix(f".{rank}.json") for rank in range(2)]
    results = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    output = [outcome.with_suffix(f".{rank}.log").read_text()[-3000:] for rank in range(2)]

    def went_well(name):
        for rank, result in enumerate(results):
            if name not in result:
                earlier = next((f"{failed}:\n{text}" for failed, text in result.items() if text), f"rank {rank} ended:\n{output[rank]}")
                pytest.fail(f"rank {rank} did not come to {name} after {earlier}")
            assert result[name] is None, f"rank {rank}:\n{result[name]}"

    return went_well


def test_every_check_is_looked_at():
    looked_at = re.findall(r'both\("(\w+)"\)', pathlib.Path(__file__).read_text())
    assert sorted(looked_at) == sorted(two_ranks.CHECKS)


# -- DDP ----------------------------------------------------------------------------------------------------------------------------------


def test_ddp_gradients_agree_after_growth_and_mask_changes(both):
    both("ddp_follows_one_process")


def test_ddp_growth_between_accumulated_batches(both):
    both("ddp_growth_between_accumulated_batches")


def test_ddp_refuses_reallocation_until_unwrapped(both):
    both("ddp_refuses_reallocation_until_unwrapped")


def test_ddp_growth_between_forward_and_backward(both):
    both("ddp_growth_between_forward_and_backward_is_an_error_on_every_rank")


# -- FSDP2 --------------------------------------------------------------------------------------------------------------------------------


def test_fsdp_gradients_agree_after_growth_and_mask_changes(both):
    both("fsdp_follows_one_process")


def test_fsdp_refuses_reallocation(both):
    both("fsdp_refuses_reallocation")


def test_fsdp_refuses_growth_merge_and_hold_while_gathered(both):
    both("fsdp_refuses_what_a_gathered_parameter_would_lose")


def test_fsdp_apply_grad_mask(both):
    both("fsdp_gradient_masks")


def test_fsdp_state_dict(both):
    both("fsdp_state_dict_comes_back")


# -- agreement ----------------------------------------------------------------------------------------------------------------------------


def test_ranks_with_other_masks_are_refused(both):
    both("ranks_with_other_masks_are_refused")


def test_ranks_with_other_ranks_are_refused(both):
    both("ranks_with_other_ranks_are_refused")


def test_ranks_that_differed_before_are_refused(both):
    both("ranks_that_differed_before_are_refused")


def test_a_refusal_on_one_rank_reaches_the_others(both):
    both("a_refusal_on_one_rank_reaches_the_others")


def test_a_rank_that_changes_alone_gets_an_error_and_so_do_the_others(both):
    both("a_rank_that_changes_alone_gets_an_error_and_so_do_the_others")


def test_a_change_alone_ends_a_collective_of_the_others(both):
    both("a_change_alone_ends_a_collective_of_the_others")


def test_a_batch_of_changes_costs_one_exchange(both):
    both("a_batch_of_changes_costs_one_exchange")


def test_block_masks_are_agreed_on_in_one_exchange(both):
    both("block_masks_are_agreed_on_in_one_exchange")


def test_alone_exchanges_nothing(both):
    both("what_a_rank_does_alone_on_purpose")


def test_new_rows_are_rank_zeros(both):
    both("new_rows_are_rank_zeros")


def test_the_store_is_left_tidy(both):
    both("the_store_is_left_tidy")


# -- one process --------------------------------------------------------------------------------------------------------------------------


def test_one_process_exchanges_nothing(monkeypatch):
    def never(*args):
        raise AssertionError

    for name in ("digest", "_next_round"):
        monkeypatch.setattr(agreement, name, never)
    adapter = APTAdapter(6, 4, 2)
    adapter.set_masks(torch.zeros(6))
    adapter.increase_rank(3)
    with pytest.raises(ValueError, match="mask_in"):
        adapter.set_masks(torch.full((6,), 2.0))


def test_digest_tells_values_shapes_and_types_apart():
    zero = torch.zeros(2, 3)
    different = [zero, zero.double(), zero.view(3, 2), -zero, torch.tensor(float("nan")), [zero], [[zero]], [zero, zero], 0, "0", 0.0, None]
    assert len({agreement.digest(value) for value in different}) == len(different)
    assert agreement.digest(torch.arange(6.0).view(2, 3).t()) == agreement.digest(torch.tensor([[0.0, 3], [1, 4], [2, 5]]))
    assert agreement.digest([1, torch.empty(0), zero.bfloat16()]) == agreement.digest((1, torch.empty(0), zero.bfloat16()))
    assert agreement.digest(zero.to("meta")) == agreement.digest(torch.ones(2, 3, device="meta"))
