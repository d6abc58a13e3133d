"""apt-ext as a program: its exit status, the one line that it says, and that signals and closed pipes end it and all that it started."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
from command_server import Server
from families import FAMILIES

from apt_ext.tools import checkout, cli, demo, messages, processes
from apt_ext.tools.cli import main
from apt_ext.tools.data import Missing

SIGNALS = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]


@pytest.fixture(scope="module")
def server():
    if not Path("/proc/self/task").is_dir():
        pytest.skip("this system has no process table in files")
    running = Server()
    yield running
    running.close()


@pytest.fixture
def does(monkeypatch, tmp_path):
    """What `apt-ext demo` does instead, and its words."""

    def put(work):
        monkeypatch.setattr(cli, "demo", lambda *arguments, **options: work())
        return ["demo", "--output", str(tmp_path / "out")]

    return put


def below(pid):
    """{process: its command} of those that a process has started."""
    found = {}
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # one that has ended meanwhile
            for child in file.read_text().split():
                found[int(child)] = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.02)
    return found


# -- signals -----------------------------------------------------------------------------------------------------------


# That each signal ends a command is shown below, in this process.
NIGHTLY = [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGHUP, signal.SIGINT)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, *NIGHTLY])
def test_workers_end_with_the_command_that_started_them(server, tmp_path, number):
    """Those that are killed with it while they start, and one that works and finds itself alone."""
    err = tmp_path / "err"
    command = server.start("work", "demo", "--output", tmp_path / "out", err=err)
    worker = until(lambda: [pid for pid, said in below(command).items() if "spawn_main" in said])
    started = [*worker, *below(command)]
    if number == signal.SIGKILL:
        until(lambda: err.exists() and err.read_text())
    os.kill(command, number)
    status = server.wait(command)
    until(lambda: not any(map(alive, started)), 20)
    if number == signal.SIGKILL:
        assert status == -number and err.read_text() == "apt-ext: warning: of a worker\n"
    else:
        assert status == 128 + number and err.read_text() == f"apt-ext: ended by {number.name}\n"
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGKILL])
@pytest.mark.parametrize("name", ["shrink", "results"])
def test_workers_of_real_commands_end_with_them(tmp_path, pack, number, name):
    shapes = tmp_path / "shapes"
    FAMILIES["llama"].model(torch.float32).config.save_pretrained(shapes)
    words = ["shrink", shapes, "--random", "--keep", "neurons=7", "--length", "8", "--device", "cpu", "--output", tmp_path / "out"]
    if name == "results":
        words = ["results", "--task", "movies", "--row", "lora,full", "--jobs", "2", "--device", "cpu", "--quick", "--seed", "0-30"]
        words += ["--data", pack, "--output", tmp_path / "out"]
    with (tmp_path / "err").open("w") as err:
        running = subprocess.Popen([sys.executable, "-m", "apt_ext", *map(str, words)], stdout=err, stderr=err)
    until(lambda: [said for said in below(running.pid).values() if "spawn_main" in said])
    started = list(below(running.pid))
    running.send_signal(number)
    assert running.wait(60) == (-number if number == signal.SIGKILL else 128 + number)
    until(lambda: not any(map(alive, started)))
    said = (tmp_path / "err").read_text()
    assert number == signal.SIGKILL or ("Traceback" not in said and f"apt-ext: ended by {number.name}\n" in said)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_command_in_one_line_and_its_handlers_with_it(does, capsys, number):
    before = [signal.getsignal(each) for each in SIGNALS]
    assert main(does(lambda: signal.raise_signal(number))) == 128 + number
    assert capsys.readouterr().err == f"apt-ext: ended by {number.name}\n"
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_second_signal_ends_the_process_where_the_first_was_caught(does, monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda status: sys.exit(f"at once, {status}"))

    def stubborn():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit, match="at once, 143"):
        main(does(stubborn))


def test_a_signal_that_is_ignored_stays_ignored(does, monkeypatch):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main(does(lambda: signal.raise_signal(signal.SIGHUP))) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_waits_until_a_process_is_started(does, capsys):
    """Whichever thread the system gives it to."""
    starting, sent, started = Event(), Event(), []

    def kill():
        starting.wait(60)
        os.kill(os.getpid(), signal.SIGTERM)
        sent.set()

    class Pool:
        def submit(self, function):
            starting.set()
            assert sent.wait(60)
            time.sleep(0.01)  # and the interpreter sees it
            started.append(function)

    killer = Thread(target=kill)  # before signals are blocked, so that this thread gets it
    killer.start()
    assert main(does(lambda: processes.submit(Pool(), until))) == 143 and started == [until]
    killer.join()
    assert capsys.readouterr().err == "apt-ext: ended by SIGTERM\n"


def test_a_worker_that_dies_is_said(monkeypatch):
    from concurrent.futures import Future
    from concurrent.futures.process import BrokenProcessPool
    from contextlib import nullcontext

    def broken(*_):
        future = Future()
        future.set_exception(BrokenProcessPool("ended abruptly"))
        return future

    monkeypatch.setattr(processes, "worker_pool", lambda workers: nullcontext())
    monkeypatch.setattr(processes, "submit", broken)
    with pytest.raises(Missing, match=r"until: expected a result of the process that runs it, but the process died \(killed, or out of"):
        processes.run_apart(until)


# -- pipes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["demo"], ["--help"], ["demo", "--help"]], ids=" ".join)
def test_a_pipe_that_nobody_reads_is_no_error(server, tmp_path, words):
    err = tmp_path / "err"
    output = ["--output", tmp_path / "out"] if words == ["demo"] else []
    assert server.wait(server.start("print", *words, *output, out=None, err=err)) == 141 and err.read_text() == ""
    assert server.wait(server.start("print", *words, *output, out=None, err=None)) == 141


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_plan_through_head(tmp_path, unbuffered):
    FAMILIES["llama"].model(torch.float32).config.save_pretrained(tmp_path)
    command = f"{sys.executable} -m apt_ext plan {tmp_path} --json | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    assert done.returncode in (0, 141) and done.stdout == "{" and done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
def test_output_that_cannot_be_written_is_an_error(server, tmp_path):
    child = server.start("print", "demo", "--output", tmp_path / "out", out="/dev/full", err=tmp_path / "err")
    assert server.wait(child) == 1
    assert (tmp_path / "err").read_text() == "apt-ext: OSError: [Errno 28] No space left on device (--debug shows the traceback)\n"


def test_a_pipe_that_breaks_elsewhere_is_an_error(does, capsys):
    def broken():
        raise BrokenPipeError(32, "Broken pipe")

    assert main(does(broken)) == 1 and "apt-ext: BrokenPipeError: " in capsys.readouterr().err


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (Missing("no such\nthing"), "apt-ext: no such thing\n"),
        (demo.CheckFailed("APT: expected: more"), "apt-ext: APT: expected: more\n"),
        (ZeroDivisionError("division by zero"), "apt-ext: ZeroDivisionError: division by zero (--debug shows the traceback)\n"),
        (RuntimeError("several\n  lines"), "apt-ext: RuntimeError: several lines (--debug shows the traceback)\n"),
    ],
)
def test_an_error_is_one_line_and_a_traceback_where_it_is_asked_for(does, capsys, error, line):
    def fails():
        raise error

    words = does(fails)
    assert main(words) == 1 and capsys.readouterr().err == line
    for debug in (["--debug", *words], [*words, "--debug"]):
        assert main(debug) == 1
        said = capsys.readouterr().err
        assert said.startswith("Traceback") and " in fails\n" in said and said.splitlines()[-1] in line


@pytest.mark.parametrize("words", [["plan"], ["shrink", "m"], ["demo", "--steps", "0"], ["results", "--jobs", "x"], ["no-command"]])
def test_arguments_that_are_none_are_one_line_and_status_2(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and ": error: " in said and said.startswith("apt-ext")


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "m", "--keep", "heads=1", "heads=2"],
        ["plan", "m", "--density", "1.5"],
        ["shrink", "m", "--keep", "heads=1", "--random", "--steps", "3"],
        ["results", "--task", "movies", "--minutes", "0"],
    ],
    ids=" ".join,
)
def test_arguments_that_cannot_be_meant_are_one_line_and_status_2(words, capsys):
    assert main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["--task", "movies", "--jobs", "2"], ["--help"], ["more", "words"]], ids=" ".join)
def test_results_of_an_installed_package_says_that_it_needs_a_checkout(words, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(checkout, "BENCHMARKS", tmp_path)
    assert main(["results", *words]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("apt-ext: results: expected a checkout of the repository") and said.err.count("\n") == 1
    assert "python -m pip install -e ." in said.err and not said.out


# -- what the library says ---------------------------------------------------------------------------------------------


def test_warnings_of_the_library_are_lines_on_stderr(does, capsys):
    def warns():
        logging.getLogger("apt_ext").info("not this")
        logging.getLogger("apt_ext").warning("%s:\nno head", "0.heads")

    words = does(warns)
    for _ in range(2):
        assert main(words) == 0
        assert capsys.readouterr().err == "apt-ext: warning: 0.heads: no head\n"
    assert not any(isinstance(handler, messages._Lines) for handler in messages.logger.handlers)


# -- names of models ---------------------------------------------------------------------------------------------------


def test_plan_takes_a_package_by_its_name(tmp_path, monkeypatch, capsys):
    package = tmp_path / "a_model"
    FAMILIES["bert"].model(torch.float32).config.save_pretrained(package / "model")
    information = tmp_path / "a_model-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: a-model\nVersion: 1.0\n")
    (information / "RECORD").write_text("a_model/model/config.json,,\na_model-1.0.dist-info/METADATA,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    outputs = []
    for name in ("a-model", str(package / "model")):
        assert main(["plan", name, "--json"]) == 0
        outputs.append(json.loads(capsys.readouterr().out))
    assert outputs[0] == outputs[1] and outputs[0]["blocks"]["heads"]
    shutil.rmtree(package)
    assert main(["plan", "a-model"]) == 1
    assert "model: expected a directory, a .gguf file or an installed package that holds one, got a-model" in capsys.readouterr().err


def test_plan_takes_a_gguf_file(tmp_path, capsys):
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    for name, value in {"block_count": 2, "context_length": 64, "embedding_length": 32, "feed_forward_length": 48}.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(60)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert main(["plan", str(file), "--keep", "neurons=24", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "LlamaForCausalLM" and found["blocks"]["neurons"] == {"0.neurons": 48, "1.neurons": 48}
    assert found["exports"]["stock"] == []
