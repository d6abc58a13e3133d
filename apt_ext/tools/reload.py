"""Run as a script, not imported: load an exported directory with stock transformers alone and compare its logits with the saved ones.

reload.py DIRECTORY CHECK THREADS prints one line of JSON: whether the logits are bitwise those in CHECK, the largest difference, the
class, and whether apt_ext was imported.
"""

import json
import os
import sys

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification


def main(directory: str, check: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    saved = load_file(check)
    model = AutoModelForSequenceClassification.from_pretrained(directory, local_files_only=True).eval()
    with torch.no_grad():
        logits = model(input_ids=saved["input_ids"], attention_mask=saved["attention_mask"]).logits
    answer = {
        "bitwise": torch.equal(logits, saved["logits"]),
        "difference": (logits - saved["logits"]).abs().max().item(),
        "class": type(model).__module__ + "." + type(model).__qualname__,
        "apt_ext_imported": "apt_ext" in sys.modules,
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
