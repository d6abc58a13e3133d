"""Directories that are whole whatever happens while they are written, and files that are read without trusting them.

Both kinds of directory are written the same way: a new directory in the same file system (`stage`), closed by a manifest with the size and
the SHA-256 of every file and brought to the disk (`seal`), then put in its place by one rename, before which nothing that was there has
changed. A directory that is read by others and holds nothing else takes its place as a whole (`place`). One that may hold other
people's files, or be a mount point, gets its files one by one (`commit`); until all are there, `opened` finds them where they wait.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from threading import Event
from typing import Any

from .._version import __version__
from ..common.checks import error_prefix

_MOST_TEXT = 1 << 20  # bytes of a manifest
_THREADS = 8  # that read files of a directory, or wait for the disk
_PAUSE = 0.05  # seconds between two looks at files that are being written
_WORTH_FLUSHING = 64 << 20  # bytes that a file has grown by
_TRIES = 100  # against processes that save at the same time
_NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST)

# -- writing -----------------------------------------------------------------------------------------------------------


@contextmanager
def made(directory: Path) -> Iterator[None]:
    """`directory` exists within this context, with its parents; those that were made for it go again when the context raises."""
    missing = []
    while not directory.exists():
        missing.append(directory)
        directory = directory.parent
    try:
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            sync(path.parent)
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):  # of another process by now
                path.rmdir()
        raise


@contextmanager
def stage(parent: Path, name: str) -> Iterator[Path]:
    """A new directory in `parent` for the next `name`, gone afterwards unless it was renamed. Those that killed processes left go now.

    Its lock tells the others that it is in use, and ends with this process. Where the file system has no locks, they stay.
    """
    pattern = f".{glob.escape(name)}.{'[0-9a-f]' * 16}.tmp"
    for leftover in parent.glob(pattern):
        _sweep(leftover)
    while True:
        directory = parent / f".{name}.{secrets.token_hex(8)}.tmp"
        directory.mkdir()
        # Until it has its lock another process may take it for a leftover.
        try:
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if directory.exists():
            break
        os.close(lock)
    try:
        yield directory
    finally:
        try:
            shutil.rmtree(directory, ignore_errors=True)
        finally:  # interrupted again: the next one in this process may sweep it
            os.close(lock)


def _sweep(leftover: Path) -> None:
    with suppress(OSError):  # in use, no directory, no locks
        lock = os.open(leftover, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(leftover, ignore_errors=True)
        finally:
            os.close(lock)


def flush(directory: Path, ended: Event) -> None:
    """Bring large files of `directory` to the disk while others write them, until `ended`: `seal` then waits less.

    Raises what fsync raises. Ask for it before a success is said: the kernel tells once that it could not write a page.
    """
    flushed: dict[Path, int] = {}
    while not ended.wait(_PAUSE):
        with suppress(FileNotFoundError):  # not made yet, or a temporary name that is gone
            for file in directory.iterdir():
                size = file.stat().st_size
                if size - flushed.get(file, 0) >= _WORTH_FLUSHING:
                    flushed[file] = size
                    sync(file)


def seal(directory: Path, manifest: str) -> None:
    """Write the manifest of the files in `directory` last, and have all of it on the disk when this returns."""
    found, last = sorted(directory.iterdir()), directory / manifest
    last.touch()
    mode = stat.S_IMODE(last.stat().st_mode)  # what the umask gives; safetensors gives its files 0600
    with ThreadPoolExecutor(_THREADS) as disk, ThreadPoolExecutor(_THREADS) as pool:  # both let other threads run
        kept = [disk.submit(_keep, file, mode) for file in found]
        hashes = pool.map(_digest, found)
        files = {file.name: {"size": file.stat().st_size, "sha256": sha256} for file, sha256 in zip(found, hashes, strict=True)}
        for one in kept:
            one.result()
    last.write_text(json.dumps({"apt_ext": __version__, "files": files}, indent=2) + "\n", encoding="utf-8")
    sync(last)
    sync(directory)


def _keep(file: Path, mode: int) -> None:
    """Have a file with this mode on the disk when this returns. ValueError for a link, whose mode is another file's."""
    with error_prefix(file.name), _open_regular(file) as stream:
        os.fchmod(stream.fileno(), mode)  # first: fsync takes it along
        os.fsync(stream.fileno())


