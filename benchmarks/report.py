"""The tables of docs/performance*.md, docs/friends.md, docs/shrink.md and
docs/planning.md, and the README's figures, from
the kept results: what stands between `<!-- bench FILE PART -->` and `<!-- end -->`. FILE may be a pattern, for a
table of several; of tables that are predicted it is "plan".

python benchmarks/bench.py --report
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import aims
import benefit
import beyond
import shrunk
from whole.tables import TABLES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = tuple(
    ROOT / name
    for name in (
        "docs/performance.md",
        "docs/performance-cpu.md",
        "docs/friends.md",
        "docs/shrink.md",
        "README.md",
        "docs/planning.md",
    )
)
BASES = {"frozen", "dense step", "F.linear", "one pass over W", "one copy of the same bytes", "aligned", "PEFT merge"}
MARKED = re.compile(r"(<!-- bench (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head, lines):
    """A Markdown table of these cells."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines]) + "\n"


def origin(data):
    """Where the figures come from, and the command that measures them again."""
    threads = f"{data['threads']} thread{'s' * (data['threads'] != 1)}"
    where = f"{data['device']}, {threads}, torch {data['build']['torch']}, commit {data['commit']}"
    return f"{where}, medians of {data['rounds']} rounds:\n\n    {data['command']}\n\n"


def ratios(rows):
    """Rows of ratios as a table: one line a work, shape and rank, one column a peer; the base, which is 1, is left out."""
    lines, peers = {}, []
    for row in rows:
        case = (row["work"], f"{row['M']}, {row['N']}, {row['K']}", str(row["rank"]))
        of_case = lines.setdefault(case, {})
        if row["peer"] in BASES:
            continue
        of_case[row["peer"]] = f"{row['ratio']:.2f}"
        if row["peer"] not in peers:
            peers.append(row["peer"])
    body = [[*case, *(cells.get(peer, "") for peer in peers)] for case, cells in lines.items()]
    return table(["work", "M, N, K", "rank", *peers], body)


def of(*works):
    """Rows of these works; a name that ends in a colon stands for all that begin with it."""
    begins = tuple(work for work in works if work.endswith(":"))
    return lambda rows: ratios([row for row in rows if row["work"] in works or (begins and row["work"].startswith(begins))])


def memory(rows):
    shown = [row for row in rows if row["work"] == "merge_: extra memory" and row["bytes"] is not None]
    return table(["call", "bytes beyond W, A and B", "of W"], [[r["peer"], f"{r['bytes']:,}", f"{r['of_W']:.2%}"] for r in shown])


def host(rows):
    """The stages that add up to one call, then the yardsticks beside them."""
    levels = {row["peer"]: row["us"] for row in rows if row["work"] == "host profile"}
    stages = [row for row in rows if row["work"] == "host profile: stages"]
    total, linear = levels["adapter(x)"], levels["F.linear"]
    lines = [[row["peer"], f"{row['us']:.2f}", f"{row['us'] / linear:.2f}"] for row in stages]
    lines += [["**adapter(x) with gradients, measured as a whole**", f"{total:.2f}", f"{total / linear:.2f}"]]
    yardsticks = ("adapter(x), no_grad", "F.linear", "x A^T", "y += s t B^T", "empty y", "a module that does nothing")
    lines += [[f"beside it: {name}", f"{levels[name]:.2f}", f"{levels[name] / linear:.2f}"] for name in yardsticks]
    return table(["one call, device idle", "us", "of F.linear"], lines)


def short(rows):
    """The cases that most users meet."""
    peers = {
        "apt none": "apt_ext",
        "apt masks": "apt_ext, masks on both sides",
        "PEFT, none": "PEFT, no masks",
        "naive eager, masks": "masked formula in torch",
    }
    lines = []
    for N, K in ((4096, 4096), (11008, 4096)):
        for work in ("forward", "forward+backward"):
            case = {"work": work, "M": 8192, "N": N, "K": K, "rank": 16}
            found = {row["peer"]: f"{row['ratio']:.2f}" for row in rows if case.items() <= row.items()}
            lines.append([f"{N}, {K}", work.replace("+", " + "), *(found[peer] for peer in peers)])
    return table(["(N, K)", "", *peers.values()], lines)


def observing(runs):
    """What a Controller's listening costs, one line a kept run."""
    lines = []
    for run in runs:
        of = run["settings"]
        shape = f"{of['layers']} x {of['hidden']}, {of['neurons']} neurons; {of['batch']} x {of['length']} tokens"
        plain = f"{1e3 * statistics.median(run['seconds']['plain']):.1f}"
        ratio = "{median:.3f} ({low:.3f} to {high:.3f})".format(**run["ratio"])
        lines.append([f"{run['device']}, {of['dtype']}", shape, plain, ratio, run["commit"][:7]])
    return ["on", "encoder", "a step, ms", "with a Controller (quartiles), aim 1.03", "commit"], lines


RUNS = {"observing": observing, "quality": shrunk.quality, "speed": shrunk.speed}  # of all files that match
PLANS = {
    "seventy": lambda: table(*beyond.seventy()),
    "refusal": lambda: f"    {beyond.refusal()}\n",
    "rates": lambda: table(*beyond.rates()),
}
PARTS = {
    "checked": lambda rows: table(*beyond.checked(rows)),
    "short": short,
    "aims": lambda rows: table(*aims.layers(rows)),
    "other-aims": lambda rows: table(*aims.others(rows)),
    "kept": lambda rows: table(*aims.kept(rows)),
    "step": lambda rows: ratios([row for row in rows if row["work"].startswith("step of ")]),
    "refresh": of("compact: refresh"),
    "layers": of("forward", "forward+backward"),
    "graph": of("graph:"),
    "compiled": of("compiled:", "compiled, graph:"),
    "passes": of("one pass"),
    "ranks": of("odd rank:"),
    "host": of("host time a call"),
    "host-profile": host,
    "merge": of("merge_", "merge, 1.1 B model"),
    "memory": memory,
    "densities": lambda rows: ratios([row for row in rows if " kept: " in row["work"]]),
}


def updated(text):
    """`text` with every marked section written anew; a part alone is its table, FILE `origin` says where the figures come from."""

    def section(match):
        start, file, part, end = match.groups()
        if part == "benefit":
            return start + "\n" + benefit.benefit([json.loads(line) for line in (RESULTS / file).read_text().splitlines()]) + "\n" + end
        if file == "plan":
            return start + "\n" + PLANS[part]() + "\n" + end
        if part in RUNS:
            return start + "\n" + table(*RUNS[part]([json.loads(path.read_text()) for path in sorted(RESULTS.glob(file))])) + "\n" + end
        data = json.loads((RESULTS / file).read_text())
        if part in TABLES:  # of whole steps
            return start + "\n" + TABLES[part](data["parts"]) + "\n" + end
        return start + "\n" + (origin(data) if part == "origin" else PARTS[part](data["rows"]) + "\n") + end

    return MARKED.sub(section, text)
