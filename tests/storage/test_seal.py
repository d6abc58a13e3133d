"""`seal` hashes files while they go to the disk, `flush` sends them there while they are written; neither is done too early."""

import json
import os
import stat
import threading

import pytest

from apt_ext.storage import atomic_dir

MANIFEST = "manifest.json"
NAMES = ("a.safetensors", "b.safetensors")


@pytest.fixture
def directory(tmp_path):
    """Two files as safetensors leaves them, for their owner alone."""
    for name in NAMES:
        (tmp_path / name).write_text(name)
        (tmp_path / name).chmod(0o600)
    return tmp_path


def name_of(descriptor):
    return os.path.basename(os.path.realpath(f"/proc/self/fd/{descriptor}"))


def test_each_file_goes_to_the_disk_with_its_mode_and_the_manifest_after_them(directory, monkeypatch):
    done, fsync, umask = [], os.fsync, os.umask(0o027)
    monkeypatch.setattr(
        os,
        "fsync",
        lambda at: (fsync(at), done.append((name_of(at), stat.S_IMODE(os.fstat(at).st_mode), (directory / MANIFEST).read_text() != "")))[0],
    )
    try:
        atomic_dir.seal(directory, MANIFEST)
    finally:
        os.umask(umask)
    assert sorted(done[:2]) == [(name, 0o640, False) for name in NAMES]
    assert done[2] == (MANIFEST, 0o640, True) and [name for name, *_ in done[3:]] == [directory.name]


def test_a_file_is_hashed_while_it_goes_to_the_disk(directory, monkeypatch):
    begun, fsync, digest = threading.Barrier(2, timeout=20), os.fsync, atomic_dir._digest

    def meets(function):
        def call(what):
            if (name_of(what) if isinstance(what, int) else what.name) == NAMES[0]:
                begun.wait()  # for the other: neither has ended
            return function(what)

        return call

    monkeypatch.setattr(os, "fsync", meets(fsync))
    monkeypatch.setattr(atomic_dir, "_digest", meets(digest))
    atomic_dir.seal(directory, MANIFEST)
    assert not begun.broken


@pytest.mark.parametrize("fails", [*NAMES, MANIFEST, "the directory"])
def test_what_does_not_get_to_the_disk_is_an_error(directory, monkeypatch, fails):
    def full(descriptor):
        if name_of(descriptor) == (directory.name if fails == "the directory" else fails):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_dir.seal(directory, MANIFEST)
    assert ((directory / MANIFEST).read_text() == "") == (fails in NAMES), "it closes what is on the disk"


def test_a_link_is_refused_and_the_mode_of_its_file_stays(directory, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "file"
    other.write_text("mine")
    other.chmod(0o600)
    (directory / "link").symlink_to(other)
    with pytest.raises(ValueError, match="link: expected a regular file, got a symbolic link"):
        atomic_dir.seal(directory, MANIFEST)
    assert stat.S_IMODE(other.stat().st_mode) == 0o600


# -- while they are written --------------------------------------------------------------------------------------------


@pytest.fixture
def flushing(directory, monkeypatch):
    """Start `flush` on the directory `new`, which is not there yet; the names that it has synced, and what ends it and gives its error."""
    monkeypatch.setattr(atomic_dir, "_PAUSE", 0.001)
    monkeypatch.setattr(atomic_dir, "_WORTH_FLUSHING", 100)
    ended, errors = threading.Event(), []

    def run():
        try:
            atomic_dir.flush(directory / "new", ended)
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def end():
        ended.set()
        thread.join(20)
        assert not thread.is_alive()
        return errors

    yield end
    end()


def test_large_files_go_to_the_disk_while_they_grow(directory, monkeypatch, flushing):
    synced, again = [], threading.Semaphore(0)
    monkeypatch.setattr(atomic_dir, "sync", lambda path: (synced.append((path.name, path.stat().st_size)), again.release()))
    (directory / "new").mkdir()
    (directory / "new" / "small").write_bytes(bytes(99))
    with (directory / "new" / "large").open("ab", buffering=0) as stream:
        for _ in range(2):
            stream.write(bytes(100))
            assert again.acquire(timeout=20)
    assert flushing() == [] and synced == [("large", 100), ("large", 200)]


def test_a_file_that_goes_meanwhile_is_none_to_flush(directory, monkeypatch, flushing):
    asked = threading.Semaphore(0)

    def gone(path):
        asked.release()
        raise FileNotFoundError(path)

    monkeypatch.setattr(atomic_dir, "sync", gone)
    (directory / "new").mkdir()
    (directory / "new" / "large").write_bytes(bytes(100))
    assert asked.acquire(timeout=20) and flushing() == []


def test_what_cannot_be_flushed_is_told(directory, monkeypatch, flushing):
    failed = threading.Event()

    def full(_):
        failed.set()
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", full)
    (directory / "new").mkdir()
    (directory / "new" / "large").write_bytes(bytes(100))
    assert failed.wait(20) and [str(error) for error in flushing()] == ["[Errno 5] Input/output error"]


def test_the_manifest_says_what_is_there(directory):
    atomic_dir.seal(directory, MANIFEST)
    files = json.loads((directory / MANIFEST).read_text())["files"]
    assert list(files) == list(NAMES) and [entry["size"] for entry in files.values()] == [len(name) for name in NAMES]
    assert atomic_dir.unchanged(directory, MANIFEST)


def test_a_stage_whose_end_was_interrupted_is_swept_by_the_next_one(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), atomic_dir.stage(tmp_path, "small"):
        patch.setattr(atomic_dir.shutil, "rmtree", interrupted)
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_dir.stage(tmp_path, "small") as directory:
        assert list(tmp_path.iterdir()) == [directory]
