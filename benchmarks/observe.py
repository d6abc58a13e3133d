"""What a Controller's listening costs: a training step with it over the same step without, both taking turns.

    python benchmarks/observe.py [--device cuda] [--dtype bfloat16] [--prune heads neurons hidden] [--json FILE]

An encoder of MiniLM-L6's shape unless told otherwise, random Parameters, a third of the tokens padding; far from any event, so that
nothing but observing is added. The aim is a ratio of at most 1.03.
"""

import argparse
import copy
import json
import statistics

import torch
import transformers

import apt_ext
from apt_ext.common.clock import in_turn, spread
from apt_ext.tools.measuring import commit_here


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--prune", nargs="+", default=["heads", "neurons"], choices=["heads", "neurons", "hidden"])
    parser.add_argument("--kurtosis", type=float, default=0.0)
    for name, default in {"layers": 6, "hidden": 384, "neurons": 1536, "heads": 12, "batch": 32, "length": 32, "rounds": 15}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json")
    return parser.parse_args()


def stepper(model, controlled, options, batch):
    """A function that makes one training step."""
    optimizer = torch.optim.AdamW(apt_ext.adapter_parameters(model), lr=1e-6)
    controller = apt_ext.Controller(model, optimizer, 10**9, kurtosis=options.kurtosis) if controlled else None

    def step():
        model(**batch).loss.backward()
        if controller is not None:
            controller.observe()
        optimizer.step()
        optimizer.zero_grad()
        if controller is not None:
            controller.step()

    return step


def main():
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        num_hidden_layers=options.layers,
        hidden_size=options.hidden,
        intermediate_size=options.neurons,
        num_attention_heads=options.heads,
        vocab_size=1000,
    )
    stock = transformers.BertForSequenceClassification(config).to(options.device, getattr(torch, options.dtype))
    apt = apt_ext.get_apt_model(stock, apt_ext.APTConfig(prune=options.prune, density=0.5)).train()
    tokens = torch.randint(0, 1000, (options.batch, options.length), device=options.device)
    lengths = torch.randint(options.length // 3, options.length + 1, (options.batch, 1), device=options.device)
    mask = (torch.arange(options.length, device=options.device) < lengths).long()
    labels = torch.zeros(options.batch, dtype=torch.long, device=options.device)
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    steps = {name: stepper(copy.deepcopy(apt), name == "observed", options, batch) for name in ("plain", "observed")}
    seconds = in_turn(steps, options.rounds, torch.cuda.synchronize if options.device.startswith("cuda") else lambda: None)
    ratios = spread([observed / plain for observed, plain in zip(seconds["observed"], seconds["plain"], strict=True)])
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{where}, {options.dtype}, prune {' '.join(options.prune)}: {1e3 * statistics.median(seconds['plain']):.2f} ms a step, "
        f"observed {ratios['median']:.3f} ({ratios['low']:.3f}-{ratios['high']:.3f}) of it"
    )
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(
                {
                    "commit": commit_here(),
                    "settings": vars(options) | {"json": None},
                    "device": where,
                    "torch": torch.__version__,
                    "seconds": seconds,
                    "ratio": ratios,
                },
                file,
                indent=1,
            )


if __name__ == "__main__":
    main()
