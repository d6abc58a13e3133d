"""The same training run step by step, by the eager lines or through GraphedStep."""

import contextlib

import torch
from training import batch_for, built

import apt_ext
from apt_ext import Controller, GraphedStep, adapters


def on(device, batch):
    return {name: value.to(device) for name, value in batch.items()}


@contextlib.contextmanager
def exact():
    """Attention whose backward is the same twice."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


def eager(model, batch, divide=1):
    """What GraphedStep stands for."""
    out = model(**batch)
    (out.loss / divide).backward()
    return out


def run(
    family,
    graph,
    steps=16,
    device="cuda",
    dtype=torch.float32,
    micro=1,
    padded=False,
    set_to_none=True,
    at=None,
    controlled=True,
    controller=None,
    **config,
):
    """Return {name: [tensors of each step]} of losses, gradients, masks and weights, and the GraphedStep (None: the eager lines).

    at  {step: what is done before it, given model and optimizer}
    """
    model, _ = built(family, **config)
    model.to(device, dtype)
    optimizer = torch.optim.AdamW(apt_ext.adapter_parameters(model), lr=1e-3)
    schedule = {"schedule": {"start": 2, "end": steps - 2, "events": 3}}
    driver = Controller(model, optimizer, steps, **{**schedule, **(controller or {})}) if controlled else None
    step = GraphedStep(model, accumulate=micro) if graph else None
    found = {name: [] for name in ("loss", "grad", "mask", "weight", "score")}
    with exact():
        for i in range(steps):
            if at and i in at:
                at[i](model, optimizer)
            for j in range(micro):
                batch = on(device, batch_for(family, i * micro + j))
                if padded:
                    mask = torch.ones_like(batch["input_ids"])
                    mask[0, -2:] = 0 if (i + j) % 3 else 1
                    batch["attention_mask"] = mask
                out = step(**batch) if step is not None else eager(model, batch, micro)
                found["loss"].append(out.loss.detach().clone())
            found["grad"].append([p.grad.clone() for p in apt_ext.adapter_parameters(model) if p.grad is not None])
            if driver:
                driver.observe()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
            if driver:
                driver.step()
            found["mask"].append([mask for _, a in adapters(model) for mask in a.get_masks()])
            found["weight"].append([p.detach().clone() for p in apt_ext.adapter_parameters(model)])
            if driver:
                found["score"].append([driver.scores.salience.scores[name].clone() for name in sorted(driver.scores.salience.scores)])
    return found, step, model


def same(first, second):
    """The first name and step at which two runs differ; None where they are equal to the bit."""
    for name in first:
        assert len(first[name]) == len(second[name])
        for i, (a, b) in enumerate(zip(first[name], second[name], strict=True)):
            a, b = (one if isinstance(one, list) else [one] for one in (a, b))
            if len(a) != len(b) or not all(torch.equal(x, y) for x, y in zip(a, b, strict=True)):
                return name, i
    return None
