"""The options of apt-ext train: words, files, and what is wrong with them, in one line."""

import inspect
import sys

import pytest

from apt_ext import APTConfig, Controller, Schedule
from apt_ext.tools.cli import main
from apt_ext.tools.train_options import TrainOptions, in_options, parsed, resuming

pytest.importorskip("jsonargparse")
NEEDED = ["m", "--data", "a.csv", "--output", "out"]


def test_options_are_the_controllers_and_the_configs_names():
    """Those that a program can give as a word, and that a run does not decide itself."""
    ours = {"model", "optimizer", "total_steps", "config", "log", "latency", "self"}
    controllers = set(inspect.signature(Controller.__init__).parameters) - ours
    configs = set(APTConfig.__dataclass_fields__) - {"r", "rank_pattern", "alpha_pattern", "float32_factors"}
    assert controllers | configs <= set(TrainOptions.__dataclass_fields__)


def test_words():
    found = parsed(
        [*NEEDED, "--prune", "heads", "neurons", "--round-to=16", "--uniform", "false", "--schedule.start", "3", "--schedule.end", "0.7"]
        + ["--trainer.optim", "sgd", "--trainer.max_grad_norm", "0.5", "--bf16", "--data", "b.csv", "c.csv"]
    )
    assert found.prune == ["heads", "neurons"] and found.round_to == 16 and found.uniform is False and found.bf16
    assert found.schedule == Schedule(start=3, end=0.7) and found.data == ["b.csv", "c.csv"]
    assert found.trainer == {"optim": "sgd", "max_grad_norm": 0.5}


def test_a_file_has_the_same_names_and_the_words_win_over_it(tmp_path):
    file = tmp_path / "run.yaml"
    lines = ["model: m", "data: [a.csv]", "output: out", "round-to: 16", "density: 0.3", "schedule: {events: 2}", "resume: true"]
    lines += ["trainer: {optim: sgd, max_grad_norm: 1e-1}", "learning-rate: 5e-4", "prune: neurons"]
    file.write_text("\n".join(lines))
    for words in (["--density", "0.4", "--config", str(file)], [f"--config={file}", "--density=0.4"]):
        found = parsed(words)
        assert found.model == "m" and found.round_to == 16 and found.density == 0.4 and found.schedule == Schedule(events=2)
        assert found.resume and found.trainer == {"optim": "sgd", "max_grad_norm": 0.1}
        assert found.learning_rate == 5e-4 and found.prune == ["neurons"] and found.data == ["a.csv"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--densty", "0.3"], "unrecognized arguments: --densty 0.3; did you mean --density?"),
        (["--density", "x"], "density: expected a number, got 'x'"),
        (["--prune", "foo"], "prune: expected heads, neurons or hidden, got 'foo'"),
        (["--prune", "neuron"], "prune: expected heads, neurons or hidden, got 'neuron'; did you mean neurons?"),
        (["--teacher", "lra"], "teacher: expected lora or self, got 'lra'; did you mean lora?"),
        (["--density", "50%"], "density: expected a number, got '50%'; did you mean 0.5?"),
        (["--length", "x"], "length: expected a whole number, got 'x'"),
        (["--schedule.end", "x"], "schedule.end: expected a whole number or a number, got 'x'"),
        (["--config", "no.yaml"], "no.yaml"),
        (["--schedule.strt", "1"], "did you mean --schedule"),
        (["--json"], "argument --json: expected one argument"),
    ],
)
def test_words_that_are_none_are_one_line_and_status_2(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", *NEEDED, *words])
    text = capsys.readouterr().err
    assert ended.value.code == 2 and said in text and text.count("\n") == 1 and text.startswith("apt-ext train: error: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--density", "7"], "density: expected a share of the layers' parameters in (0, 1], got 7.0; did you mean 0.07?"),
        (["--density", "50"], "got 50.0; did you mean 0.5?"),
        (["--density", "5"], "got 5.0; did you mean 0.05?"),
        (["--density", "100"], "got 100.0; did you mean 1?"),
        (["--density", "0"], "density: expected"),
        (["--epochs", "0"], "epochs: expected more than 0, got 0.0"),
        (["--batch", "0"], "batch: expected at least 1, got 0"),
        (["--seed", "-1"], "seed: expected a whole number from 0"),
        (["--bf16", "--fp16"], "bf16, fp16: expected one of them, got both"),
        (["--teacher-steps", "3"], "teacher-steps: expected --teacher lora with it, got none"),
        (["--text-column", "label"], "text-column, label-column: expected different columns, got label, label"),
        (["--resume", "--dry-run"], "resume, dry-run: expected one of them, got both"),
        (["--schedule.start", "1.5"], "schedule.start: expected a number of steps (int) or a share of all in [0, 1] (float), got 1.5"),
        (["--validation-share", "1"], "validation-share: expected a share between 0 and 1, got 1.0"),
    ],
)
def test_values_that_cannot_be_meant_are_one_line_and_status_2(words, said, capsys):
    assert main(["train", *NEEDED, *words]) == 2
    text = capsys.readouterr().err
    assert said in text and text.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("densty: 0.4", "got densty; nearest: density"),
        ("a: [1,\nb: {", "in line 2"),
        ("- 1", "expected options by their names in"),
        ("teacher: lra", "teacher: expected lora or self, got 'lra'"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line_with_its_name(content, said, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    try:
        status = main(["train", *NEEDED, "--config", str(file)])
    except SystemExit as ended:
        status = ended.code
    text = capsys.readouterr().err
    assert status == 2 and said in text and text.count("\n") == 1
    assert str(file) in text or "teacher" in text


@pytest.mark.parametrize("given", ["1.5", "4.9", "101", "-3", "nan", "150%"])
@pytest.mark.parametrize("command", ["plan", "train"])
def test_a_density_that_is_no_per_cent_gets_no_suggestion(command, given, capsys):
    words = ["plan", "m"] if command == "plan" else ["train", *NEEDED]
    try:
        status = main([*words, f"--density={given}"])
    except SystemExit as ended:
        status = ended.code
    text = capsys.readouterr().err
    assert status == 2 and "density: expected a" in text and "did you mean" not in text


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["trian"], "train"),
        (["reprot"], "report"),
        (["plan", "m", "--sharding", "fdsp"], "fsdp"),
        (["it's"], None),
        (["zzz"], None),
        (["plan", "m", "--sharding", "zero"], None),
    ],
    ids=str,
)
def test_the_nearest_choice_is_named(words, near, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    text = capsys.readouterr().err
    assert ended.value.code == 2 and "invalid choice: " in text and text.count("\n") == 1
    assert f"); did you mean {near}? (see apt-ext" in text if near else "did you mean" not in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "model", "--lenght", "5"], "apt-ext plan: error: unrecognized arguments: --lenght 5; did you mean --length?"),
        (["plan", "model", "--gpuz=2"], "did you mean --gpus?"),
        (["--versoin"], "apt-ext: error: unrecognized arguments: --versoin; did you mean --version?"),
        (["doctor", "--x"], "unrecognized arguments: --x (see apt-ext doctor --help)"),
    ],
)
def test_the_nearest_option_of_a_command_is_named(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("given", ["50", "50%", "50 %"])
def test_a_density_in_per_cent_is_told_as_a_share(given, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "m", "--density", given])
    assert ended.value.code == 2 and f"got {given!r}; did you mean 0.5?" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["model", "data", "output"])
