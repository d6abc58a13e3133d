"""The benchmark of whole training steps runs at toy sizes, keeps what it measured and says what failed."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import apt_ext

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "roberta": ["roberta", "roberta-compiled"],
    "llama": ["llama", "llama-graphed", "llama-cut-graphed"],
    "7b": ["7b", "7b-graphed", "7b-cut-graphed"],
    "dropout": ["roberta-dropout", "roberta-dropout-compiled", "llama-dropout"],
    "friends": ["compile", "checkpointing", "without-liger"],
    "events": ["roberta-events", "llama-events"],
}
GOALS = ("| LLaMA-1.1B, GraphedStep over PEFT", "| LLaMA-1.1B over PEFT, both eager")
PARTS = [part for parts in CASES.values() for part in parts]


@pytest.fixture
def steps(monkeypatch):
    for library in ("peft", "transformers"):
        pytest.importorskip(library)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import steps

    return steps


def run(steps, monkeypatch, *arguments, **how):
    monkeypatch.setattr(sys, "argv", ["steps.py", *map(str, arguments)])
    steps.main(**how)


def kept(path):
    return json.loads(path.read_text())


def test_the_cases_and_their_parts(steps):
    assert {case: list(parts) for case, parts in steps.PARTS.items()} == CASES


@pytest.mark.parametrize("name", PARTS)
def test_every_part_is_measured(steps, monkeypatch, tmp_path, name):
    steps.run_part(name, True, tmp_path / "part.json")
    part, plan = kept(tmp_path / "part.json"), steps.ALL[name]
    assert part["failed"] == [] and part["commit"] and part["versions"]["peft"]
    assert part["sizes"]["hidden_size"] == 32
    assert part["liger_kernel"]["version"] is None and part["liger_kernel"]["absent"]
    wanted = [(group, one.kind, one.way, one.form) for group, ones in plan.groups.items() for one in ones]
    if plan.stages:
        ways, stages = ("eager", "compile", "reduce-overhead"), ("dense", "masked", "cut")
        wanted += [("compiled", "apt_ext", way, stage) for stage in stages for way in ways]
        by_stage = {row["form"]: row["graphs compiled"] for row in part["rows"] if row["way"] == "compile"}
        assert by_stage["dense"] > 0 and by_stage["masked"] == 0 and by_stage["cut"] > 0
    assert [(row["group"], row["kind"], row["way"], row["form"]) for row in part["rows"]] == wanted
    assert all(len(row["seconds"]["rounds"]) == 2 and row["seconds"]["median"] > 0 for row in part["rows"])
    for row in part["rows"]:
        assert (row["graph"] is None) == (row["way"] != "GraphedStep")
        assert row["graph"] is None or "CUDA" in row["graph"]["reason"]
    if plan.merges:
        rounds = {kind: len(found["rounds"]) for kind, found in part["merge_and_unload"].items()}
        assert rounds == {"PEFT": 3, "apt_ext": 3}
    if plan.events:
        for run in part["runs"].values():
            last = run["history"][-1]["kept"]
            assert len(run["history"]) > 1 and last["0.neurons"] == 32
            assert last["0.heads"] == (2 if "roberta" in name else 1)
            assert all(len(run[each]["seconds"]["rounds"]) >= 3 for each in ("before", "events", "after"))


@pytest.mark.parametrize("name", ["llama", "roberta"])
def test_forms_are_what_they_are_called(steps, name):
    from whole import models
    from whole.works import WORKS

    work, device = WORKS[name].smoke(), torch.device("cpu")
    counts = {}
    for form in models.FORMS:
        model, _ = models.build("apt_ext", work, device, form, dropout=0.25)
        compacted = {adapter.compacted for _, adapter in apt_ext.adapters(model)}
        assert compacted == {form in ("compact", "chain")}
        blocks = [block for block in model.blocks if block != "hidden"]
        counts[form] = {block: int(model.get_block_mask(block).sum()) for block in blocks}
        assert {adapter.dropout for _, adapter in apt_ext.adapters(model) if adapter.rank} == {0.25}
    heads = counts["dense"]["0.heads"]
    assert counts["dense"]["0.neurons"] == 64 and heads in (2, 4)
    halved = {"0.heads": heads // 2, "0.neurons": 32}
    assert all(count == halved for form, count in counts.items() if form != "dense")
    assert models.build("apt_ext", work, device, "cut")[0].blocks["0.neurons"].count == 32


def test_every_goal_is_of_parts_that_measure_it(steps):
    """Where all is measured nothing is missing."""
    parts = {}
    for name, part in steps.ALL.items():
        rows = [
            {**asdict(one), "group": group, "seconds": {"median": 2.0}, "peak": 4, "graph": None}
            for group, ones in part.groups.items()
            for one in ones
        ]
        merges = {kind: {"median": 1.0} for kind in ("PEFT", "apt_ext")} if part.merges else {}
        parts[name] = {"rows": rows, "failed": [], "merge_and_unload": merges}
    assert {goal["measured"] for goal in steps.reach.reached(parts)} == {1.0}
    for name, table in steps.tables.TABLES.items():
        if name not in ("steps-compiled", "steps-origin", "steps-speed"):
            assert "not measured" not in table(parts), name


def test_what_fails_costs_nothing_else_and_is_said(steps, monkeypatch, tmp_path, capsys):
    """One that cannot be built, and one that fails when its turn comes."""
    from whole import contenders

    build, turns = contenders.models.build, []

    def broken(kind, work, device, form="dense", *more):
        if form == "chain":
            raise torch.OutOfMemoryError("no room")
        return build(kind, work, device, form, *more)

    class Failing(contenders.Guarded):
        def __init__(self, step):
            turns.append(self)
            super().__init__(step if len(turns) != 2 else lambda: 1 / 0)

    monkeypatch.setattr(contenders.models, "build", broken)
    monkeypatch.setattr(contenders, "Guarded", Failing)
    path = tmp_path / "steps.json"
    words = "(?s)half: chain failed: OutOfMemoryError: no room.*PEFT failed: ZeroDivisionError"
    with pytest.raises(SystemExit, match=words):
        run(steps, monkeypatch, "--smoke", "--only", "roberta", "--json", path, start=steps.run_part)
    parts = kept(path)["parts"]
    assert {(each["group"], each["what"]) for each in parts["roberta"]["failed"]} == {
        ("eager", "apt_ext, half: chain"),
        ("eager", "PEFT"),
        ("graphed", "apt_ext, half: chain, GraphedStep"),
    }
    found = [(row["group"], row["kind"], row["form"]) for row in parts["roberta"]["rows"]]
    ours = [("apt_ext", form) for form in ("dense", "compact", "cut")]
    eager = [("eager", *each) for each in [("full", "dense"), *ours]]
    assert found == eager + [("graphed", *each) for each in ours]
    assert len(parts["roberta-compiled"]["rows"]) == 3 and parts["roberta-compiled"]["failed"] == []
    assert "no room" in capsys.readouterr().out


def test_a_signal_ends_it_and_what_was_measured_stays(steps, monkeypatch, tmp_path):
    path, begun = tmp_path / "steps.json", []

    def ended(name, smoke, beside):
        begun.append(name)
        if name == "llama-graphed":
            beside.write_text(json.dumps({"rows": [], "failed": [], "kept": "before the end"}))
            raise SystemExit("a signal")
        steps.run_part(name, smoke, beside)

    with pytest.raises(SystemExit, match="llama-graphed, the whole part failed: ended by a signal"):
        run(steps, monkeypatch, "--smoke", "--only", "llama", "--json", path, start=ended)
    parts = kept(path)["parts"]
    assert begun == ["llama", "llama-graphed"] and len(parts["llama"]["rows"]) == 6
    assert parts["llama-graphed"]["kept"] == "before the end"
    assert parts["llama-graphed"]["failed"][0]["error"] == "ended by a signal"


def test_other_parts_stay_in_the_file_and_ratios_are_of_one_group(steps, monkeypatch, tmp_path):
    path = tmp_path / "steps.json"
    path.write_text(json.dumps({"parts": {"roberta": {"rows": [], "failed": []}}}))
    run(steps, monkeypatch, "--smoke", "--only", "7b", "--json", path, start=steps.run_part)
    content = kept(path)
    assert content["parts"].keys() == {"roberta", "7b", "7b-graphed", "7b-cut-graphed"}
    assert content["parts"]["7b"]["command"] == "python benchmarks/steps.py --only 7b --smoke"
    rows = content["parts"]["7b"]["rows"]
    seconds = {(row["kind"], row["form"]): row["seconds"]["median"] for row in rows}
    goals = {(goal["what"], goal["column"]): goal for goal in content["reach"]}
    dense = goals["LLaMA-2-7B over PEFT, both eager", "dense"]
    assert dense["measured"] == seconds["apt_ext", "dense"] / seconds["PEFT", "dense"]
    half = goals["LLaMA-2-7B over PEFT, both eager", "half of heads and neurons"]
    assert half["measured"] == seconds["apt_ext", "cut"] / seconds["PEFT", "dense"]
    assert (half["wanted"], half["aimed"], dense["wanted"], dense["aimed"]) == (0.51, 0.48, 0.90, 0.86)
    graphed = goals["LLaMA-2-7B, GraphedStep over PEFT", "dense"]
    assert graphed["measured"] is None and graphed["why"] == "ran eagerly"  # there is no GPU
    others = [goal for (what, _), goal in goals.items() if "7B" not in what]
    assert others and all(goal["measured"] is None and goal["why"] == "not measured" for goal in others)


def test_a_part_has_a_process_of_its_own(steps, monkeypatch, tmp_path):
    """A real one, whose end is said where it was none."""
    path = tmp_path / "steps.json"
    run(steps, monkeypatch, "--smoke", "--only", "without-liger", "--json", path)
    part = kept(path)["parts"]["without-liger"]
    assert part["failed"] == [] and len(part["rows"]) == 7
    monkeypatch.setattr(steps.sys, "executable", "/bin/false")
    with pytest.raises(SystemExit, match="the whole part failed: the process ended with 1"):
        run(steps, monkeypatch, "--smoke", "--only", "without-liger", "--json", path)
    assert [file.name for file in tmp_path.iterdir()] == ["steps.json"]


def row(kind, form, seconds, peak, way="eager", group="eager", graph=None):
    from whole.contenders import Contender

    fields = asdict(Contender(kind, way, form))
    return {"group": group, **fields, "seconds": {"median": seconds}, "peak": peak, "graph": graph}


@pytest.fixture
def measured(steps, tmp_path):
    """A file in which LLaMA was measured, and of RoBERTa one row."""
    llama = [row("PEFT", "dense", 1.0, 100 << 28), row("apt_ext", "dense", 0.85, 99 << 28)]
    llama += [row("apt_ext", "cut", 0.47, 63 << 28)]
    eager = {"graphed": False, "reason": "a host that waits"}
    graphed = [row("PEFT", "dense", 1.5, 1), row("apt_ext", "dense", 1.2, 1, "GraphedStep", graph=eager)]
    graph = {"graphed": True, "reason": None}
    half = [row("PEFT", "dense", 0.9, 1), row("apt_ext", "cut", 0.45, 1, "GraphedStep", graph=graph)]
    roberta = [row("PEFT", "dense", 0.01, 1 << 29, "reduce-overhead")]
    parts = {"llama": {"rows": llama, "failed": [], "device": "H200", "model": "LLaMA-1.1B"}}
    parts["roberta-compiled"] = {"rows": roberta, "failed": [], "device": "H200", "model": "RoBERTa-base"}
    parts |= {"llama-graphed": {"rows": graphed}, "llama-cut-graphed": {"rows": half}}
    path = tmp_path / "steps.json"
    path.write_text(json.dumps({"parts": parts}))
    return path


def test_the_report_says_what_was_reached(steps, monkeypatch, measured, capsys):
    run(steps, monkeypatch, "--report", "--json", measured)
    what = "LLaMA-1.1B over PEFT, both eager"
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(what)]
    said = [" ".join(line.removeprefix(what).split()) for line in lines]
    assert said == [
        "dense 0.850 0.87 0.83 reached",
        "half of heads and neurons 0.470 0.53 0.48 as aimed at",
        "peak memory, half 0.630 0.62 0.58 missed",
    ]


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ("steps-llama", "| apt_ext | 850 | ran eagerly | 24.8 | ran eagerly |"),
        ("steps-llama", "| half: `cut()` | 470 | 450 | 15.8 | 0.00 |"),
        ("steps-llama", "| half: `compact()` | not measured |  | not measured |  |"),
        ("steps-llama", "| PEFT | 1000 |  | 25.0 |  |"),
        ("steps-roberta", "| PEFT | not measured | 10.0 | not measured | 0.50 |"),
        ("steps-7b", "| PEFT | not measured |  | not measured |  |"),
        (
            "steps-liger",
            "| half: `cut()` | 470 | not measured | not measured | 15.8 | not measured | not measured |",
        ),
        ("steps-goals", GOALS[0] + " | ran eagerly (0.87; 0.83) | 0.500 (0.53; 0.48) | 1.000 (0.62; 0.58) |"),
        ("steps-goals", GOALS[1] + " | 0.850 (0.87; 0.83) | 0.470 (0.53; 0.48) | 0.630 (0.62; 0.58) |"),
    ],
)
def test_tables_are_of_the_file_and_say_what_is_missing(steps, monkeypatch, measured, part, line):
    import report

    monkeypatch.setattr(report, "RESULTS", measured.parent)
    text = report.updated(f"<!-- bench steps.json {part} -->\nold\n<!-- end -->\n")
    assert line in text.splitlines() and "old" not in text


def test_the_words_of_the_readme_are_of_the_file(steps, measured):
    words = " ".join(steps.tables.speed(kept(measured)["parts"]).split())
    assert "takes 0.85 of the time of PEFT's LoRA" in words and "RoBERTa" not in words
    assert "takes 0.47 of that time and 0.63 of the memory" in words
    assert steps.tables.speed({}) == "Whole steps: not measured.\n"


def test_unknown_cases_are_refused(steps, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(steps, monkeypatch, "--smoke", "--only", "7b", "lora")
    said = capsys.readouterr().err
    assert "--only: expected some of roberta, llama, 7b, dropout, friends, events, roberta-compiled," in said
    assert "got lora" in said
