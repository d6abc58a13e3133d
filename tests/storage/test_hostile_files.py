"""A checkpoint from anywhere: whatever its files hold or are, a ValueError names one, or what was saved is loaded."""

import json
import os
import shutil
import signal
import socket
import struct
import time
import tracemalloc

import pytest
import safetensors.torch
import torch
from forged import CONFIG, FILES, MANIFEST, TENSORS, base, load, parts, refused, reseal, same, write_tensors

from apt_ext.model import APTModel
from apt_ext.storage import atomic_dir


@pytest.fixture(autouse=True)
def _no_hang():
    """What blocks, as a FIFO does, is interrupted."""

    def stop(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# -- what is not a file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["link out", "link in", "link nowhere", "directory", "FIFO", "socket", "device"])
def test_only_regular_files_are_opened(bad, tmp_path, file, kind, monkeypatch):
    path, kept = bad / file, tmp_path / "kept"
    path.rename(kept)
    if kind == "link out":
        path.symlink_to(kept)
    elif kind == "link in":
        kept.rename(bad / "kept")
        path.symlink_to("kept")
    elif kind == "link nowhere":
        path.symlink_to("nowhere")
    elif kind == "directory":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            monkeypatch.chdir(bad)  # its path may have 107 characters
            server.bind(file)
    elif os.getuid() == 0:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # the one that never ends: /dev/zero
    else:
        pytest.skip("only root makes device nodes")
    word = {"link": "a symbolic link", "directory": "a directory", "FIFO": "a FIFO", "socket": "a socket", "device": "a device"}[
        kind.split()[0]
    ]
    refused(bad, file, f"expected a regular file, got {word}")


def test_a_file_that_becomes_a_link_while_it_is_opened_is_not_followed(bad, tmp_path, monkeypatch):
    lstat = os.lstat

    def swapped(path, *args, **kwargs):
        result = lstat(path, *args, **kwargs)
        if str(path) == str(bad / TENSORS):
            (bad / TENSORS).rename(tmp_path / "kept")
            (bad / TENSORS).symlink_to(tmp_path / "kept")
        return result

    monkeypatch.setattr(os, "lstat", swapped)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        APTModel.from_pretrained(base(), bad)


@pytest.mark.parametrize("what", ["link", "file", "empty", "stranger"])
def test_a_forged_place_for_waiting_files(bad, good, tmp_path, what):
    """The hidden directory where a save leaves what it had no time to move."""
    waiting, other = bad / f".{MANIFEST}.new", tmp_path / "other"
    shutil.copytree(good, other)
    (other / CONFIG).write_text("{}")
    if what == "link":
        waiting.symlink_to(other)
    elif what == "file":
        waiting.touch()
    elif what == "empty":
        waiting.mkdir()
    else:
        waiting.mkdir()
        (waiting / "train.log").write_text("forged")
        (bad / "train.log").write_text("mine")
    assert same(bad, good)
    apt = load(bad)
    if what == "empty":
        apt.save_pretrained(bad)
        assert not waiting.exists()
    else:
        with pytest.raises(OSError, match=r"Not a directory|Too many levels|not empty"):
            apt.save_pretrained(bad)
    assert same(bad, good) and (other / CONFIG).read_text() == "{}" and (what != "stranger" or (bad / "train.log").read_text() == "mine")


@pytest.mark.parametrize("change", ["shrinks", "is written to"])
def test_a_file_that_changes_after_it_was_opened(bad, monkeypatch, change):
    header, data = parts((bad / TENSORS).read_bytes())
    write_tensors(bad, json.dumps(header).encode() + b" " * 500_000, data)  # larger than any buffer
    size = (bad / TENSORS).stat().st_size
    read, calls = atomic_dir.Sealed.read, []

    def changed(self, count):
        calls.append(count)
        if len(calls) == 2:  # the configuration, then the tensors
            os.truncate(bad / TENSORS, size - 300)
            if change == "is written to":
                os.truncate(bad / TENSORS, size)
        return read(self, count)

    monkeypatch.setattr(atomic_dir.Sealed, "read", changed)
    error = load(bad)
    monkeypatch.undo()
    assert isinstance(error, ValueError) and {"shrinks": "got fewer", "is written to": "with SHA-256"}[change] in str(error), error


# -- manifests -------------------------------------------------------------------------------------------------------------


def manifest_with(change):
    def damage(directory):
        values = json.loads((directory / MANIFEST).read_text())
        change(values["files"])
        (directory / MANIFEST).write_text(json.dumps(values))

    return damage


def sized(size):
    return manifest_with(lambda files: files[TENSORS].update(size=size))


def manifest_of(text):
    return lambda directory: (directory / MANIFEST).write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize(
    ("damage", "file", "words"),
    [
        (manifest_of(""), MANIFEST, "Expecting"),
        (manifest_of(b"\xff\xfe{}"), MANIFEST, "utf-8"),
        (manifest_of("[]"), MANIFEST, "expected a JSON object, got list"),
        (manifest_of("{}"), MANIFEST, 'expected "files"'),
        (manifest_of('{"files": []}'), MANIFEST, 'expected "files"'),
        (manifest_of('{"files": {}, "files": {}}'), MANIFEST, "each key once"),
        (manifest_of('{"files": {}}'), MANIFEST, f"expected the files ['{CONFIG}', '{TENSORS}'], got []"),
        (manifest_of("[" * 100_000), MANIFEST, "recursion"),
        (manifest_of('{"files": {"x": {"size": ' + "9" * 10_000 + "}}}"), MANIFEST, "digits"),
        (manifest_of(" " * 2_000_000), MANIFEST, "at most 1048576 bytes"),
        (manifest_with(lambda files: files.update({"../" + TENSORS: files.pop(TENSORS)})), MANIFEST, f"directory, got '../{TENSORS}'"),
        (manifest_with(lambda files: files.update({"/etc/passwd": files[TENSORS]})), MANIFEST, "directory, got '/etc/passwd'"),
        (manifest_with(lambda files: files.update({"x": files[TENSORS]})), MANIFEST, f"got ['{CONFIG}', '{TENSORS}', 'x']"),
        (manifest_with(lambda files: files.pop(CONFIG)), MANIFEST, f"got ['{TENSORS}']"),
        (manifest_with(lambda files: files.update({CONFIG: 1})), MANIFEST, "expected its size and its sha256, got 1"),
        *((sized(size), MANIFEST, "its size") for size in (True, "9", 1.0, None)),
        *((sized(size), TENSORS, f"expected {size} bytes") for size in (-1, 0, 2**64)),
        (manifest_with(lambda files: files[TENSORS].update(sha256=None)), MANIFEST, "its sha256"),
        (manifest_with(lambda files: files[TENSORS].update(sha256="0" * 64)), TENSORS, "expected content with SHA-256 000"),
        (manifest_with(lambda files: files[CONFIG].update(sha256="0" * 64)), CONFIG, "expected content with SHA-256 000"),
    ],
)  # fmt: skip
def test_a_manifest_that_is_none(bad, damage, file, words):
    damage(bad)
    refused(bad, file, words)


# -- headers ---------------------------------------------------------------------------------------------------------------


def empty_tensors(count):
    return {f"n{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(count)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda header: header.update(empty_tensors(100_000)), "bytes that this model explains"),
        (lambda header: header.update(empty_tensors(9_000)), "9000 unknown"),
        (lambda header: header["0.lora_A"].update(shape=[0, 2**40]), "invalid shape, data type, or offset"),
        (lambda header: header["0.lora_A"].update(shape=[2**62, 6]), "overflow"),
        (lambda header: header["1.weight"].update(shape=[1] * 3000), "invalid shape, data type, or offset"),
        (lambda header: header["1.weight"].update(shape=None), "invalid type: null"),
        (lambda header: header["1.weight"].update(shape=[4.0, 5.0]), "invalid type: floating point"),
        (lambda header: header["1.weight"].update(dtype="F4"), "type"),
        (lambda header: header["1.weight"].update(dtype="I64"), "1.weight: expected dtype torch.float64, got torch.int64"),
        (lambda header: header["0.mask_in"].update(data_offsets=[0, 24]), "."),
        (lambda header: header["1.weight"].update(data_offsets=[-1, 159]), "."),
        (lambda header: header["1.weight"].update(data_offsets=[2**63, 2**63 + 160]), "."),
        (lambda header: header["1.weight"].pop("data_offsets"), "data_offsets"),
        (lambda header: header.update({"../../x": header.pop("1.weight")}), "1 unknown ['../../x']"),
        (lambda header: header.update({"foo": {"dtype": "F4", "shape": [0], "data_offsets": [0, 0]}}), "expected a safetensors file"),
        (lambda header: header.update({"__metadata__": {"format": 3}}), "."),
        (lambda header: header.update({"__metadata__": [[]]}), "."),
    ],
)  # fmt: skip
def test_a_header_that_asks_for_something_else(bad, change, words):
    header, data = parts((bad / TENSORS).read_bytes())
    change(header)
    write_tensors(bad, header, data)
    refused(bad, TENSORS, words)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64], ids=str)
