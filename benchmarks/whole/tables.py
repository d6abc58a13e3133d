"""What documents show of whole steps, from the kept file; what it does not have is "not measured"."""

from __future__ import annotations

from dataclasses import asdict

from . import reach
from .events import PARTS as BETWEEN_EVENTS
from .parts import ALL
from .reach import EAGERLY, MISSING, SUBJECTS
from .works import WORKS

NAMES = {
    ("full", "dense"): "full fine-tuning",
    ("PEFT", "dense"): "PEFT",
    ("apt_ext", "dense"): "apt_ext",
    ("apt_ext", "masked"): "half: masks alone",
    ("apt_ext", "compact"): "half: `compact()`",
    ("apt_ext", "chain"): "half: `compact(chain=True)`",
    ("apt_ext", "cut"): "half: `cut()`",
}
ONE_GRAPH = ("GraphedStep", "reduce-overhead")


def markdown(head, lines):
    """Write a table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines]) + "\n"


def milliseconds(row):
    """Write a row's median."""
    value = 1e3 * row["seconds"]["median"]
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def gibibytes(row):
    """Write a row's peak; nothing where it has none."""
    if row["peak"] is None:
        return ""
    value = row["peak"] / 2**30
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def planned(name):
    """Return the contenders of a part that there are to be."""
    return [contender for group in ALL[name].groups.values() for contender in group]


def cell(parts, names, ways, write, **fields):
    """Write what some parts have measured of the contender with these fields; "" where none is planned."""
    plans = [asdict(one) for name in names for one in planned(name)]
    if not any(plan["way"] in ways and fields.items() <= plan.items() for plan in plans):
        return ""
    rows = [row for name in names for row in reach.rows_of(parts.get(name), **fields) if row["way"] in ways]
    graphs = [row for row in rows if not reach.is_eager(row)]
    return write(graphs[0]) if graphs else EAGERLY if rows else MISSING


def steps(subject, dropout=0.0):
    """Return the table of a model: eager steps and steps in one graph, time and memory."""
    names = SUBJECTS[subject]

    def of(parts):
        lines = []
        for (kind, form), title in NAMES.items():
            fields = {"kind": kind, "form": form, "dropout": dropout, "checkpointing": False}
            both = [(write, ways) for write in (milliseconds, gibibytes) for ways in (("eager",), ONE_GRAPH)]
            cells = [cell(parts, names, ways, write, **fields) for write, ways in both]
            if any(cells):
                lines.append([title, *cells])
        model = WORKS[ALL[names[0]].work].name
        head = [model, "eager, ms", "one graph, ms", "eager, GiB", "one graph, GiB"]
        return markdown(head, lines)

    return of


def goals(parts):
    """Return the table of what was to be reached."""
    rows = {}
    for line in reach.reached(parts):
        if line["aimed"] is None:
            aims = f"({line['wanted']:.2f})"
        else:
            aims = f"({line['wanted']:.2f}; {line['aimed']:.2f})"
        measured = line["why"] if line["measured"] is None else f"{line['measured']:.3f}"
        rows.setdefault(line["what"], {})[line["column"]] = f"{measured} {aims}"
    lines = [[what, *(cells.get(column, "") for column in reach.COLUMNS)] for what, cells in rows.items()]
    return markdown(["ratio of", *reach.COLUMNS], lines)


def compiled(parts):
    """Return the table of torch.compile over one model that is masked and then cut."""
    part, lines = parts.get("compile"), []
    for form, title in (("dense", "dense"), ("masked", "half masked"), ("cut", "half cut")):
        cells, graphs = [], ""
        for way in ("eager", "compile", "reduce-overhead"):
            found = reach.rows_of(part, way=way, form=form)
            cells.append(milliseconds(found[0]) if found else MISSING)
            if found and way == "reduce-overhead":
                graphs = str(found[0]["graphs compiled"])
        lines.append([title, *cells, graphs or MISSING])
    what = "RoBERTa-base's widths, 6 layers: ms a step"
    return markdown([what, "eager", "torch.compile", "reduce-overhead", "graphs compiled"], lines)


def checkpointing(parts):
    """Return the table of gradient checkpointing."""
    lines = []
    for kind, form in (("PEFT", "dense"), ("apt_ext", "dense"), ("apt_ext", "cut")):
        for seen_again in (False, True):
            fields = {"kind": kind, "form": form, "checkpointing": seen_again}
            ways = (milliseconds, gibibytes)
            cells = [cell(parts, ["checkpointing"], ("eager",), write, **fields) for write in ways]
            if any(cells):
                lines.append([NAMES[kind, form], "yes" if seen_again else "no", *cells])
    return markdown(["LLaMA-1.1B", "checkpointing", "ms a step", "peak, GiB"], lines)


def liger(parts):
    """Return the table of LLaMA with Liger's kernels, and without them: eager and in one graph."""
    lines = []
    for kind, form in (("PEFT", "dense"), ("apt_ext", "dense"), ("apt_ext", "cut")):
        cells = [
            cell(parts, SUBJECTS[subject], (way,), write, kind=kind, form=form)
            for write in (milliseconds, gibibytes)
            for subject, way in (
                ("llama", "eager"),
                ("without-liger", "eager"),
                ("without-liger", "GraphedStep"),
            )
        ]
        lines.append([NAMES[kind, form], *cells])
    columns = ("Liger", "without", "without, one graph")
    head = [f"{column}, {unit}" for unit in ("ms", "GiB") for column in columns]
    return markdown(["LLaMA-1.1B", *head], lines)


