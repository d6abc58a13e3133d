"""A process with the commands loaded that forks a child for each, so that one costs no imports.

`Server` is the test's side; run as a program it is the other. In the place of what a command does, which takes long, is one of JOBS.
"""

import gc
import json
import logging
import os
import select
import subprocess
import sys
import time
from pathlib import Path


class Server:
    """`start` returns the process id of a child that runs `main(words)`, `wait` its exit status (negative: the signal)."""

    def __init__(self):
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        command = [sys.executable, "-W", "ignore", __file__]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def _ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], 60)
        assert ready, "the command does not end"
        return json.loads(self.process.stdout.readline())

    def start(self, job, *words, out=os.devnull, err=os.devnull):
        """out, err: files; None is a pipe that nobody reads."""
        return self._ask(job=job, words=[*map(str, words)], out=out and str(out), err=err and str(err))

    def wait(self, child):
        return self._ask(wait=child)

    def close(self):
        self.process.stdin.close()
        self.process.kill()  # it may wait for a command that does not end
        self.process.wait(10)
        self.process.stdout.close()


def warn_and_sleep():
    logging.getLogger("apt_ext").warning("of a\nworker")
    time.sleep(600)


def _in_a_worker(*_, **__):
    from apt_ext.tools.processes import run_apart

    run_apart(warn_and_sleep)


def _much(*_, **__):
    for _ in range(100_000):
        print("a line of which nobody reads the last")


JOBS = {"work": _in_a_worker, "print": _much}


def _child(job, words, out, err):
    from apt_ext.tools import cli

    for path, descriptor in ((os.devnull, 0), (out, 1), (err, 2)):
        if path is not None:
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), descriptor)
            continue
        unread, written = os.pipe()
        os.dup2(written, descriptor)
        os.close(unread)
        os.close(written)
    cli.demo = JOBS[job]
    sys.exit(cli.main(words))


def main():
    import torch

    from apt_ext.tools import cli  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # a child that collects would copy all of the pages
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                _child(**request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
