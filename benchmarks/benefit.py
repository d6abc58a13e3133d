"""The README's one sentence of what a user gains, from the kept cells of `apt-ext results`."""

from __future__ import annotations

import statistics

DENSITY = 0.4


def benefit(cells):
    """What a MiniLM on movie reviews keeps, how fast it is on a CPU, and what it scores beside LoRA on the whole model."""
    cells = [cell for cell in cells if not cell["trial"] and not cell["quick"]]
    ours = [cell for cell in cells if (cell["row"], cell["density"]) == ("apt", DENSITY)]
    dense = [cell for cell in cells if cell["row"] == "lora"]
    (cut,) = [cell for cell in ours if cell["device"].startswith("x86_64") and "inference" in cell]
    kept, score, whole = (
        statistics.fmean(values)
        for values in (
            [100 * cell["kept"]["weights"] for cell in ours],
            [cell["scores"]["test"] for cell in ours],
            [cell["scores"]["test"] for cell in dense],
        )
    )
    where = cut["device"].partition(", ")[2].replace("threads", "CPU threads")
    return (
        f"A MiniLM fine-tuned on movie reviews kept {kept:.0f} % of its layers' weights, ran {cut['inference']['speedup']:.1f} times as\n"
        f"fast on {where}, and scored {score:.1f} %, where LoRA on the whole model scored {whole:.1f} %\n"
        f"(means of {len(ours)} seeds).\n"
    )
