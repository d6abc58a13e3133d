"""Checkpoints changed by chance, and by somebody who knows the format: refused, or a sound adapter."""

import json
import random
import shutil
import struct

import pytest
import torch
from forged import FILES, MANIFEST, TENSORS, load, parts, same, write_tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apt_ext.adapter.layer import APTAdapter
from apt_ext.common.stock_class import own_class
from apt_ext.model import APTModel


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("count", [150, pytest.param(None, marks=pytest.mark.slow)])
def test_no_changed_byte_is_loaded(bad, good, file, count):
    content = (good / file).read_bytes()
    positions = range(len(content)) if count is None else sorted(random.Random(0).sample(range(len(content)), min(count, len(content))))
    for position in positions:
        for change in (0x01, 0x80, 0x15) if count is None else (1 << position % 8,):
            (bad / file).write_bytes(content[:position] + bytes([content[position] ^ change]) + content[position + 1 :])
            # A version or a blank of the manifest may read differently; what it guards may not.
            assert isinstance(load(bad), ValueError) or (file == MANIFEST and same(bad, good)), position


@pytest.mark.parametrize("file", FILES)
def test_no_shortened_or_lengthened_file_is_loaded(bad, good, file):
    content = (good / file).read_bytes()
    for size in sorted({*range(0, len(content), 41), len(content) - 1}):
        (bad / file).write_bytes(content[:size])
        assert isinstance(load(bad), ValueError) or not content[size:].strip()
    (bad / file).write_bytes(content + b"\0")
    assert isinstance(load(bad), ValueError)


SMALL = st.integers(-2, 8) | st.sampled_from([2**31, 2**53, 2**63, 2**64, -(2**63)])
ODD = st.none() | st.booleans() | SMALL | st.floats() | st.text(max_size=4) | st.lists(SMALL, max_size=3)
DTYPES = st.sampled_from(["F64", "F32", "F16", "BF16", "I64", "I8", "BOOL", "F8_E4M3", "C64", "U16", "f64", ""])


@st.composite
def mutated(draw, content):
    """A tensor file with a few meant changes: of names, types, shapes, places and values."""
    header, data = parts(content)
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        names = sorted(header)
        name = draw(st.sampled_from(names))
        entry = header[name]
        action = draw(
            st.sampled_from(["dtype", "shape", "dim", "offsets", "swap", "drop", "rename", "copy", "entry", "bytes", "cut", "nan"])
        )
        if action == "bytes" or action == "nan":
            at = draw(st.integers(0, max(len(data) - 8, 0)))
            data[at : at + 8] = struct.pack("<d", float("nan")) if action == "nan" else draw(st.binary(min_size=8, max_size=8))
        elif action == "cut":
            data = data[: draw(st.integers(0, len(data)))] + draw(st.binary(max_size=9))
        elif action == "drop":
            del header[name]
        elif action == "rename":
            header[draw(st.text(max_size=5) | st.sampled_from(["../x", "0.lora_C", "0.rank.x", "1.weight"]))] = header.pop(name)
        elif action == "entry":
            header[name] = draw(ODD)
        elif action in ("swap", "copy"):
            other = draw(st.sampled_from(names))
            header[name], header[other] = header[other], header[name if action == "swap" else other]
        elif isinstance(entry, dict):
            if action == "dtype":
                entry["dtype"] = draw(DTYPES | ODD)
            elif action == "shape":
                entry["shape"] = draw(st.lists(SMALL, max_size=3) | ODD)
            elif action == "dim" and isinstance(entry.get("shape"), list) and entry["shape"]:
                entry["shape"] = [draw(SMALL), *entry["shape"][1:]]
            elif action == "offsets":
                entry["data_offsets"] = draw(st.lists(SMALL, min_size=2, max_size=2) | ODD)
    return json.dumps(header).encode("utf-8", "surrogatepass"), bytes(data)


def judge(directory, good, mutation):
    """Refused, or an adapter that keeps every promise it makes of its state."""
    shutil.copytree(good, directory, dirs_exist_ok=True)
    write_tensors(directory, *mutation)
    loaded = load(directory)
    if isinstance(loaded, APTModel):
        adapter = loaded.model[0]
        assert type(adapter) is APTAdapter and 0 <= adapter.rank <= 5
        assert adapter.lora_A.shape == (adapter.rank, 6) and adapter.lora_B.shape == (5, adapter.rank)
        assert all(bool(((mask >= 0) & (mask <= 1)).all()) and mask.dtype == torch.float32 for mask in (adapter.mask_in, adapter.mask_out))
        assert loaded.model[1].weight.shape == (4, 5) and loaded.model[1].weight.dtype == torch.float64
        with torch.no_grad():
            assert loaded(torch.ones(2, 6, dtype=torch.float64)).shape == (2, 4)
    return loaded


@pytest.mark.parametrize("examples", [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_what_a_forger_can_write_is_refused_or_a_sound_adapter(good, tmp_path, examples):
    content = (good / TENSORS).read_bytes()
    seen = set()

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(mutated(content))
    def forge(mutation):
        seen.add(type(judge(tmp_path / "forged", good, mutation)))

    forge()
    assert {own_class(kind) for kind in seen} == {ValueError, APTModel}  # the changes are neither all fatal nor all harmless
