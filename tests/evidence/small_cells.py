"""A tiny pack, and cells, for the tests of apt-ext results."""

import json

import torch
from apt_ext.tools.checkout.evidence import packing, store, tasks
from apt_ext.tools.checkout.evidence.store import Cell
from families import FAMILIES

from apt_ext.tools.cli import main


def packed(directory):
    """A pack of two tiny models and of data for two tasks, as `prepare` writes it."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    files = {}
    tensors = {}
    for part, number in (("train", 40), ("validation", 16), ("test", 16)):
        lengths = torch.randint(3, 9, (number,), generator=generator)
        labels = torch.randint(0, 2, (number,), generator=generator)
        pairs = lengths.tolist(), labels.tolist()
        words = [torch.randint(2 + 20 * label, 22 + 20 * label, (n,), generator=generator) for n, label in zip(*pairs, strict=True)]
        ids = torch.cat(words)
        tensors |= {
            f"{part}.ids": ids.to(torch.uint16),
            f"{part}.lengths": lengths.to(torch.int16),
            f"{part}.labels": labels.to(torch.uint8),
        }
    files |= packing._save(directory, "movies.safetensors", tensors)
    windows = {f"{part}.ids": torch.randint(1, 50, (40, 16), generator=generator).to(torch.uint16) for part in tasks.PARTS}
    files |= packing._save(directory, "shakespeare.safetensors", windows)
    bert = FAMILIES["bert"].model(torch.float32, num_hidden_layers=3, intermediate_size=32, num_labels=2)
    state = {key: value.half() for key, value in bert.base_model.state_dict().items()}
    files |= packing._save_model(directory, "minilm", bert.config.to_dict(), [state])
    llama = FAMILIES["llama-tied"].model(torch.float32, num_key_value_heads=3, intermediate_size=32)
    state = {key: value for key, value in llama.state_dict().items() if key != "lm_head.weight"}
    files |= packing._save_model(directory, "smollm2", llama.config.to_dict(), packing._halves(state))
    (directory / tasks.PACK).write_text(json.dumps({"format": 1, "files": files}))
    return directory


def command(place, *more):
    return main(["results", "--data", str(place.pack), "--output", str(place.output), "--device", "cpu", "--quick", *more])


def made(row, seed, test, density=None, **more):
    return {
        "format": store.FORMAT,
        "task": "movies",
        "row": row,
        "seed": seed,
        "density": density,
        "trial": False,
        "quick": False,
        "commit": "0123456789abcdef",
        "versions": {"torch": "2"},
        "device": "a machine",
        "precision": "float32",
        "alone": True,
        "config": {"rate": 1e-3},
        "scores": {"validation": 80.0, "test": test},
        "kept": {"weights": density or 1.0},
        "history": [{"step": 1, "seconds": 5.0, "validation": 70.0}, {"step": 2, "seconds": 9.0, "validation": 79.0}],
        "seconds": {"training": 10.0},
        "peak_memory_bytes": 3_000_000,
        **more,
    }


def trial_of(one, score=80.0):
    """What is in the line of a trial."""
    more = {"task": one.task, "trial": True, "config": {"rate": one.rate}, "scores": {"validation": score}}
    return made(one.row, one.seed, score, one.density, **more)


def written(folder, *results):
    folder.mkdir()
    for result in results:
        one = Cell("movies", result["row"], result["seed"], result["density"], result["config"]["rate"] if result["trial"] else None)
        store.write(folder, one, result)
    return folder
