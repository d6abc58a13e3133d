"""The page: what it says of the numbers, beside which picture."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.extras import lacking
from . import words

Table = dict[str, Any]  # {"caption", "head": [title], "rows": [[cell]]}: the first cell of a row is its heading; "hidden": the caption

_MOST_ROWS = 120  # of the table below the losses


def picture_rows(numbers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What `figures.before_and_after` draws: each measure that is known before and after."""
    sizes, speed = numbers["sizes"], numbers["speed"]
    rows = []
    for title, name, form in (("Parameters", "parameters", words.count), ("Weights", "bytes", words.size), ("FLOPs", "flops", words.flops)):
        before, after = ((sizes[when] or {}).get(name) for when in ("before", "after"))
        if before and after is not None:
            rows.append({"title": title, "share": after / before, "low": None, "high": None, "text": _moved(before, after, form)})
    if speed is not None and speed["ratio"] is not None:
        ratio, seconds, memory = speed["ratio"], speed["seconds"], speed["memory"]
        text = _moved(seconds["before"]["median"], seconds["after"]["median"], words.seconds)
        rows.append(
            {"title": "Time of a pass", "share": 1 / ratio["median"], "low": 1 / ratio["high"], "high": 1 / ratio["low"], "text": text}
        )
        if memory is not None and memory["before"]["median"]:
            whole, after = memory["before"]["median"], memory["after"]
            ends = {end: after[end] / whole for end in ("low", "high")}
            rows.append(
                {"title": "Memory of a pass", "share": after["median"] / whole, **ends, "text": _moved(whole, after["median"], words.size)}
            )
    return rows


def html(numbers: Mapping[str, Any], pictures: Mapping[str, Mapping[str, bytes]]) -> str:
    """The page as text; `pictures` {name: {"light", "dark": PNG}}. ImportError in words without jinja2."""
    try:
        import jinja2
    except ImportError as error:
        raise ImportError(lacking("the page", "jinja2", error)) from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    as_text = json.dumps(numbers, allow_nan=False, ensure_ascii=False)
    return environment.get_template("page.html").render(
        numbers=numbers,
        tiles=tiles(numbers),
        title=re.split(r"(?<=[a-z0-9])(?=[A-Z])", numbers["title"]),  # where a long name of a class may break
        columns=[[{**one, "images": _embedded(pictures[one["picture"]])} for one in column] for column in columns(numbers)],
        exported=_exported(numbers["exported"]),
        metrics=[(name, _metric(value)) for name, value in numbers["metrics"].items()],
        about=_about(numbers),
        json=as_text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"),  # ends no script element
    )


def _embedded(images: Mapping[str, bytes]) -> dict[str, Any]:
    found: dict[str, Any] = {theme: "data:image/png;base64," + base64.b64encode(data).decode() for theme, data in images.items()}
    return {**found, "width": int.from_bytes(images["light"][16:20], "big"), "height": int.from_bytes(images["light"][20:24], "big")}


# -- the headline ------------------------------------------------------------------------------------------------------


def tiles(numbers: Mapping[str, Any]) -> list[dict[str, str]]:
    """The numbers that matter most: {"label", "value", "more"}."""
    sizes, speed, density = numbers["sizes"], numbers["speed"], numbers["density"]
    before, after = sizes["before"] or {}, sizes["after"] or {}
    found = [
        _tile("Parameters", before.get("parameters"), after.get("parameters"), words.count),
        _tile("Weights", before.get("bytes"), after.get("bytes"), words.size),
    ]
    if speed is None:
        found += [{"label": label, "value": words.NONE, "more": "not measured"} for label in ("Forward speed", "Forward memory")]
    else:
        seconds, memory = speed["seconds"], speed["memory"] or {}
        if speed["ratio"] is None:
            found.append({"label": "Forward time", "value": words.seconds(seconds["after"]["median"]), "more": "before not known"})
        else:
            times = f"{words.seconds(seconds['after']['median'])}, was {words.seconds(seconds['before']['median'])}"
            found.append({"label": "Forward speed", "value": f"{speed['ratio']['median']:.2f}×", "more": times})
        before_it, after_it = (memory.get(when, {}).get("median") for when in ("before", "after"))
        found.append(_tile("Forward memory", before_it, after_it, words.size))
    if density["now"] is None:
        kept = {"label": "Density", "value": words.NONE, "more": "before not known"}
    else:
        target = density["target"]
        state = "" if density["reached"] is None else ", reached" if density["reached"] else ", not reached yet"
        more = "no target was set" if target is None else f"target {words.percent(target)}{state}"
        kept = {"label": "Density", "value": words.percent(density["now"]), "more": more}
    return [*found, kept]


def _tile(label: str, before: float | None, after: float | None, form: Any) -> dict[str, str]:
    if after is None:
        return {"label": label, "value": words.NONE, "more": "not known"}
    return {
        "label": label,
        "value": form(after),
        "more": f"was {form(before)}, {words.change(before, after)}" if before else "before not known",
    }


