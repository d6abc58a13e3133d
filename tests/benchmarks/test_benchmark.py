"""The benchmark's own promises: what it measures is kept whatever fails, and the document's tables are those of the kept results."""

import json
import mmap
import sys
from pathlib import Path

import pytest
import torch

import apt_ext

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench

    return bench


def run(bench, monkeypatch, *arguments):
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, arguments)])
    try:
        bench.main()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("number", range(5))
def test_the_tables_of_the_documents_are_those_of_the_kept_results(bench, number):
    text = bench.report.DOCUMENTS[number].read_text()
    assert bench.report.MARKED.findall(text), "no marked sections"
    assert bench.report.updated(text) == text, "run `python benchmarks/bench.py --report`"


def test_a_marked_section_follows_its_file(bench, monkeypatch, tmp_path):
    kept = json.loads((bench.report.RESULTS / "cpu-float32.json").read_text())
    row = next(row for row in kept["rows"] if row["work"] == "forward" and row["peer"] == "apt none")
    row["ratio"] = 7.77
    (tmp_path / "cpu-float32.json").write_text(json.dumps(kept))
    monkeypatch.setattr(bench.report, "RESULTS", tmp_path)
    text = "before\n<!-- bench cpu-float32.json layers -->\nold\n<!-- end -->\nafter\n"
    new = bench.report.updated(text)
    assert "7.77" in new and "old" not in new and new.startswith("before\n") and new.endswith("\nafter\n")


@pytest.mark.parametrize("name", ["cpu-float32.json", "cpu-bfloat16.json"])
def test_kept_results_say_where_they_come_from(bench, name):
    kept = json.loads((bench.report.RESULTS / name).read_text())
    assert kept["failed"] == [] and kept["threads"] == 1 and kept["rounds"] >= 12
    assert kept["commit"] and "dirty" not in kept["commit"]
    assert kept["device"] and name in kept["command"]
    layers = [row for row in kept["rows"] if "forward" in row["work"]]
    assert layers and all(row["faults"] < 16 for row in layers), "fresh pages were timed, not the peers"


def test_a_case_that_fails_costs_no_other(bench, monkeypatch, tmp_path, capsys):
    def broken(*arguments):
        yield {"work": "forward", "peer": "none"}
        raise OSError("no compiler")

    monkeypatch.setattr(bench, "compiled_rows", broken)
    path = tmp_path / "out.json"
    with pytest.raises(SystemExit, match=r"compiled of 1024, 768, 768, 16, .* failed: OSError: no compiler"):
        run(bench, monkeypatch, "--device", "cpu", "--quick", "--rounds", 2, "--threads", 1, "--only", "compiled,memory", "--json", path)
    kept = json.loads(path.read_text())
    assert [f["part"] for f in kept["failed"]] == ["compiled"] and set(kept["seconds"]) == {"compiled", "memory"}
    assert {row["work"] for row in kept["rows"]} == {"merge_: extra memory"}
    taken = {row["peer"]: row["bytes"] for row in kept["rows"]}
    assert taken["W.addmm_(B, A)"] == 0 and taken["W += s (B @ A)"] >= 2 * 4 * 1024 * 1024
    assert 0 < taken["merge_ check=False"] <= 2 << 20  # a block of rows and the factors, never W's 4 MiB
    assert "merge_ check=True" in capsys.readouterr().out


def test_a_peer_that_takes_fresh_pages_is_seen(bench):
    """The row says so, whatever the allocator does: 16 MiB from the system, and every page of it touched."""

    def fresh():
        with mmap.mmap(-1, 1 << 24) as memory:
            memory[:: mmap.PAGESIZE] = bytes((1 << 24) // mmap.PAGESIZE)

    times = bench.measure({"base": lambda: None, "fresh": fresh}, 3, "cpu", 2)
    rows = {row["peer"]: row for row in bench.rows_of(times, "base")}
    assert rows["fresh"]["faults"] >= 8 and rows["base"]["faults"] < 8 and rows["fresh"]["seconds"] > rows["base"]["seconds"]


def test_an_unknown_part_is_refused(bench, monkeypatch):
    with pytest.raises(SystemExit, match="expected some of layers, .*got gemm"):
        run(bench, monkeypatch, "--device", "cpu", "--only", "gemm")


def test_the_stages_of_a_call_add_up_to_it(bench, monkeypatch, tmp_path):
    path = tmp_path / "out.json"
    run(bench, monkeypatch, "--device", "cpu", "--rounds", 2, "--threads", 1, "--only", "host-profile", "--json", path)
    rows = json.loads(path.read_text())["rows"]
    levels = {row["peer"]: row["us"] for row in rows if row["work"] == "host profile"}
    stages = {row["peer"]: row["us"] for row in rows if row["work"] == "host profile: stages"}
    without_autograd = sum(us for stage, us in stages.items() if not stage.startswith("autograd"))
    assert without_autograd == pytest.approx(levels["adapter(x), no_grad"])


def test_the_formula_of_every_peer_is_ours(bench):
    """With masks those that have them, without those that have none; forward and gradients."""
    layer = bench.Layer(32, 24, 16, 4, torch.float64, "cpu")
    groups = {"masks": layer.masked, "none": layer.plain}
    for name, (peer, A, B) in layer.peers.items():
        adapter = groups["masks" if "masks" in name else "none"]
        with torch.no_grad():
            for theirs, ours in ((A, adapter.lora_A), (B, adapter.lora_B)):
                theirs.copy_(ours)
        got = peer(layer.leaf)
        weight = layer.W if "PEFT" not in name else peer.base_layer.weight
        masks = (adapter.mask_in.double(), adapter.mask_out.double()) if adapter is layer.masked else (None, None)
        expected = apt_ext.reference.apt_linear(layer.leaf, weight, None, A, B, *masks, adapter.scaling)
        assert torch.allclose(got, expected), name
        grads = torch.autograd.grad(got, (layer.leaf, A, B), layer.grad)
        for one, other in zip(grads, torch.autograd.grad(expected, (layer.leaf, A, B), layer.grad), strict=True):
            assert torch.allclose(one, other), name


@pytest.mark.slow
def test_the_compiled_peer_is_the_formula(bench):
    layer = bench.Layer(32, 24, 16, 4, torch.float32, "cpu")
    theirs = bench.compiled(*layer.formula)(layer.x)
    assert torch.allclose(theirs, bench.naive(*layer.formula)(layer.x), rtol=1e-4, atol=1e-4)


def test_kept_lanes_are_measured_and_drawn(bench, tmp_path):
    """Every peer of a compacted layer and of a training step runs, and the plot takes what comes out."""
    pytest.importorskip("matplotlib")
    import kept

    rows = [*kept.density_rows(8, 16, 24, 2, torch.float32, "both", (0.5, 1.0), "cpu", 2)]
    rows += kept.refresh_rows(16, 24, 2, torch.float32, "cpu", 2)
    rows += kept.step_rows(1, 1, 4, 2, torch.float32, "cpu", 2)
    assert {row["work"] for row in rows} == {
        *(f"{share} of both kept: {kind}" for share in ("50%", "100%") for kind in ("fwd", "f+b")),
        "compact: refresh",
        "step of 1 layers, half kept",
    }
    kept.plot(rows, tmp_path / "kept.png")
    assert (tmp_path / "kept.png").stat().st_size > 1000