def test_what_has_to_be_given(missing, capsys):
    words = {"model": ["m"], "data": ["--data", "a.csv"], "output": ["--output", "out"]}
    assert main(["train", *(word for name, given in words.items() if name != missing for word in given)]) == 2
    assert (
        f"{missing}: expected {'--' if missing != 'model' else ''}{missing if missing != 'model' else 'MODEL'}" in capsys.readouterr().err
    )


def test_without_jsonargparse_one_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert main(["train", *NEEDED]) == 1
    assert capsys.readouterr().err == 'apt-ext: train needs jsonargparse; run: python -m pip install "apt_ext[cli]"\n'
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0


def test_how_a_run_goes_on():
    assert resuming(["m", "--data", "my file.csv"]) == "apt-ext train m --data 'my file.csv' --resume"
    assert resuming(["m", "--resume"]) == "apt-ext train m --resume"


def test_help_of_every_command_has_an_example(capsys):
    for name in ("demo", "plan", "shrink", "train", "export", "report", "doctor", "bench"):
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        shown = capsys.readouterr().out
        assert ended.value.code == 0 and f"example:\n  apt-ext {name}" in shown, shown


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("prune=['heads', 'neurons'] with uniform=True", "--prune heads neurons with --uniform true"),
        ("reserve the rows with APTConfig(max_rank=...), or growth=1", "reserve the rows with --max-rank N, or --growth 1"),
        ("so would export='per_layer'", "so would --export per_layer"),
        ("expected head_dim=8, got num_heads = 3", "expected head_dim=8, got num_heads = 3"),
    ],
)
def test_errors_of_the_package_are_told_in_options(said, shown):
    assert in_options(said) == shown