def events(name):
    """Return the table of steps under a Controller."""

    def of(parts):
        part = parts.get(name) or {}
        lines = []
        for kind in ("PEFT", "apt_ext"):
            for row in reach.rows_of(part, kind=kind):
                lines.append([NAMES[kind, "dense"], milliseconds(row), gibibytes(row)])
        for title, run in part.get("runs", {}).items():
            for key, words in BETWEEN_EVENTS.items():
                lines.append([f"{title}: {words}", milliseconds(run[key]), gibibytes(run[key])])
        return markdown(["", "ms a step", "peak, GiB"], lines or [["", MISSING, MISSING]])

    return of


def merges(parts):
    """Return the table of merge_and_unload."""
    lines = []
    for name, title in reach.MERGES.items():
        found = parts.get(name, {}).get("merge_and_unload", {})
        spent = [found[kind]["median"] if kind in found else None for kind in ("PEFT", "apt_ext")]
        lines.append([title, *(MISSING if one is None else f"{1e3 * one:.0f}" for one in spent)])
    return markdown(["merge_and_unload, ms", "PEFT", "apt_ext"], lines)


def origin(parts):
    """Say where the figures come from, a line a part; a commit with + had changes that were not committed."""
    lines = []
    for name, part in parts.items():
        if "model" in part:
            liger_version = part["liger_kernel"]["version"]
            with_liger = {**part["versions"], "Liger": liger_version}
            versions = ", ".join(f"{library} {version}" for library, version in with_liger.items() if version)
            commit = part["commit"][:7] + "+" * part["commit"].endswith("+")
            lines.append([name, part["device"], versions, commit, f"`{part['command']}`"])
    return markdown(["part", "on", "with", "commit", "command"], lines or [[MISSING] * 5])


def speed(parts):
    """Return the README's words: what a step takes beside PEFT's."""

    def over(subject, ours, peer, form, what="seconds"):
        return reach.ratio(parts, subject, {**ours, "form": form}, peer, what)

    dense = over("llama", reach.EAGER, reach.PEFT, "dense")
    half = over("llama", reach.EAGER, reach.PEFT, "cut")
    memory = over("llama", reach.EAGER, reach.PEFT, "cut", "peak")
    small = over("roberta", reach.GRAPHED, reach.REDUCED, "dense")
    small_half = over("roberta", reach.GRAPHED, reach.REDUCED, "cut")
    words = []
    if None not in (dense, half, memory):
        words.append(
            f"On an {parts['llama']['device']}, a training step of a LLaMA with 1.1 billion weights takes\n"
            f"{dense:.2f} of the time of PEFT's LoRA. Once half of the heads and neurons are cut away it\n"
            f"takes {half:.2f} of that time and {memory:.2f} of the memory."
        )
    if None not in (small, small_half):
        words.append(
            f"A model of RoBERTa-base's size waits for Python instead;\n"
            f"there `apt_ext.GraphedStep` runs each step as one CUDA graph: {small:.2f} and, cut, "
            f"{small_half:.2f} of\n"
            f'the time of PEFT under `torch.compile(mode="reduce-overhead")`.'
        )
    return "\n".join(words) + "\n" if words else "Whole steps: not measured.\n"


def printed(part):
    """Write what a part measured as lines of text."""
    lines = [f"{'':<58} {'ms a step (quartiles)':>28} {'peak, GiB':>10} {'first steps, s':>15}"]
    for row in part["rows"]:
        words = [f"{row['group']}: {row['kind']}", row["way"], row["form"]]
        words += [f"dropout {row['dropout']}"] * bool(row["dropout"])
        words += ["checkpointing"] * row["checkpointing"]
        graph = row["graph"]
        eager = f"  ran eagerly: {graph['reason']}" if graph and not graph["graphed"] else ""
        lines.append(timed(", ".join(words), row) + f" {row['first steps']:>15.1f}{eager}")
    for title, run in part.get("runs", {}).items():
        lines += [timed(f"{title}: {words}", run[key]) for key, words in BETWEEN_EVENTS.items()]
    for kind, seconds in part.get("merge_and_unload", {}).items():
        lines.append(timed(f"merge_and_unload: {kind}", {"seconds": seconds, "peak": None}))
    lines += [f"{each['what']} failed: {each['error'].splitlines()[0]}" for each in part["failed"]]
    if "seconds" in part:
        lines.append(f"{part['seconds']:.0f} s in all")
    return "\n".join(lines)


def timed(title, row):
    """Write one line of what was measured."""
    median, low, high = (1e3 * row["seconds"][name] for name in ("median", "low", "high"))
    return f"{title:<58} {f'{median:.2f} ({low:.2f}-{high:.2f})':>28} {gibibytes(row):>10}"


TABLES = {
    "steps-goals": goals,
    "steps-roberta": steps("roberta"),
    "steps-llama": steps("llama"),
    "steps-7b": steps("7b"),
    "steps-roberta-dropout": steps("roberta-dropout", 0.05),
    "steps-llama-dropout": steps("llama-dropout", 0.05),
    "steps-compiled": compiled,
    "steps-checkpointing": checkpointing,
    "steps-liger": liger,
    "steps-roberta-events": events("roberta-events"),
    "steps-llama-events": events("llama-events"),
    "steps-merges": merges,
    "steps-origin": origin,
    "steps-speed": speed,
}
