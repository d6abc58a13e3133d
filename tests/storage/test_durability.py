"""A save that is killed, or meets a full disk, another save or a reader, leaves the old state or the new, whole."""

import os
import random
import shutil
import signal
import stat
import subprocess
import time

import pytest
import saver

from apt_ext.storage import atomic_dir
from apt_ext.storage.checkpoint import MANIFEST_FILE

KILLS = pytest.mark.parametrize("kills", [8, pytest.param(50, marks=pytest.mark.slow)])
BOTH = pytest.mark.parametrize("job", ["checkpoint", "directory"])


@pytest.fixture(scope="module")
def server():
    running = saver.Server()
    yield running
    running.close()


def names(directory):
    """Every name at and below, the temporary ones included."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def read(job, path):
    return saver.JOBS[job][1](path)


@BOTH
@pytest.mark.parametrize("fault", ["kill_at", "fail_at"])
def test_a_fault_at_any_call_leaves_the_old_or_the_new(tmp_path, server, job, fault):
    path, other = tmp_path / "one" / "saved", tmp_path / "one" / "other.txt"
    assert server.run(job, path, 10) == 0
    other.write_text("mine")
    value, clean, at, left, came = 10, names(tmp_path), 0, 0, set()
    while True:
        at += 1
        assert at < 500, "it never ends"
        status = server.run(job, path, value + 1, **{fault: at})
        found = read(job, path)
        came.add(found - value)
        if fault == "kill_at":
            assert status in (0, -signal.SIGKILL) and found - value in (0, 1)
            left += names(tmp_path) != clean
            done = status == 0
        else:
            assert status in (0, 1, 3) and found - value == (0 if status == 1 else 1), "an error says that nothing has changed"
            done = status == 3
        assert server.run(job, path, value + 2) == 0
        value += 2
        assert read(job, path) == value
        assert {name.replace("model-1", "model-0") for name in names(tmp_path)} == set(clean), "the next save sweeps"
        if done:
            break
    assert at > 15 and came == {0, 1} and (left > 5 or fault == "fail_at")


@BOTH
@KILLS
def test_kill_at_any_moment(tmp_path, server, job, kills):
    rng = random.Random(kills)
    path, last = tmp_path / "saved", 0
    for _ in range(kills):
        child = server.start(job, path, last + 1, forever=True)
        time.sleep(rng.uniform(0.005, 0.1))
        os.kill(child, signal.SIGKILL)
        assert server.wait(child) == -signal.SIGKILL
        if last or path.exists():
            try:
                found = read(job, path)
            except ValueError:
                assert last == 0  # there has never been one
                continue
            assert found >= last
            last = found
    assert last > 1
    assert server.run(job, path, last + 1) == 0 and read(job, path) == last + 1
    assert len(list(tmp_path.iterdir())) == 1 and len(list(path.iterdir())) == 3


@KILLS
def test_kill_during_export_as_stock_transformers_sees_it(tmp_path, server, kills):
    rng = random.Random(kills)
    path = tmp_path / "saved"
    assert server.run("export", path, 1) == 0
    last = 1
    for _ in range(kills):
        child = server.start("export", path, last + 1, forever=True)
        time.sleep(rng.uniform(0.01, 0.3))
        os.kill(child, signal.SIGKILL)
        assert server.wait(child) == -signal.SIGKILL
        found = read("export", path)
        assert found >= last
        last = found
    assert last > 1
    assert server.run("export", path, 0) == 0 and read("export", path) == 0
    assert names(tmp_path) == [
        "saved",
        *(f"saved/{name}" for name in ("README.md", "apt_export.json", "config.json", "model.safetensors", "provenance.json")),
    ]


def test_readers_see_one_save_or_the_next(tmp_path, server):
    path, times = tmp_path / "saved", 200
    assert server.run("checkpoint", path, 0) == 0
    child, seen = server.start("checkpoint", path, 1, times=times), [0]
    while seen[-1] < times:
        seen.append(read("checkpoint", path))
    assert server.wait(child) == 0
    assert seen == sorted(seen) and len(set(seen)) > 10


@BOTH
def test_of_two_writers_the_last_whole_one_wins(tmp_path, server, job):
    path = tmp_path / "saved"
    children = [server.start(job, path, first, times=50) for first in (1000, 2000, 3000)]
    assert [server.wait(child) for child in children] == [0, 0, 0]
    assert read(job, path) in (1049, 2049, 3049)
    assert server.run(job, path, 2) == 0 and read(job, path) == 2
    assert len(list(tmp_path.iterdir())) == 1 and len(list(path.iterdir())) == 3


@BOTH
@pytest.mark.parametrize("size", [0, 100, 400])
def test_a_file_that_cannot_be_written_changes_nothing(tmp_path, server, job, size):
    path = tmp_path / "saved"
    assert server.run(job, path, 1) == 0
    before = names(tmp_path)
    largest = max(file.stat().st_size for file in path.iterdir())
    assert server.run(job, path, 2, fsize=min(size, largest - 1)) == 1
    assert read(job, path) == 1 and names(tmp_path) == before
    assert server.run(job, tmp_path / "new" / "saved", 2, fsize=min(size, largest - 1)) == 1
    assert names(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 48 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "none", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run(["umount", place], check=True)


@BOTH
def test_a_full_disk_changes_nothing(small_disk, server, job):
    path = small_disk / "saved"
    assert server.run(job, path, 1) == 0
    before = names(small_disk)
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space"), filler.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(1024))
    assert server.run(job, path, 2) == 1
    filler.unlink()
    assert read(job, path) == 1 and names(small_disk) == before
    assert server.run(job, path, 2) == 0 and read(job, path) == 2


def test_a_directory_that_may_not_be_written_is_read_and_left(tmp_path, server):
    path = tmp_path / "saved"
    assert server.run("checkpoint", path, 1) == 0
    before = names(tmp_path)
    path.chmod(0o555)
    try:
        assert server.run("checkpoint", path, 2, user=65534 if os.getuid() == 0 else os.getuid()) == 1
    finally:
        path.chmod(0o755)
    assert read("checkpoint", path) == 1 and names(tmp_path) == before


@BOTH
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_modes_are_those_that_the_umask_gives(tmp_path, server, job, umask):
    path = tmp_path / "saved"
    for value in (1, 2):
        assert server.run(job, path, value, umask=umask) == 0
        assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o666 & ~umask}
        assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~umask
    path.chmod(0o710)
    assert server.run(job, path, 3, umask=umask) == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o710


def test_an_export_is_readable_for_others(tmp_path, server):
    assert server.run("export", tmp_path / "saved", 1) == 0  # safetensors itself gives 0600
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "saved").iterdir()} == {0o644}


@BOTH
def test_all_of_it_is_on_the_disk_before_the_step_and_the_step_after_it(tmp_path, monkeypatch, job):
    path = tmp_path / "saved"
    saver.JOBS[job][0](path, 1)
    done = []

    def file_of(descriptor):
        return os.path.realpath(f"/proc/self/fd/{descriptor}")

    fsync, rename, replace, exchange = os.fsync, os.rename, os.replace, atomic_dir._exchange
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append(("sync", file_of(descriptor))), fsync(descriptor))[1])
    monkeypatch.setattr(os, "rename", lambda old, new: (done.append(("step", str(old))), rename(old, new))[1])
    monkeypatch.setattr(os, "replace", lambda old, new, **of: (done.append(("move", str(new))), replace(old, new, **of))[1])
    monkeypatch.setattr(atomic_dir, "_exchange", lambda old, new: (done.append(("step", str(old))), exchange(old, new))[1])
    saver.JOBS[job][0](path, 2)
    steps = [index for index, (what, _) in enumerate(done) if what == "step"]
    assert len(steps) == 1
    (step,) = steps
    sealed = done[step][1]
    synced = {name for what, name in done[:step] if what == "sync"}
    assert {sealed, *(f"{sealed}/{file.name}" for file in path.iterdir() if not file.name.startswith("model"))} <= synced
    assert len(synced) == 4
    if job == "directory":
        assert done[step + 1 :] == [("sync", str(tmp_path))]
    else:  # the step, and then what others would otherwise have to do once more
        moves = [("move", str(path / name)) for name in ("apt_config.json", "apt_model.safetensors", MANIFEST_FILE)]
        assert done[step + 1 :] == [("sync", str(path)), *moves, ("sync", str(path))]


def test_each_new_directory_is_on_the_disk_before_anything_is_in_it(tmp_path, monkeypatch):
    done, fsync, mkdir = [], os.fsync, os.mkdir
    monkeypatch.setattr(os, "fsync", lambda at: (done.append(("sync", os.path.realpath(f"/proc/self/fd/{at}"))), fsync(at))[1])
    monkeypatch.setattr(os, "mkdir", lambda path, *mode: (done.append(("make", str(path))), mkdir(path, *mode))[1])
    one, two = tmp_path / "one", tmp_path / "one" / "two"
    with atomic_dir.made(two):
        assert done == [("make", str(one)), ("sync", str(tmp_path)), ("make", str(two)), ("sync", str(one))]


@BOTH
def test_a_rank_that_is_killed_while_all_save_leaves_the_save_of_the_others(tmp_path, server, job):
    """Ranks save without asking each other: none waits for one that is gone, and what is there is whole at any moment."""
    path, value = tmp_path / "saved", 1
    assert server.run(job, path, value) == 0
    for at in (3, 8, 12, 16, 20):
        killed, other = server.start(job, path, value + 1, kill_at=at), server.start(job, path, value + 2)
        seen = {read(job, path)}
        assert server.wait(other) == 0 and server.wait(killed) in (0, -signal.SIGKILL)
        seen.add(found := read(job, path))
        assert seen <= {value, value + 1, value + 2} and found > value
        assert server.run(job, path, value + 3) == 0 and read(job, path) == value + 3
        value += 3


def test_only_what_nobody_uses_is_swept(tmp_path):
    left = tmp_path / f".saved.{'0' * 16}.tmp"
    left.mkdir()
    (left / "file").touch()
    other = [tmp_path / name for name in (".saved.mine.tmp", f".saved.{'0' * 16}", f".other.{'0' * 16}.tmp", f"saved.{'0' * 16}.tmp")]
    for path in other:
        path.mkdir()
    with atomic_dir.stage(tmp_path, "saved") as first:
        assert not left.exists()
        (first / "file").touch()
        with atomic_dir.stage(tmp_path, "saved") as second:
            assert (first / "file").exists() and second != first
        assert not second.exists()
    assert sorted(tmp_path.iterdir()) == sorted(other)


def test_what_was_committed_and_not_finished_is_what_is_read(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    saver.checkpoint(old, 1)
    saver.checkpoint(new, 2)
    for moved in range(4):  # as after a kill between the renames
        path = tmp_path / f"after {moved}"
        shutil.copytree(old, path)
        shutil.copytree(new, path / f".{MANIFEST_FILE}.new")
        for name in ("apt_config.json", "apt_model.safetensors", MANIFEST_FILE)[:moved]:
            os.replace(path / f".{MANIFEST_FILE}.new" / name, path / name)
        assert saver.read_checkpoint(path) == 2
        saver.checkpoint(path, 3)
        assert saver.read_checkpoint(path) == 3 and len(names(path)) == 3


@pytest.mark.parametrize("missing", ["function", "support"])
def test_without_an_exchange_of_directories(tmp_path, monkeypatch, missing):
    class Library:
        if missing == "support":

            def renameat2(self, *_):
                atomic_dir.ctypes.set_errno(atomic_dir.errno.EINVAL)
                return -1

    monkeypatch.setattr(atomic_dir.ctypes, "CDLL", lambda *_, **__: Library())
    path = tmp_path / "saved"
    for value in (1, 2, 3):
        saver.directory(path, value)
        assert saver.read_directory(path) == value and names(tmp_path)[0] == "saved"
    rename = os.rename

    def second_fails(old, new):
        if str(new) == str(path) and old.name == "new":
            raise OSError(5, "Input/output error")
        rename(old, new)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="Input/output"):
        saver.directory(path, 4)
    assert saver.read_directory(path) == 3 and len(list(tmp_path.iterdir())) == 1


def test_an_error_of_the_exchange_is_an_error(tmp_path):
    (tmp_path / "here").mkdir()
    with pytest.raises(FileNotFoundError):
        atomic_dir._exchange(tmp_path / "here", tmp_path / "nowhere")
    assert names(tmp_path) == ["here"]