def test_a_dtype_that_no_module_here_has(bad, dtype):
    tensors = safetensors.torch.load((bad / TENSORS).read_bytes())
    (bad / TENSORS).write_bytes(safetensors.torch.save({**tensors, "1.weight": tensors["1.weight"].to(dtype)}))
    reseal(bad)
    refused(bad, TENSORS, f"1.weight: expected dtype torch.float64, got {dtype}")


@pytest.mark.parametrize("where", ["behind", "before"])
def test_bytes_that_belong_to_no_tensor_are_refused(bad, where):
    """Else one file could be two things."""
    header, data = parts((bad / TENSORS).read_bytes())
    if where == "before":
        for entry in header.values():
            if "data_offsets" in entry:
                entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]
    write_tensors(bad, header, data + bytes(8) if where == "behind" else bytes(8) + data)
    refused(bad, TENSORS, "file not fully covered" if where == "behind" else "invalid offset for tensor")


def test_bytes_of_two_tensors_are_refused(bad):
    header, data = parts((bad / TENSORS).read_bytes())
    header["0.mask_in"]["data_offsets"] = [offset - 4 for offset in header["0.mask_in"]["data_offsets"]]
    write_tensors(bad, header, data)
    refused(bad, TENSORS, "invalid offset for tensor `0.mask_in`")


