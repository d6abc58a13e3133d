"""Starts as one of two ranks of a gloo process group and makes every check; test_distributed.py looks at the outcome.

python two_ranks.py OUTCOME RANK, or torchrun --nproc-per-node 2 two_ranks.py OUTCOME: writes {check: None or the traceback} of each rank
to OUTCOME.RANK.json.
"""

import gc
import json
import pathlib
import sys
import time
import traceback
from datetime import timedelta

import agreement_checks  # noqa: F401
import checkpoint_checks  # noqa: F401
import controller_checks  # noqa: F401
import cut_checks  # noqa: F401
import torch
import wrapped_checks  # noqa: F401  after the others: its last check ends the group
from torch import distributed as dist
from two_adapters import CHECKS


def join(outcome, rank):
    """A group over a store whose port rank 0 leaves in a file."""
    meeting = pathlib.Path(f"{outcome}.port")
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, 2, True, timedelta(seconds=60), wait_for_workers=False)
        meeting.with_suffix(".new").write_text(str(store.port))
        meeting.with_suffix(".new").replace(meeting)
    else:
        while not meeting.exists():
            time.sleep(0.05)
        store = dist.TCPStore("127.0.0.1", int(meeting.read_text()), 2, False, timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))


def main(outcome, rank=None):
    torch.set_num_threads(1)
    if rank is None:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    else:
        join(outcome, int(rank))
    rank, store = dist.get_rank(), dist.distributed_c10d._get_default_store()
    assert store.timeout == timedelta(seconds=60)
    result = {}
    for name, function in CHECKS.items():
        # A rank that failed inside a collective is not where the other one is: the checks after it are not run.
        store.set(f"check/{name}/{rank}", "ready")
        store.wait([f"check/{name}/{other}" for other in range(2)], timedelta(seconds=60))
        gc.collect()
        gc.freeze()  # what resize.wrapper_of searches is then what the check makes
        try:
            function(rank)
            result[name] = None
        except BaseException:
            result[name] = traceback.format_exc()
        pathlib.Path(f"{outcome}.{rank}.json").write_text(json.dumps(result))
        if result[name]:
            break


if __name__ == "__main__":
    main(*sys.argv[1:])
