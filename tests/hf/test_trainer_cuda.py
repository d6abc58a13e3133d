"""Trainer runs on a GPU: GradScaler's skipped steps, mixed precision, FSDP2."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from hf_runs import END, STEPS, losses, trainer

import apt_ext

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
HELPERS = Path(__file__).parents[1] / "helpers"
OVERFLOW = float("inf")


def run_with_overflows(path, at, **options):
    """A run in float16 whose gradients overflow at the steps `at`, counted from 0."""
    run, apt = trainer(path, use_cpu=False, fp16=True, **options)

    def compute_loss(model, inputs, return_outputs=False, **_):
        outputs = model(**inputs)
        loss = outputs.loss * (OVERFLOW if run.state.global_step in at else 1.0)
        return (loss, outputs) if return_outputs else loss

    run.compute_loss = compute_loss
    return run, apt


def test_steps_that_gradscaler_skips_do_not_count(tmp_path, caplog):
    run, apt = run_with_overflows(tmp_path, at={1})
    run.train()
    assert apt.controller.done and STEPS - 3 <= apt.controller.now < STEPS and run.model.density <= 0.8
    run, apt = run_with_overflows(tmp_path, at=set(range(END - 2, STEPS)))
    with caplog.at_level(logging.WARNING, "apt_ext"):
        run.train()
    assert not apt.controller.done and re.search(rf"GradScaler skipped [4-6] of the {STEPS} optimizer steps", caplog.text)
    with pytest.raises(RuntimeError, match="not finished"):
        apt_ext.export(run.model, tmp_path / "small")


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch.compile
@pytest.mark.parametrize("options", [{"bf16": True}, {"fp16": True}, {"optim": "adamw_torch_fused"}, {"torch_compile": True}], ids=str)
def test_a_run_prunes_and_goes_on(tmp_path, options):
    run, apt = trainer(tmp_path / "a", use_cpu=False, save_strategy="steps", save_steps=4, **options)
    run.train()
    assert apt.controller.done and run.model.density <= 0.8
    other, _ = trainer(tmp_path / "b", use_cpu=False, **options)
    other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert losses(other, 4) == pytest.approx(losses(run, 4), rel=2e-2)
    assert run.model.density == other.model.density


def test_the_model_of_a_gpu_run_is_exported(tmp_path):
    run, _ = trainer(tmp_path / "a", use_cpu=False, bf16=True)
    run.train()
    apt_ext.export(run.model, tmp_path / "small")
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    x = torch.arange(1, 9)[None]
    expected = run.model.eval()(input_ids=x.cuda()).logits.cpu()
    torch.testing.assert_close(small(input_ids=x).logits, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("states", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_fsdp2_prunes_and_goes_on(tmp_path, states):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [*command, str(HELPERS / "hf_fsdp.py"), str(tmp_path), states], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "passed" in done.stdout
