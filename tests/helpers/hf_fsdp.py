"""Started by torchrun: a Trainer run under FSDP2, and going on from its checkpoint. Prints "passed"."""

import sys
from pathlib import Path

import torch
import transformers
from hf_runs import built, trainer
from safetensors.torch import load_file

transformers.logging.set_verbosity_error()


def main(path: Path, states: str) -> None:
    config = {"version": 2, "state_dict_type": states, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    options = {"fsdp": True, "fsdp_config": {**config, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}, "use_cpu": False}
    run, apt = trainer(path, model=built(max_rank=8), save_strategy="steps", save_steps=4, **options)
    assert run.is_fsdp_enabled
    run.train()
    assert apt.controller.done and apt.controller.history
    full = run.accelerator.get_state_dict(run.model)
    checkpoint = path / "checkpoint-4"
    torch.distributed.barrier()
    assert (checkpoint / "controller.json").is_file()
    if states == "FULL_STATE_DICT":
        assert not [key for key in load_file(checkpoint / "model.safetensors") if ".base_layer." in key]
    other, again = trainer(path, model=built(max_rank=8), **options)
    other.train(resume_from_checkpoint=str(checkpoint))
    found = other.accelerator.get_state_dict(other.model)
    different = [key for key in full if not torch.equal(full[key], found[key])]
    assert not different, different
    assert again.controller.history == apt.controller.history
    print("passed", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
