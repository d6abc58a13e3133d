"""A tiny classifier with a tokenizer of letters, a table of two classes that it can learn, and apt-ext train on them."""

import random

from small_source import letters

from apt_ext.tools.cli import main

GOOD, BAD = ("great lovely wonderful superb charming warm".split(), "awful dull poor boring weak cold".split())


def table(folder, rows=72, name="my.csv"):
    """Each row has a word of its class, and a number."""
    draw = random.Random(0)
    lines = [
        f"{draw.choice(GOOD if i % 2 else BAD)} {draw.choice(GOOD if i % 2 else BAD)},{'pos' if i % 2 else 'neg'}" for i in range(rows)
    ]
    path = folder / name
    path.write_text("\n".join(["text,label", *lines]) + "\n")
    return path


def classifier(folder, **sizes):
    """Of 3 labels, unless `sizes` says otherwise."""
    return letters(folder, "bert", **sizes)


def words(source, data, output, *more):
    """The words of a run of 8 optimizer steps in 2 epochs; later ones win."""
    numbers = "--prune neurons --density 0.8 --round-to 4 --epochs 2 --batch 16 --learning-rate 1e-2 --rounds 0 --device cpu".split()
    return ["train", str(source), "--data", str(data), "--output", str(output), *numbers, *map(str, more)]


def train(source, data, output, *more):
    return main(words(source, data, output, *more))


def stock(directory, kind="AutoModelForSequenceClassification"):
    """The model in a directory, as transformers loads it."""
    import transformers

    return getattr(transformers, kind).from_pretrained(directory)
