"""The page as a browser shows it, narrow and wide, light and dark."""

import json

import pytest
import torch
from browser import chromium
from families import FAMILIES, adapted, keep_first
from training import finished

import apt_ext
from apt_ext.common import clock

pytest.importorskip("matplotlib")
HEADINGS = [
    "Before and after",
    "What each layer keeps",
    "What was exported",
    "Budget over the steps",
    "Loss over the steps",
    "Adapter ranks",
]


def pruned():
    """A run of an encoder, with losses of which one is not finite."""
    apt, controller, _ = finished("bert")
    log = [{"step": step, "loss": 1 / step if step != 4 else float("nan")} for step in range(1, 17)] + [{"step": 16, "eval_loss": 0.1}]
    return apt, controller, {"losses": log, "metrics": {"accuracy": 0.91}, "rounds": 1}


def deep():
    """A decoder of 32 layers that share keys, with its KV groups and neurons masked."""
    return keep_first(adapted(FAMILIES["llama"], num_hidden_layers=32), heads=2, neurons=8), None, {"rounds": 1}


def stacks():
    """An encoder and a decoder, hidden dimensions pruned."""
    return keep_first(adapted(FAMILIES["t5"], num_layers=6), hidden=12, neurons=4), None, {"rounds": 0}


def untouched():
    """Nothing pruned, by nobody."""
    return adapted(FAMILIES["gpt2"]), None, {"rounds": 0}


EXPECTED = {
    pruned: {"tile": "43.5 %", "kept": "1 of 3", "alt": "heads 1 of 3", "layers": 2},
    deep: {"tile": "−", "kept": "2 of 3", "alt": "heads (KV groups) 2 of 3", "layers": 32},
    stacks: {"tile": "not measured", "kept": "4 of 20", "alt": "decoder cross heads 3 of 3", "layers": 6},
    untouched: {"tile": "unchanged", "kept": "96 of 96", "alt": "heads 3 of 3", "layers": 2},
}


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.mark.parametrize("made", EXPECTED, ids=lambda made: made.__name__)
def test_the_page_in_a_browser(made, browser, tmp_path, monkeypatch):
    monkeypatch.setattr(clock, "_ROUND", 0.0)
    apt, controller, options = made()
    path = apt_ext.report(apt, controller, tmp_path / "report.html", **options)
    assert (tmp_path / "report.html").stat().st_size < 1_000_000
    expected = EXPECTED[made]
    for width, scheme in ((400, "dark"), (1400, "light")):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        said, asked = [], []
        page.on("console", lambda message, said=said: said.append(message.text))
        page.on("pageerror", lambda error, said=said: said.append(str(error)))
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto(f"file://{path}")
        assert said == [] and [url for url in asked if not url.startswith("data:")] == [f"file://{path}"]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        shown = "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, .unseen'))"
        assert page.evaluate(f"{shown}.filter(e => e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML)") == []
        images = page.evaluate("[...document.images].map(i => [i.naturalWidth, i.complete, i.alt, i.currentSrc])")
        assert len(images) == 5 and all(natural > 500 and complete and alt for natural, complete, alt, _ in images)
        sources = page.evaluate("[...document.querySelectorAll('source')].map(s => s.srcset)")
        assert ([image[3] for image in images] == sources) == (scheme == "dark")  # the dark ones on a dark page alone
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width  # with all tables shown
        headings = page.evaluate("[...document.querySelectorAll('h2')].map(h => h.innerText)")
        assert headings == [*HEADINGS, "How these numbers came about"]
        assert page.evaluate("document.querySelectorAll('h1').length") == 1
        tiles = page.evaluate("[...document.querySelectorAll('header + .tiles .tile')].map(t => t.innerText)")
        assert len(tiles) == 5 and expected["tile"] in " ".join(tiles)
        kept = page.evaluate("document.querySelector('#kept').innerText")
        assert expected["kept"] in kept and any(expected["alt"] in image[2] for image in images)
        tables = page.evaluate(
            "[...document.querySelectorAll('table')].map(t => [t.caption.innerText, t.querySelectorAll('tbody th').length, t.rows.length])"
        )
        assert all(caption and named for caption, named, _ in tables)
        assert page.evaluate("document.querySelector('#kept tbody').rows.length") == expected["layers"]
        numbers = json.loads(page.evaluate("document.getElementById('numbers').textContent"))
        assert numbers["sizes"]["after"]["parameters"] == sum(parameter.numel() for parameter in apt_ext.shrink(apt).parameters())
        page.close()


def test_text_stands_out_from_what_lies_behind_it(browser, tmp_path):
    """A contrast of 4.5 at least, as WCAG asks, in both colour schemes."""
    apt_ext.report(adapted(FAMILIES["gpt2"], dtype=torch.float32), None, tmp_path / "report.html", rounds=0)
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(f"file://{tmp_path / 'report.html'}")
        pairs = page.evaluate(
            """pairs => pairs.map(([text, behind]) => [getComputedStyle(document.querySelector(text)).color,
                                               getComputedStyle(document.querySelector(behind)).backgroundColor])""",
            [*((text, "body") for text in ("h1", ".kind", "header .soft")), (".value", ".tile"), (".more", ".tile")]
            + [(text, ".card") for text in ("h2", ".card .soft", "summary", "th", "li")],
        )
        assert all(_contrast(*pair) >= 4.5 for pair in pairs), (scheme, [(pair, _contrast(*pair)) for pair in pairs])
        page.close()


def _contrast(one, other):
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour):
    channels = [int(value) / 255 for value in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
