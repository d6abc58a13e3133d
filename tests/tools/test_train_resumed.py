"""apt-ext train that was stopped: at a whole step, in words, and on from there bit for bit."""

import signal

import pytest
from own_source import table, train, words

import apt_ext
from apt_ext.tools import train as command
from apt_ext.tools.cli import main
from apt_ext.tools.train_options import parsed
from apt_ext.tools.train_run import stopping_callback

pytest.importorskip("jsonargparse")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("loaded_here", "unpainted")
WEIGHTS = "model.safetensors"


@pytest.fixture
def ends_after(monkeypatch):
    """A signal comes during this optimizer step."""

    def put(step, number=signal.SIGTERM, times=1):
        kind = type(stopping_callback())

        class At(kind):
            def on_step_end(self, args, state, control, **more):
                for _ in range(times if state.global_step == step else 0):
                    signal.raise_signal(number)
                return super().on_step_end(args, state, control, **more)

        monkeypatch.setattr(command, "stopping_callback", At)

    return put


@pytest.mark.parametrize(
    "more", [[], ["--teacher", "lora"], ["--teacher", "self"], ["--early-stopping", "3"]], ids=lambda more: "-".join(more)
)
def test_a_stopped_run_goes_on_bit_for_bit(own_source, own_data, out, tmp_path, capsys, monkeypatch, ends_after, more):
    assert train(own_source, own_data, tmp_path / "whole", "--epochs", "4", *more) == 0
    with monkeypatch.context():
        ends_after(7)
        assert train(own_source, own_data, out, "--epochs", "4", *more) == 128 + signal.SIGTERM
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("apt-ext: ended by SIGTERM; go on with: apt-ext train") and said.endswith(" --resume")
    monkeypatch.setattr(command, "stopping_callback", stopping_callback)
    assert train(own_source, own_data, out, "--epochs", "4", *more, "--resume") == 0
    assert f"going on from {out / 'checkpoints' / 'checkpoint-7'}" in capsys.readouterr().err
    assert (out / "model" / WEIGHTS).read_bytes() == (tmp_path / "whole" / "model" / WEIGHTS).read_bytes()


def test_a_second_signal_ends_the_run_at_once(own_source, own_data, out, capsys, ends_after):
    ends_after(3, times=2)
    assert train(own_source, own_data, out) == 128 + signal.SIGTERM
    assert not (out / "checkpoints" / "checkpoint-3").exists()
    assert capsys.readouterr().err.splitlines()[-1].startswith("apt-ext: ended by SIGTERM; there is no checkpoint yet")


def test_what_may_not_differ_when_a_run_goes_on(own_source, own_data, out, tmp_path, capsys, ends_after):
    ends_after(3, signal.SIGINT)
    assert train(own_source, own_data, out) == 130
    capsys.readouterr()
    for more, status, said in (
        (["--density", "0.7", "--resume"], 2, "resume: expected --density 0.8 as in the run in"),
        (["--prune", "heads", "--export", "per_layer", "--resume"], 2, "resume: expected --prune ['neurons'] as in the run in"),
        (["--max-steps", "9", "--resume"], 2, "resume: expected no --max-steps as in the run in"),
        (["--data", str(table(tmp_path, 80)), "--resume"], 2, "resume: expected the --data of the run in"),
        ([], 1, "--resume goes on with the run in it"),
    ):
        assert train(own_source, own_data, out, *more) == status
        assert said in capsys.readouterr().err.splitlines()[-1]
    assert main(["export", str(out), "--output", str(tmp_path / "early")]) == 1
    assert "--unfinished" in capsys.readouterr().err
    assert main(["export", str(out), "--output", str(tmp_path / "early"), "--unfinished"]) == 0


def test_a_run_without_a_checkpoint_begins_anew(own_source, own_data, out, capsys, monkeypatch):
    def stops(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, "trainer_for", stops)
        assert train(own_source, own_data, out) == 130
    assert train(own_source, own_data, out, "--resume") == 1
    assert "found none; leave --resume out, and it begins anew" in capsys.readouterr().err
    (out / "checkpoints" / "checkpoint-3").mkdir(parents=True)  # killed while it was written
    with monkeypatch.context() as patch:
        patch.setattr(command, "_fit", lambda *_: {"begun": True})
        assert command.train(parsed(words(own_source, own_data, out)[1:]), []) == {"begun": True}


def test_a_damaged_checkpoint_is_skipped_in_words(own_source, own_data, out, capsys, monkeypatch):
    assert train(own_source, own_data, out) == 0
    last, first = (out / "checkpoints" / f"checkpoint-{step}" for step in (8, 4))
    kept = (last / WEIGHTS).read_bytes()
    (last / WEIGHTS).write_bytes(b"")
    monkeypatch.setattr(command, "_fit", lambda run, model, teacher, checkpoint, *_: {"checkpoint": checkpoint})
    options = parsed([*words(own_source, own_data, out)[1:], "--resume"])
    assert command.train(options, []) == {"checkpoint": first}
    (last / WEIGHTS).write_bytes(kept)
    (last / "optimizer.pt").unlink()
    (first / "rng_state.pth").write_bytes(b"cut")
    assert train(own_source, own_data, out, "--resume") == 1
    shown = capsys.readouterr().err.splitlines()[-1]
    for said in (f"{last / 'optimizer.pt'}: expected", f"{first / 'rng_state.pth'}: expected", "begin anew without --resume"):
        assert said in shown


def test_a_run_goes_on_from_the_last_whole_checkpoint(own_source, own_data, out, capsys):
    assert train(own_source, own_data, out) == 0
    before = (out / "model" / WEIGHTS).read_bytes()
    (out / "checkpoints" / "checkpoint-8" / "optimizer.pt").unlink()
    capsys.readouterr()
    assert train(own_source, own_data, out, "--resume") == 0
    said = capsys.readouterr().err
    assert "optimizer.pt: expected what Trainer has saved, found no such file; checkpoint-8 is skipped, checkpoint-4 is whole" in said
    assert (out / "model" / WEIGHTS).read_bytes() == before


def test_a_failure_says_how_to_go_on(own_source, own_data, out, capsys, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(apt_ext, "export", fails)
    assert train(own_source, own_data, out) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "apt-ext: RuntimeError: CUDA out of memory (--debug shows the traceback)"
    assert lines[-2].startswith("apt-ext: warning: go on with: apt-ext train ") and lines[-2].endswith("--resume")
