"""Growth in a process group of one: re-allocation of what a wrapper holds is refused."""

import gc
import sys
import warnings

import pytest
import torch
from low_rank_pair import Pair, refused
from torch import nn
from torch.optim import AdamW

from apt_ext.optim.resize import Resize, resize_parameters


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_growth_under_ddp_is_refused(process_group):
    pair, other = Pair(), Pair()
    pair.forward = pair.loss
    optimizer = AdamW(pair.parameters())
    wrapped = nn.parallel.DistributedDataParallel(pair)
    wrapped().backward()
    optimizer.step()
    refused(pair, [optimizer], RuntimeError, "held by DistributedDataParallel.*max_rank", lambda: pair.grow(optimizer))
    other.grow()
    wrapped.itself = [wrapped]  # a cycle: deleted, it waits for the collector
    del wrapped
    pair.grow(optimizer)
    pair.train_steps(optimizer)
    nn.parallel.DistributedDataParallel(pair)().backward()
    assert pair.lora_A.grad.shape == (7, 6)


def test_growth_of_a_sharded_parameter_is_refused(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    pair = Pair()
    fully_shard(pair, mesh=init_device_mesh("cpu", (1,)))
    assert type(pair.lora_A.data).__name__ == "DTensor"
    value = torch.ones(7, 6)
    with pytest.raises(RuntimeError, match="DTensor.*max_rank"):
        resize_parameters([Resize(pair.lora_A, value, 0)])
    assert pair.lora_A.shape == (4, 6)


def test_growth_under_fsdp1_is_refused(process_group):
    from torch.distributed.fsdp import FullyShardedDataParallel

    pair = Pair()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own deprecations
        wrapped = FullyShardedDataParallel(pair, use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(RuntimeError, match="held by FullyShardedDataParallel"):
        resize_parameters([Resize(pair.lora_A, torch.ones(7, *pair.lora_A.shape[1:]), 0)])
    del wrapped
    gc.collect()


def test_growth_under_deepspeed_is_refused(process_group, monkeypatch):
    import types

    class DeepSpeedEngine(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(DeepSpeedEngine=DeepSpeedEngine))
    pair = Pair()
    engine = DeepSpeedEngine(pair)
    refused(pair, [], RuntimeError, "held by DeepSpeedEngine", pair.grow)
    del engine
    pair.grow()
