"""A tiny model with a tokenizer of letters and a text, and apt-ext shrink on it."""

import torch
from families import FAMILIES

from apt_ext.tools.cli import main


def letters(folder, family="llama", **sizes):
    """The directory of the model, made in `folder`."""
    import tokenizers
    import transformers

    directory = folder / "source"
    vocabulary = {"[UNK]": 0, "[END]": 1, **{chr(97 + i): i + 2 for i in range(26)}, " ": 28}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="[END]")  # noqa: S106
    tokenizer.save_pretrained(directory)
    FAMILIES[family].model(torch.float32, **sizes).save_pretrained(directory)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 100)
    return directory


def command(source, output, *more):
    text = str(source.parent / "text.txt")
    numbers = ["--batch", "2", "--length", "16", "--score", "2", "--test", "2", "--rounds", "3", "--device", "cpu"]
    return main(["shrink", str(source), "--text", text, "--output", str(output), *numbers, *more])
