"""A process with everything loaded that forks a child for each save, so that killing one costs milliseconds.

Each save writes one number everywhere: a mixture of two saves shows. `Server` is the test's side; run as a program it is the other.
"""

import gc
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

MANIFEST = "manifest.json"
_EVENTS = ("open", "os.", "fcntl.", "ctypes.")


class Server:
    """`start` returns the process id of a child that saves, `wait` its exit status (negative: the signal)."""

    def __init__(self):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-W", "ignore", __file__]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def _ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], 120)
        assert ready, "the server hangs"
        return json.loads(self.process.stdout.readline())

    def start(self, job, path, value, **options):
        return self._ask(job=job, path=str(path), value=value, **options)

    def wait(self, child):
        return self._ask(wait=child)

    def run(self, job, path, value, **options):
        return self.wait(self.start(job, path, value, **options))

    def close(self):
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()


def base():
    from torch import nn

    return nn.Sequential(nn.Linear(6, 4))


def checkpoint(path, value):
    import torch

    from apt_ext import APTConfig, adapter_parameters, get_apt_model

    apt = get_apt_model(base(), APTConfig(r=2, lora_alpha=value, target_modules=["0"]))
    with torch.no_grad():
        for parameter in adapter_parameters(apt):
            parameter.fill_(value)
    apt.save_pretrained(path)


def read_checkpoint(path):
    """The number that was saved. ValueError where there is no whole checkpoint."""
    from apt_ext import APTModel, adapter_parameters

    apt = APTModel.from_pretrained(base(), path)
    values = {parameter.unique().item() for parameter in adapter_parameters(apt)} | {apt.apt_config.lora_alpha}
    assert len(values) == 1, f"a mixture: {values}"
    return int(values.pop())


def directory(path, value):
    """What `export` does, without a model; the names differ from save to save."""
    from apt_ext.storage import atomic_dir

    with atomic_dir.made(path.parent), atomic_dir.stage(path.parent, path.name) as beside:
        new = beside / "new"
        new.mkdir()
        for name in ("config.json", f"model-{value % 2}.safetensors"):
            (new / name).write_text(str(value))
        atomic_dir.seal(new, MANIFEST)
        atomic_dir.place(new, path)


def read_directory(path):
    from apt_ext.storage import atomic_dir

    if not atomic_dir.unchanged(path, MANIFEST):
        raise ValueError(f"{path}: not whole")
    values = {file.read_text() for file in path.iterdir() if file.name != MANIFEST}
    assert len(values) == 1, f"a mixture: {values}"
    return int(values.pop())


_stock = []


def export(path, value):
    import apt_ext
    import apt_ext.exporting.directories as module

    module._compare = lambda *_: None  # in a process of its own, which takes seconds and writes nothing
    module.started = nullcontext
    (stock,) = _stock
    for parameter in stock.parameters():
        parameter.data.fill_(value)
    apt_ext.export(stock, path)


def read_export(path):
    """By stock transformers alone."""
    from transformers import BertModel

    try:
        model = BertModel.from_pretrained(path, local_files_only=True)
    except OSError as error:
        raise ValueError(str(error)) from error
    values = set().union(*(parameter.unique().tolist() for parameter in model.parameters()))
    assert len(values) == 1, f"a mixture: {values}"
    return int(values.pop())


JOBS = {"checkpoint": (checkpoint, read_checkpoint), "directory": (directory, read_directory), "export": (export, read_export)}


def _fail_at(count, act):
    """Call `act` at the count-th call that concerns files; fsync is the one that Python does not report itself."""
    fsync, seen = os.fsync, 0
    busy = False

    def hook(event, args):
        nonlocal seen, busy
        if busy or not event.startswith(_EVENTS) or (event == "open" and str(args[0]).endswith((".py", ".pyc", ".so"))):
            return
        seen += 1
        if seen == count:
            busy = True
            act(event)

    def audited(descriptor):
        sys.audit("os.fsync", descriptor)
        fsync(descriptor)

    os.fsync = audited
    sys.addaudithook(hook)


def _child(job, path, value, forever=False, fsize=None, user=None, umask=0o022, kill_at=0, fail_at=0, times=1):
    """0: saved; 1: an OSError, nothing else went wrong; 2: another error; 3: fewer calls than `fail_at`."""
    act = JOBS[job][0]
    path = Path(path)
    os.umask(umask)
    if fsize is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fsize, fsize))
    if user is not None:
        os.chdir(path)  # of which `user` sees nothing but this
        path = Path(".")
        os.setresuid(user, user, user)
    reached = []

    def fail(event):
        reached.append(event)
        raise OSError(28, f"No space left on device, says the test at {event}")

    if kill_at:
        _fail_at(kill_at, lambda event: os.kill(os.getpid(), signal.SIGKILL))
    if fail_at:
        _fail_at(fail_at, fail)
    try:
        while times or forever:
            act(path, value)
            value, times = value + 1, times - 1
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    except BaseException as error:
        print(type(error), error, file=sys.stderr)
        return 2
    return 3 if fail_at and not reached else 0


def main():
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    _stock.append(transformers.BertModel(transformers.BertConfig(**sizes, max_position_embeddings=8)))
    with tempfile.TemporaryDirectory() as scratch:  # what is imported at first use
        for job, (act, _) in JOBS.items():
            act(Path(scratch) / job, 1)
    gc.collect()
    gc.freeze()  # a child that collects would copy all of the pages
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                sys.stdin = open(os.devnull)
                os._exit(_child(**request))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
