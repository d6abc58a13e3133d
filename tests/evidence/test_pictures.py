"""What the pictures of the evidence show."""

import pytest
from apt_ext.tools.checkout.evidence import gathered, pictures
from small_cells import made, written

pytest.importorskip("matplotlib")
RATIOS = {"small": [1.0, 2.0, 3.0, 4.0, 5.0], "dense": [10.0] * 5}


def inference(device, dtype):
    return {"device": device, "inference": {"batch": 32, "length": 64, "dtype": dtype, "seconds": RATIOS, "speedup": 3.3}}


@pytest.fixture
def cells(tmp_path):
    scores = {"full": (79.0, 81.0, 83.0), "lora": (80.0, 82.0, 84.0)}
    dense = [made(row, seed, test) for row, tests in scores.items() for seed, test in enumerate(tests)]
    apt = [made("apt", seed, test, 0.4, **inference("a GPU", "bfloat16")) for seed, test in enumerate((80.0, 81.0, 85.0))]
    cpu = made("apt", 3, 82.0, 0.4, **inference("x86_64, 2 threads", "float32"))
    more = [made("apt", 0, 70.0, 0.2), made("oneshot", 0, 75.0, 0.4), made("oneshot", 1, 79.0, 0.4), made("apt-self", 0, 76.0, 0.4)]
    return gathered.load_cells(written(tmp_path / "cells", *dense, *apt, cpu, *more))


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn."""
    figures, kind = [], pictures.figure_class()

    class Kept(kind):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            figures.append(self)

    monkeypatch.setattr(pictures, "figure_class", lambda: Kept)
    return figures


def test_scores_have_bars_of_their_range_and_the_method_is_brought_out(cells, drawn, tmp_path):
    assert pictures.draw_scores(cells["movies"], tmp_path / "movies.png") == "score against kept weights and against time"
    (figure,) = drawn
    left, right = figure.axes
    bars = {bar.get_label(): bar for bar in left.containers}
    assert list(bars) == ["full fine-tuning", "dense LoRA", "LoRA, one-shot prune, recovery", "APT", "APT, self-distilled"]
    line, _, (ranges,) = bars["APT"]
    assert line.get_xdata().tolist() == [20.0, 40.0] and line.get_ydata().tolist() == [70.0, 82.0]
    assert [segment[:, 1].tolist() for segment in ranges.get_segments()] == [[70.0, 70.0], [80.0, 85.0]]
    widths = {name: bar[0].get_linewidth() for name, bar in bars.items()}
    assert widths["APT"] > 2 * max(width for name, width in widths.items() if name != "APT")
    colours = {name: bar[0].get_color() for name, bar in bars.items()}
    assert list(colours.values()).count(colours["APT"]) == 1
    assert left.get_legend() is None and right.get_legend() is None
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(bars)
    assert legend.get_window_extent().x0 >= max(axes.get_window_extent().x1 for axes in figure.axes)
    assert (tmp_path / "movies.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_user_gains(cells, drawn, tmp_path):
    gain = pictures.gained(cells)
    assert gain.density == 0.4 and list(gain.accuracy) == ["movie reviews"]
    bars = gain.accuracy["movie reviews"]
    assert bars["lora"] == pictures.Bar(82.0, 80.0, 84.0) and bars["apt"] == pictures.Bar(82.0, 80.0, 85.0)
    assert gain.kept["full"].value == 100.0 and gain.kept["apt"].value == pytest.approx(40.0)
    assert list(gain.times) == ["a GPU; bfloat16, 32 x 64", "x86_64 CPU, 2 threads; float32, 32 x 64"]
    assert gain.times["a GPU; bfloat16, 32 x 64"]["apt"] == pictures.Bar(30.0, 20.0, 40.0)
    said = pictures.draw_gain(gain, tmp_path / "gain.png")
    assert said.startswith("accuracy of full fine-tuning, LoRA, APT, 40 % kept in percent: movie reviews 81.0, 82.0, 82.0.")
    assert "Weights of the layers: 100, 100, 40." in said and "a GPU, bfloat16, 32 x 64: 100, 100, 30" in said
    (figure,) = drawn
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Accuracy", "Weights kept", "Time of a batch"]
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == [81.0, 82.0, 82.0] and all(axes.get_ylim()[0] == 0 for axes in figure.axes)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["full fine-tuning", "LoRA", "APT, 40 % kept"]
    assert (tmp_path / "gain.png").read_bytes().startswith(b"\x89PNG")


def test_without_what_it_is_compared_with_there_is_no_gain(tmp_path, drawn):
    few = gathered.load_cells(written(tmp_path / "few", made("lora", 0, 80.0), made("apt", 0, 80.0, 0.4)))
    assert pictures.gained(few) is None
    three = [made("full", 0, 80.0), made("lora", 0, 80.0), made("apt", 0, 80.0, 0.4)]
    gain = pictures.gained(gathered.load_cells(written(tmp_path / "three", *three)))
    assert gain is not None and gain.times == {}
    assert "Time" not in pictures.draw_gain(gain, tmp_path / "gain.png") and len(drawn[0].axes) == 2
