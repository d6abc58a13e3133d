"""Write the README's tables of figures from the runs kept in benchmarks/results.

    python benchmarks/readme.py [--check]

Each stands between a pair of comments that name it. --check writes nothing, and fails where a table is not what the kept runs say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def shrink_runs(results):
    """The kept runs of `apt-ext shrink`: of real models first, then of random Parameters."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("shrink-*.json"))]
    return sorted(runs, key=lambda run: run.get("random", False))


def quality(results):
    """What a cut costs, and what it leaves on the disk."""
    yield "| `apt-ext shrink ...` | measured on | before | cut | recovered | parameters, M | on disk, MB |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for run in shrink_runs(results):
        if "quality" not in run:
            continue
        found, digits = run["quality"], {"accuracy": 3, "perplexity": 1}[run["quality"]["measure"]]
        before, cut, after = (f"{found[name]:.{digits}f}" for name in ("before", "masked", "after"))
        sizes = (" to ".join(f"{run[name][side] / 1e6:.1f}" for side in ("before", "after")) for name in ("parameters", "bytes on disk"))
        recovered = after if run["settings"]["recover"] else ""
        yield f"| {arguments(run)} | {found['measure']}, {found['on']} | {before} | {cut} | {recovered} | {' | '.join(sizes)} |"


def speed(results):
    """What a cut saves while the model runs."""
    yield "| `apt-ext shrink ...` | on | | before | after | ratio |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for run in shrink_runs(results):
        first = arguments(run)
        for device, found in run["devices"].items():
            where = f"{found['threads']} CPU threads, {found['dtype']}" if device == "cpu" else f"{found['device']}, {found['dtype']}"
            for name, unit, digits in (("tokens per second", 1, 0), ("generated tokens per second", 1, 1), ("peak memory", 1e6, 0)):
                if name not in found:
                    continue
                sides = [spread(found[name][side], unit, digits) for side in ("before", "after")]
                ratio = spread(found[name]["ratio"], 1, 2) if "ratio" in found[name] else ""
                yield f"| {first} | {where} | {name.replace('memory', 'memory, MB')} | {' | '.join(sides)} | {ratio} |"
                first = where = ""


def arguments(run):
    return f"`{run['command'].removeprefix('apt-ext shrink ')}`"


def spread(found, unit, digits):
    median, low, high = (f"{found[name] / unit:,.{digits}f}" for name in ("median", "low", "high"))
    return f"{median} ({low}-{high})"


def kernels(results):
    """The rows of the benchmark that most users meet."""
    rows = json.loads((results / "h200-bfloat16.json").read_text(encoding="utf-8"))["rows"]
    peers = {"apt none": "apt_ext", "apt masks": "apt_ext, masks on both sides", "PEFT, none": "PEFT, no masks"}
    peers["naive eager, masks"] = "masked formula in torch"
    yield f"| (N, K) | | {' | '.join(peers.values())} |"
    yield f"| --- | --- |{' --- |' * len(peers)}"
    for N, K in ((4096, 4096), (11008, 4096)):
        first = f"{N}, {K}"
        for work, name in (("forward", "forward"), ("forward+backward", "forward + backward")):
            of = {"work": work, "M": 8192, "N": N, "K": K, "rank": 16}
            found = {row["peer"]: row["ratio"] for row in rows if of.items() <= row.items()}
            yield f"| {first} | {name} | {' | '.join(f'{found[peer]:.2f}' for peer in peers)} |"
            first = ""


TABLES = {"quality": quality, "speed": speed, "kernels": kernels}


def written(text, results=RESULTS):
    """The README with its tables as the kept runs say. ValueError where one has no place."""
    for name, rows in TABLES.items():
        begin, end = f"<!-- table {name}: python benchmarks/readme.py -->\n", f"<!-- end of table {name} -->\n"
        place = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if len(place.findall(text)) != 1:
            raise ValueError(f"README.md: expected one place for the table {name}, between {begin.strip()} and {end.strip()}")
        body = begin + "\n" + "".join(f"{row}\n" for row in rows(results)) + "\n" + end
        text = place.sub(lambda _, body=body: body, text)
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = written(before)
    if parser.parse_args().check:
        sys.exit("README.md: tables differ from benchmarks/results; run: python benchmarks/readme.py" if after != before else 0)
    readme.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
