"""What whole steps were to reach on an H200, as ratios to a peer of the same run, and what they did."""

from __future__ import annotations

from dataclasses import dataclass

COLUMNS = {  # {column: (the form, what of a row)}
    "dense": ("dense", "seconds"),
    "half of heads and neurons": ("cut", "seconds"),
    "peak memory, half": ("cut", "peak"),
}
DENSE, HALF, PEAK = COLUMNS
DROPOUT = {"dropout": 0.05}
SUBJECTS = {  # the parts that measure one model, each in a process of its own
    "roberta": ("roberta", "roberta-compiled"),
    "llama": ("llama", "llama-graphed", "llama-cut-graphed"),
    "7b": ("7b", "7b-graphed", "7b-cut-graphed"),
    "roberta-dropout": ("roberta-dropout", "roberta-dropout-compiled"),
    "llama-dropout": ("llama-dropout",),
    "without-liger": ("without-liger",),
}
MISSING, EAGERLY = "not measured", "ran eagerly"


@dataclass(frozen=True)
class Goal:
    """Describe one line of goals: steps of one of SUBJECTS over those of a peer.

    ours, peer  fields that say which row of a part each is
    aims        {column: (what must be reached, what is aimed at or None)}
    """

    what: str
    subject: str
    ours: dict
    peer: dict
    aims: dict


EAGER = {"kind": "apt_ext", "way": "eager", "dropout": 0.0}
GRAPHED = {**EAGER, "way": "GraphedStep"}
PEFT = {"kind": "PEFT", "way": "eager", "dropout": 0.0}
REDUCED = {**PEFT, "way": "reduce-overhead"}
LLAMA = {DENSE: (0.87, 0.83), HALF: (0.53, 0.48), PEAK: (0.62, 0.58)}
SEVEN = {DENSE: (0.90, 0.86), HALF: (0.51, 0.48), PEAK: (0.60, 0.55)}
DROPPED = {DENSE: (0.85, None), PEAK: (0.45, None)}
COST = {DENSE: (1.04, None)}
GOALS = (
    Goal(
        "RoBERTa-base, GraphedStep over PEFT with reduce-overhead",
        "roberta",
        GRAPHED,
        REDUCED,
        {DENSE: (0.69, 0.65), HALF: (0.50, 0.45)},
    ),
    Goal("LLaMA-1.1B over PEFT, both eager", "llama", EAGER, PEFT, LLAMA),
    Goal("LLaMA-1.1B, GraphedStep over PEFT", "llama", GRAPHED, PEFT, LLAMA),
    Goal("LLaMA-2-7B over PEFT, both eager", "7b", EAGER, PEFT, SEVEN),
    Goal("LLaMA-2-7B, GraphedStep over PEFT", "7b", GRAPHED, PEFT, SEVEN),
    Goal(
        "RoBERTa-base with dropout, GraphedStep over PEFT with reduce-overhead",
        "roberta-dropout",
        GRAPHED | DROPOUT,
        REDUCED | DROPOUT,
        {DENSE: (0.80, None), PEAK: (0.45, None)},
    ),
    Goal(
        "LLaMA-1.1B with dropout over PEFT, both eager",
        "llama-dropout",
        EAGER | DROPOUT,
        PEFT | DROPOUT,
        DROPPED,
    ),
    Goal("RoBERTa-base with dropout over without, eager", "roberta-dropout", EAGER | DROPOUT, EAGER, COST),
    Goal("LLaMA-1.1B with dropout over without, eager", "llama-dropout", EAGER | DROPOUT, EAGER, COST),
)
MERGES = {"llama": "LLaMA-1.1B", "7b": "LLaMA-2-7B"}


def rows_of(part, **fields):
    """Return the rows of a part that have these fields."""
    return [row for row in (part or {}).get("rows", ()) if fields.items() <= row.items()]


def figure(row, what):
    """Return the median seconds or the peak of a row."""
    return row["seconds"]["median"] if what == "seconds" else row["peak"]


def is_eager(row):
    """Return whether a GraphedStep found no way to capture, so that its row is one of eager steps."""
    return bool(row["graph"]) and not row["graph"]["graphed"]


def ratio(parts, subject, ours, peer, what="seconds"):
    """Divide what ours takes by what the peer of its own group takes.

    None where one was not measured, or where ours should have been a graph and was none.
    """
    for name in SUBJECTS[subject]:
        for row in rows_of(parts.get(name), checkpointing=False, **ours):
            if is_eager(row):
                continue
            own_group = {"group": row["group"], "form": "dense", "checkpointing": False}
            for base in rows_of(parts[name], **own_group, **peer):
                if figure(row, what) and figure(base, what):
                    return figure(row, what) / figure(base, what)
    return None


def line(what, column, measured, wanted, aimed, why=MISSING):
    """Return one goal as plain values; `why` says why nothing was measured, if so."""
    found = {"what": what, "column": column, "measured": measured, "wanted": wanted, "aimed": aimed}
    return found if measured is not None else {**found, "why": why}


def reached(parts):
    """Return every goal as plain values, in the order of the table; "measured" is None where nothing was."""
    found = []
    for goal in GOALS:
        for column, (wanted, aimed) in goal.aims.items():
            form, what = COLUMNS[column]
            ours = {**goal.ours, "form": form}
            measured = ratio(parts, goal.subject, ours, goal.peer, what)
            rows = [row for name in SUBJECTS[goal.subject] for row in rows_of(parts.get(name), **ours)]
            why = EAGERLY if any(map(is_eager, rows)) else MISSING
            found.append(line(goal.what, column, measured, wanted, aimed, why))
    for name, title in MERGES.items():
        merges = parts.get(name, {}).get("merge_and_unload", {})
        both = [merges[kind]["median"] for kind in ("apt_ext", "PEFT") if kind in merges]
        measured = both[0] / both[1] if len(both) == 2 else None
        found.append(line(f"merge_and_unload of {title} over PEFT's", DENSE, measured, 1.0, None))
    return found


def verdict(goal):
    """Say whether a goal was reached."""
    if goal["measured"] is None:
        return goal["why"]
    if goal["aimed"] is not None and goal["measured"] <= goal["aimed"]:
        return "as aimed at"
    return "reached" if goal["measured"] <= goal["wanted"] else "missed"


def printed(parts):
    """Write every goal as a line of text."""
    lines = [f"{'':<72} {'':<26} {'measured':>12} {'wanted':>7} {'aimed at':>9}"]
    for goal in reached(parts):
        measured = "" if goal["measured"] is None else f"{goal['measured']:.3f}"
        aimed = "" if goal["aimed"] is None else f"{goal['aimed']:.2f}"
        cells = f"{goal['what']:<72} {goal['column']:<26} {measured:>12} {goal['wanted']:>7.2f} {aimed:>9}"
        lines.append(f"{cells}  {verdict(goal)}")
    return "\n".join(lines)