def sync(path: Path) -> None:
    """Have a file, or the entries of a directory, on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def place(sealed: Path, target: Path) -> None:
    """`sealed` is the directory `target` from now on; what was there takes the place of `sealed`. One step, and none when this raises.

    On a file system that cannot exchange two directories (network file systems) it is two steps, between which `target` is missing.
    """
    move: Callable[[Path, Path], None] = os.rename
    if target.exists():
        sealed.chmod(stat.S_IMODE(target.stat().st_mode))
        move = _exchange
    try:
        move(sealed, target)
    except OSError as error:
        if error.errno not in _NOT_EMPTY:
            raise
        move = _exchange  # another process was there first
        move(sealed, target)
    try:
        sync(target.parent)
    except BaseException:
        move(target, sealed)
        raise


def _exchange(one: Path, other: Path) -> None:
    """Exchange two directories: renameat2 of Linux, which Python does not offer."""
    at_cwd, exchange = -100, 2
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call and call(at_cwd, os.fsencode(one.absolute()), at_cwd, os.fsencode(other.absolute()), exchange) == 0:
        return
    code = ctypes.get_errno() if call else errno.ENOSYS
    if code not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        raise OSError(code, os.strerror(code), str(one), None, str(other))
    aside = one.with_name(f"{one.name}.old")
    os.rename(other, aside)
    try:
        os.rename(one, other)
    except BaseException:
        os.rename(aside, other)
        raise
    os.rename(aside, one)


def commit(sealed: Path, directory: Path, manifest: str, names: Sequence[str]) -> None:
    """Give the files `names` of `sealed` and its manifest their places in `directory`; what was there is unchanged when this raises.

    The one step is the rename of `sealed` to the name under which `opened` looks first.
    """
    for name in (*names, manifest):
        if (directory / name).is_dir():
            raise ValueError(f"path: expected no directory of this name, got one: {directory / name}")
    for attempt in range(_TRIES):
        _finish(directory, manifest, names)  # what a killed process committed, or another is committing
        try:
            os.rename(sealed, _pending(directory, manifest))
            break
        except OSError as error:
            if error.errno not in _NOT_EMPTY or attempt == _TRIES - 1:
                raise
    try:
        sync(directory)
    except BaseException:
        os.rename(_pending(directory, manifest), sealed)
        raise
    with suppress(OSError):  # it is saved; the next save finishes it
        _finish(directory, manifest, names)
        sync(directory)


def _pending(directory: Path, manifest: str) -> Path:
    return directory / f".{manifest}.new"


def _finish(directory: Path, manifest: str, names: Sequence[str]) -> None:
    """Move what was committed into its places; several processes may do so at once."""
    pending = _pending(directory, manifest)
    try:
        # By descriptor: under its name there may be the next one by the time another process has finished this one.
        descriptor = os.open(pending, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    try:
        for name in (*names, manifest):  # the manifest last: while it waits, so may the others
            with suppress(FileNotFoundError):
                os.replace(name, directory / name, src_dir_fd=descriptor)
    finally:
        os.close(descriptor)
    with suppress(FileNotFoundError):
        try:
            pending.rmdir()
        except OSError as error:
            if error.errno not in _NOT_EMPTY:
                raise


# -- reading -----------------------------------------------------------------------------------------------------------


class Sealed:
    """A file of a manifest, open at its start: whatever is renamed over its name, this is what is read, once."""

    def __init__(self, path: Path, stream: BufferedReader, entry: dict[str, Any]) -> None:
        self.path = path
        self.size: int = entry["size"]
        self._stream = stream
        self._sha256: str = entry["sha256"]
        self._seen = hashlib.sha256()
        found = os.fstat(stream.fileno()).st_size
        if found != self.size:
            raise ValueError(f"expected {self.size} bytes, as its manifest says, got {found}")

    def read(self, count: int) -> bytes:
        """The next `count` bytes, which are not to be trusted before `done`."""
        data = self._stream.read(count)
        if len(data) != count:
            raise ValueError(f"expected {self.size} bytes, as its manifest says, got fewer")
        self._seen.update(data)
        return data

    def done(self) -> None:
        """ValueError unless what was read is all of it, and what the manifest says."""
        if self._seen.hexdigest() != self._sha256:
            raise ValueError(
                f"expected content with SHA-256 {self._sha256}, as its manifest says, got other content: it was changed or damaged"
            )

    def json(self, most: int) -> dict[str, Any]:
        """The object that it holds, in at most `most` bytes."""
        if self.size > most:
            raise ValueError(f"expected at most {most} bytes, got {self.size}")
        text = self.read(self.size)
        self.done()
        return json_object(text.decode("utf-8"))


@contextmanager
def opened(directory: Path, manifest: str, names: Sequence[str] | None = None, *others: Sequence[str]) -> Iterator[dict[str, Sealed]]:
    """The files of the sealed directory, all of one save, whatever `commit` does there meanwhile. ValueError naming the file.

    Nothing has been read but the manifest, which must list just the files `names`, or those of one of `others`; without, those that it
    lists are the ones.
    """
    with ExitStack() as stack:
        for _ in range(_TRIES):
            attempt = stack.enter_context(ExitStack())
            text, entries = _manifest_text(directory, manifest, names, *others)
            files = {}
            for name in entries:
                with error_prefix(str(directory / name), ValueError):
                    stream = attempt.enter_context(_open(directory, manifest, name))
                if _manifest_text(directory, manifest, names, *others)[0] != text:
                    break
                with error_prefix(str(directory / name), ValueError):
                    files[name] = Sealed(directory / name, stream, entries[name])
            else:
                break
            attempt.close()
        else:
            raise ValueError(f"{directory}: expected files at rest, but others were saved there {_TRIES} times while these were opened")
        yield files


def _manifest_text(
    directory: Path, manifest: str, names: Sequence[str] | None, *others: Sequence[str]
) -> tuple[bytes, dict[str, dict[str, Any]]]:
    with error_prefix(str(directory / manifest), ValueError):
        with _open(directory, manifest, manifest) as stream:
            text = stream.read(_MOST_TEXT + 1)
        entries = _entries(text)
        if names is not None and all(sorted(entries) != sorted(one) for one in (names, *others)):
            raise ValueError(f"expected the files {sorted(names)}, got {sorted(entries)!r:.200}")
        return text, entries


def _entries(text: bytes) -> dict[str, dict[str, Any]]:
    """What a manifest says of each file. ValueError unless it is one."""
    if len(text) > _MOST_TEXT:
        raise ValueError(f"expected at most {_MOST_TEXT} bytes, got more")
    entries = json_object(text.decode("utf-8")).get("files")
    if not isinstance(entries, dict):
        raise ValueError('expected "files", an object of names')
    for name, entry in entries.items():
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise ValueError(f"expected names of files in its directory, got {name!r:.100}")
        if not isinstance(entry, dict) or type(entry.get("size")) is not int or type(entry.get("sha256")) is not str:
            raise ValueError(f"{name!r}: expected its size and its sha256, got {entry!r:.100}")
    return entries


def _open(directory: Path, manifest: str, name: str) -> BufferedReader:
    """`name`, where `commit` put it: beside the manifest that waits, or in its place."""
    pending = _pending(directory, manifest)
    if pending.is_dir() and not pending.is_symlink():
        with suppress(FileNotFoundError):
            return _open_regular(pending / name)
    try:
        return _open_regular(directory / name)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError("expected a regular file, found none") from None


def _open_regular(file: Path) -> BufferedReader:
    """Open a file for reading; ValueError for a link, which may lead anywhere, and for what blocks or acts when it is opened."""
    _regular(os.lstat(file).st_mode)
    stream = open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
    try:
        _regular(os.fstat(stream.fileno()).st_mode)
    except BaseException:
        stream.close()
        raise
    return stream


def _regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        raise ValueError(f"expected a regular file, got {kinds.get(stat.S_IFMT(mode), 'a device')}")


def unchanged(directory: Path, manifest: str) -> bool:
    """Whether the directory holds what its manifest lists, as it lists it, and nothing else."""
    try:
        with _open_regular(directory / manifest) as stream:
            entries = _entries(stream.read(_MOST_TEXT + 1))
        return {file.name for file in directory.iterdir()} == {*entries, manifest} and all(
            (directory / name).lstat().st_size == entry["size"] and _digest(directory / name) == entry["sha256"]
            for name, entry in entries.items()
        )
    except (OSError, ValueError, RecursionError):
        return False


def _digest(file: Path) -> str:
    with error_prefix(file.name), _open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_object(text: str) -> dict[str, Any]:
    """A JSON object none of whose objects has a key twice; ValueError otherwise."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("expected each key once in a JSON object, got one twice")
        return values

    values = json.loads(text, object_pairs_hook=unique)
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, got {type(values).__name__}")
    return values