def test_text_before_a_header_is_refused(bad):
    header, data = parts((bad / TENSORS).read_bytes())
    write_tensors(bad, b" " + json.dumps(header).encode(), data)
    refused(bad, TENSORS, "which begins with '{'")


def test_a_flag_is_true_or_false(bad):
    header, data = parts((bad / TENSORS).read_bytes())
    at = header["0.merged"]["data_offsets"][0]
    write_tensors(bad, header, data[:at] + b"\x02" + data[at + 1 :])
    refused(bad, TENSORS, "0.merged: expected bytes of 0 and 1")


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**40, 2**63, 2**64 - 1])
def test_a_length_that_lies(bad, length):
    content = (bad / TENSORS).read_bytes()
    (bad / TENSORS).write_bytes(struct.pack("<Q", length) + content[8:])
    reseal(bad)
    refused(bad, TENSORS, ".")


@pytest.mark.parametrize("file", FILES)
def test_memory_and_time_are_bounded_by_what_the_model_explains(bad, file):
    """A tebibyte that takes no room on the disk, and a manifest that says so: hashing it would take an hour."""
    os.truncate(bad / file, 2**40)
    if file != MANIFEST:
        manifest_with(lambda files: files[file].update(size=2**40))(bad)
    load(bad)  # what torch imports at first use is not counted
    tracemalloc.start()
    begin = time.perf_counter()
    error = load(bad)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(error, ValueError) and "at most" in str(error), error
    assert peak < 8 << 20 and time.perf_counter() - begin < 10


def test_files_are_closed_whatever_was_wrong_with_them(bad):
    before = len(os.listdir("/proc/self/fd"))
    (bad / TENSORS).write_bytes(b"x")
    for _ in range(20):
        refused(bad, TENSORS, "expected")
    assert len(os.listdir("/proc/self/fd")) == before
