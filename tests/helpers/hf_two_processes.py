"""Started by torchrun: a Trainer run under DDP, and what it must refuse. Prints "passed"."""

import json
import sys
from pathlib import Path

import torch
import transformers
from hf_runs import built, losses, trainer
from safetensors.torch import load_file

transformers.logging.set_verbosity_error()


def main(path: Path) -> None:
    run, apt = trainer(path / "a", model=built(max_rank=8), save_strategy="steps", save_steps=4)
    run.train()
    assert apt.controller.done and apt.controller.shrink == "compact" and run.model.density <= 0.8
    assert run.accelerator.num_processes == 2
    checkpoint = path / "a" / "checkpoint-4"
    torch.distributed.barrier()
    tensors = load_file(checkpoint / "model.safetensors")
    assert tensors["apt_format"].tolist() == [1, 2] and not [key for key in tensors if ".base_layer." in key]
    assert json.loads((checkpoint / "apt_config.json").read_text())["max_rank"] == 8
    other, _ = trainer(path / "b", model=built(max_rank=8))
    other.train(resume_from_checkpoint=str(checkpoint))
    state = other.model.state_dict()
    assert losses(other, 4) == losses(run, 4)
    assert all(torch.equal(value, state[key]) for key, value in run.model.state_dict().items())
    refused, _ = trainer(path / "c")
    try:
        refused.train()
    except RuntimeError as error:
        assert "max_rank" in str(error) and refused.state.global_step == 0
        print("passed", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