def _moved(before: float | None, after: float | None, form: Any) -> str:
    return f"{form(before)} → {form(after)}  ({words.change(before, after)})"


# -- the sections ------------------------------------------------------------------------------------------------------


def columns(numbers: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """{"id", "title", "text", "picture", "alt", "tables"} of each picture, in two columns."""
    return [[_before_after(numbers), _kept(numbers)], [_density(numbers), _losses(numbers), _ranks(numbers)]]


def _before_after(numbers: Mapping[str, Any]) -> dict[str, Any]:
    sizes, speed = numbers["sizes"], numbers["speed"]
    before, after = sizes["before"] or {}, sizes["after"] or {}
    rows = [
        [title, form(before.get(name)), form(after.get(name)), words.change(before.get(name), after.get(name))]
        for title, name, form in (
            ("Parameters", "parameters", lambda value: words.NONE if value is None else f"{value:,}"),
            ("Weights", "bytes", words.size),
            (f"FLOPs of {sizes['flops_of']}", "flops", words.flops),
        )
    ]
    if speed is not None:
        for title, name, form in (("Time of a pass", "seconds", words.seconds), ("Memory of a pass", "memory", words.size)):
            spreads = speed[name] or {}
            medians = [spreads.get(when, {}).get("median") for when in ("before", "after")]
            rows.append([title, *(_spread(spreads.get(when), form) for when in ("before", "after")), words.change(*medians)])
        if speed["ratio"] is not None:
            ratio = speed["ratio"]
            rows.append(["Speed, before over after", "", f"{ratio['median']:.2f}× ({ratio['low']:.2f}–{ratio['high']:.2f})", ""])
    drawn = picture_rows(numbers)
    return {
        "id": "before-after",
        "title": "Before and after",
        "text": "What the cut model takes of what the model took before its first cut."
        + (" Measures of a pass: medians, whiskers are quartiles." if speed is not None else ""),
        "picture": "before-after",
        "alt": "Bars, after as a share of before: "
        + ("; ".join(f"{row['title']} {row['share']:.0%}" for row in drawn) or "nothing is known")
        + ".",
        "tables": [{"caption": "Before and after", "head": ["measure", "before", "after", "change"], "rows": rows}],
    }


def _kept(numbers: Mapping[str, Any]) -> dict[str, Any]:
    kept = numbers["kept"]
    tables = [_layer_table("Kept", panel, lambda cell: f"{cell['kept']:,} of {cell['of']:,}") for panel in kept["panels"]]
    hidden = kept["hidden"]
    if hidden is not None:
        row = ["hidden dimensions", f"{hidden['kept']:,} of {hidden['of']:,}"]
        tables.append({"caption": "Kept of the residual stream", "head": ["block", "kept"], "rows": [row]})
    alt = []
    for panel in kept["panels"]:
        for i, column in enumerate(panel["columns"]):
            cells = [row[i] for row in panel["cells"] if row[i] is not None]
            of = words.span([cell["of"] for cell in cells])
            alt.append(f"{panel['stack']} {column} {words.span([cell['kept'] for cell in cells])} of {of}".strip())
    alt += [] if hidden is None else [f"hidden dimensions {hidden['kept']:,} of {hidden['of']:,}"]
    return {
        "id": "kept",
        "title": "What each layer keeps",
        "text": "The stronger the colour, the larger the share that stays of what there was before the first cut.",
        "picture": "kept",
        "alt": "Heat map of what each layer keeps: " + ("; ".join(alt) or "no blocks") + ".",
        "tables": tables,
    }


def _ranks(numbers: Mapping[str, Any]) -> dict[str, Any]:
    ranks = numbers["ranks"]
    tables = [_layer_table("Rank", panel, str) for panel in ranks["panels"]]
    if ranks["outside"]:
        rows = [[name, str(rank)] for name, rank in ranks["outside"].items()]
        tables.append({"caption": "Outside the layers", "head": ["adapter", "rank"], "rows": rows})
    text = f"{_number(len(ranks['adapters']), 'adapter')}" + (f", {len(ranks['outside'])} outside the layers." if ranks["outside"] else ".")
    if ranks["parameters"] is not None:
        before, after = ranks["parameters"]["before"], ranks["parameters"]["after"]
        text += f" Their factors had {words.count(before)} parameters at the start and have {words.count(after)} now."
    found = [entry["rank"] for entry in ranks["adapters"].values()]
    return {
        "id": "ranks",
        "title": "Adapter ranks",
        "text": text,
        "picture": "ranks",
        "alt": f"Heat map of the ranks of {len(found)} adapters by layer and linear: {words.span(found)}.",
        "tables": tables,
    }


def why_no_events(numbers: Mapping[str, Any]) -> str:
    """Why there is no curve of the density, in words."""
    density = numbers["density"]
    if density["initial"] is not None:
        return "No event yet: nothing was pruned and no rank has grown."
    if density["now"] is None:
        return "The density is not known of a model without adapters."
    target = "" if density["target"] is None else f", of a target of {density['target']:g}"
    return f"No Controller was given. The density now is {density['now']:.4f}{target}."


def why_no_losses(numbers: Mapping[str, Any]) -> str:
    """Why there is no curve of the loss, in words."""
    return "None of the losses is finite." if any(numbers["losses"].values()) else "No losses were given: report(..., losses=)."


def _density(numbers: Mapping[str, Any]) -> dict[str, Any]:
    density = numbers["density"]
    rows = [
        [str(event["step"]), f"{event['density']:.4f}", f"{event['adapter_parameters']:,}", _score(event["threshold"])]
        for event in density["events"]
    ]
    head = ["step", "density", "adapter parameters", "score of the last that stays"]
    tables = [{"caption": "Events", "head": head, "rows": rows}] if rows else []
    path = "; ".join(f"{event['density']:.3f} after step {event['step']}" for event in density["events"])
    return {
        "id": "density",
        "title": "Budget over the steps",
        "text": "The share of the budget that stays after each event."
        + ("" if density["target"] is None else f" The target is {density['target']:g} of {density['budget']}."),
        "picture": "density",
        "alt": f"Density over the optimizer steps: {path}." if path else why_no_events(numbers),
        "tables": tables,
    }


def _losses(numbers: Mapping[str, Any]) -> dict[str, Any]:
    tables, alt = [], []
    for name, curve in numbers["losses"].items():
        every = max(1, -(-len(curve) // _MOST_ROWS))
        some = [point for i, point in enumerate(curve) if i % every == 0 or i == len(curve) - 1]
        rows = [[str(step), "not finite" if loss is None else f"{loss:.4f}"] for step, loss in some]
        caption = f"{name.capitalize()} loss" + (f", every {every}th of {len(curve)} values" if every > 1 else "")
        tables.append({"caption": caption, "head": ["step", "loss"], "rows": rows})
        finite = [loss for _, loss in curve if loss is not None]
        if finite:
            alt.append(f"{name} loss from {finite[0]:.3f} to {finite[-1]:.3f}")
    gone = sum(loss is None for curve in numbers["losses"].values() for _, loss in curve)
    text = f" {_not_finite(gone)} not finite: there the curve has a gap." if gone else ""
    return {
        "id": "loss",
        "title": "Loss over the steps",
        "text": ("The loss as it was logged." if tables else "There is none to show.") + text,
        "picture": "loss",
        "alt": f"Loss over the optimizer steps: {'; '.join(alt)}." if alt else why_no_losses(numbers),
        "tables": tables,
    }


def _number(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _not_finite(number: int) -> str:
    return "One value is" if number == 1 else f"{number} values are"


# -- tables ------------------------------------------------------------------------------------------------------------


def _layer_table(what: str, panel: Mapping[str, Any], form: Any) -> Table:
    head = [f"{panel['stack']} layer".strip(), *panel["columns"]]
    rows = [
        [str(layer), *(words.NONE if cell is None else form(cell) for cell in cells)]
        for layer, cells in zip(panel["layers"], panel["cells"], strict=True)
    ]
    return {"caption": f"{what} by {head[0]}", "head": head, "rows": rows}


def _spread(spread: Mapping[str, Any] | None, form: Any) -> str:
    return words.NONE if spread is None else f"{form(spread['median'])} ({form(spread['low'])} – {form(spread['high'])})"


def _score(threshold: float | None) -> str:
    return words.NONE if threshold is None else f"{threshold:.3g}"


def _exported(exported: Mapping[str, Any] | None) -> Table | None:
    if exported is None:
        return None
    rows = [
        ["class", exported["class"]],
        ["directory", exported["directory"]],
        ["on disk", f"{words.size(exported['bytes'])} in {exported['files']} files"],
        ["loads with", exported["loads"]],
    ]
    return {"caption": "What was exported", "head": [], "rows": rows, "hidden": True}


def _metric(value: Any) -> str:
    return (
        "not finite" if value is None else value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    )


def _about(numbers: Mapping[str, Any]) -> Sequence[str]:
    """How the numbers came about, a sentence each."""
    speed = numbers["speed"]
    said: list[str] = []
    if speed is not None:
        shapes = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in speed["inputs"].items())
        threads = f", {_number(speed['threads'], 'thread')}" if speed["threads"] else ""
        both = "both models in turn; " if speed["ratio"] is not None else ""
        where = f"{speed['device']}{threads}, {numbers['model']['dtype']}"
        said.append(f"A pass: forward in evaluation mode, {both}{_number(speed['rounds'], 'round')} on {where}; {shapes}.")
        if speed["ratio"] is not None:
            said.append(
                "Before: a stock model of the sizes before the first cut, with random weights. After: what shrink makes of the model."
            )
        if speed["memory"] is not None:
            said.append("Memory: parameters and buffers, with the most that a pass takes beside them.")
    if numbers["density"]["now"] is not None:
        said.append("Density: the share of the layers' cost that stays; embeddings, task head and adapters do not count.")
    return [*said, *_sentences(numbers["notes"])]


def _sentences(notes: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(notes))
