"""DDP, FSDP2 and the agreement of ranks: two gloo processes, started once, make the checks of wrapped_checks, agreement_checks,
controller_checks, cut_checks and checkpoint_checks."""

import json
import pathlib
import random
import re
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch
import two_ranks

from apt_ext import APTAdapter
from apt_ext.distributed import agreement

WORKER = pathlib.Path(__file__).parents[1] / "helpers" / "two_ranks.py"


def run(commands, outcome):
    """Runs the commands side by side; a function that fails with a rank's traceback unless the named check went well on both ranks."""
    processes = []
    for number, command in enumerate(commands):
        with outcome.with_suffix(f".{number}.log").open("w") as log:
            processes.append(subprocess.Popen([sys.executable, *command], stdout=log, stderr=log))
    try:
        for process in processes:
            process.wait(timeout=420)  # far more than it takes: only what hangs is ended
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()
    files = [outcome.with_suffix(f".{rank}.json") for rank in range(2)]
    results = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    output = "".join(outcome.with_suffix(f".{number}.log").read_text()[-3000:] for number in range(len(commands)))

    def went_well(name):
        for rank, result in enumerate(results):
            if name not in result:
                earlier = next((f"{failed}:\n{text}" for failed, text in result.items() if text), f"the end:\n{output}")
                pytest.fail(f"rank {rank} did not come to {name} after {earlier}")
            assert result[name] is None, f"rank {rank}:\n{result[name]}"

    return went_well


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    outcome = tmp_path_factory.mktemp("two") / "outcome"
    return run([[WORKER, outcome, str(rank)] for rank in range(2)], outcome)


@pytest.mark.slow
def test_under_torchrun(tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    went_well = run([[*launch, WORKER, tmp_path / "outcome"]], tmp_path / "outcome")
    for name in two_ranks.CHECKS:
        went_well(name)


def test_every_check_is_looked_at():
    looked_at = re.findall(r'both\("(\w+)"\)', pathlib.Path(__file__).read_text())
    assert sorted(looked_at) == sorted(two_ranks.CHECKS)


# -- DDP ----------------------------------------------------------------------------------------------------------------------------------


def test_ddp_gradients_agree_after_growth_and_mask_changes(both):
    both("ddp_follows_one_process")


def test_ddp_of_compacted_adapters(both):
    both("ddp_of_compacted_adapters_follows_one_process")


def test_fsdp_refuses_to_compact_what_it_has_sharded(both):
    both("fsdp_refuses_what_it_has_sharded")


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


def test_fsdp1_is_refused(both):
    both("fsdp1_is_refused")


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


def test_a_cut_is_agreed_on_and_shrink_asks_nobody(both):
    both("a_cut_is_agreed_on_and_shrink_asks_nobody")


def test_alone_exchanges_nothing(both):
    both("what_a_rank_does_alone_on_purpose")


def test_new_rows_are_rank_zeros(both):
    both("new_rows_are_rank_zeros")


def test_the_store_is_left_tidy(both):
    both("the_store_is_left_tidy")


# -- Controller ---------------------------------------------------------------------------------------------------------------------------


def test_a_controller_under_ddp_is_one_process_with_the_joint_batch(both):
    both("a_controller_under_ddp_is_one_process_with_the_joint_batch")


def test_a_controller_of_a_decoder_under_ddp(both):
    both("a_controller_of_a_decoder_under_ddp")


def test_a_controller_under_fsdp_is_one_process_with_the_joint_batch(both):
    both("a_controller_under_fsdp_is_one_process_with_the_joint_batch")


def test_a_controller_of_a_decoder_under_fsdp(both):
    both("a_controller_of_a_decoder_under_fsdp")


def test_a_controller_refuses_to_wrap_what_fsdp_has_sharded(both):
    both("a_controller_refuses_to_wrap_what_fsdp_has_sharded")


def test_fsdp_hands_gradients_over_with_the_last_micro_batch(both):
    both("fsdp_hands_gradients_over_with_the_last_micro_batch")


def test_a_controller_refuses_growth_that_ddp_would_not_see(both):
    both("a_controller_refuses_growth_that_ddp_would_not_see")


def test_a_refused_mask_leaves_no_carrier(both):
    both("a_mask_that_is_refused_leaves_no_carrier")


def test_a_refused_controller_leaves_no_carrier_on_any_rank(both):
    both("a_controller_that_one_rank_refuses_is_made_on_none")


def test_a_refused_state_leaves_no_carrier(both):
    both("a_state_that_is_refused_leaves_no_carrier")


def test_a_run_goes_on_with_another_number_of_ranks(both):
    both("a_run_goes_on_with_another_number_of_ranks")


# -- cuts -----------------------------------------------------------------------------------------------------


def test_ranks_cut_alike(both):
    both("ranks_cut_alike")


def test_a_salience_that_differs_refuses_the_cut(both):
    both("a_salience_that_differs_on_one_rank_refuses_the_cut_on_every_rank")


def test_a_mask_that_others_set_refuses_the_cut(both):
    both("a_mask_that_others_set_on_one_rank_refuses_the_cut_on_every_rank")


def test_under_ddp_the_default_is_compact(both):
    both("under_ddp_the_default_is_compact_and_a_cut_is_refused_on_every_rank")


def test_under_fsdp_the_default_is_compact(both):
    both("under_fsdp_the_default_is_compact_and_a_cut_is_refused_on_every_rank")


def test_a_wrapper_that_comes_after_the_controller(both):
    both("a_wrapper_that_comes_after_the_controller_makes_it_compact")


def test_a_cut_state_is_refused_under_ddp(both):
    both("a_cut_state_is_refused_by_a_model_that_ddp_holds")


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
    assert agreement.digest([1, lambda: zero]) == agreement.digest([1, zero])


@pytest.mark.parametrize("world", [2, 4])
def test_all_ranks_act_on_one_verdict_whatever_each_does(world):
    """Threads for ranks, over one store: most agree, some differ, refuse, or come too late; and then all agree again."""
    store, rounds = torch.distributed.HashStore(), 60
    store.set_timeout(timedelta(seconds=0.1))
    plan = random.Random(world)
    moods = [plan.choice([["same"], ["same", "same", "differs"], ["same", "same", "refuses"], ["same", "late"]]) for _ in range(rounds)]
    acts = [[plan.choice(mood) for mood in moods] for _ in range(world)]
    verdicts = [[] for _ in range(world)]

    def run(rank):
        delays = random.Random(100 + rank)
        for number, act in enumerate(acts[rank]):
            time.sleep(delays.random() * 0.004 + 0.09 * (act == "late"))
            this = agreement._Round(store, number, rank, world)
            if act == "refuses":
                verdicts[rank].append(this.settle(f"rank {rank} refuses"))
            else:
                verdicts[rank].append(this.propose("change", str(rank if act == "differs" else "")))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [len(seen) for seen in verdicts] == [rounds] * world
    for number, seen in enumerate(zip(*verdicts, strict=True)):
        assert len(set(seen)) == 1, (number, seen)
        if seen[0] == "agreed":
            assert all(acts[rank][number] in ("same", "late") for rank in range(world))
    assert 5 < sum(seen == "agreed" for seen in verdicts[0]) < rounds - 5
    assert any("waited" in seen for seen in verdicts[0]) and any("proposes" in seen for seen in verdicts[0])
