"""The same training run with a teacher, by the eager lines or through GraphedStep."""

import torch
from graphed_runs import exact, on
from training import batch_for, built

import apt_ext
from apt_ext import Controller, GraphedStep, adapters
from apt_ext.method import Distiller

SIZES = {"t5": {"num_layers": 4}}


def distilled(family, name, graph, steps=24, device="cuda", teacher="self", refresh=(), controller=None, at=None, sizes=None, **settings):
    """Return {name: [tensors of each step]} of losses, gradients, masks, weights and the layers' generator, the step and the Distiller.

    refresh  the steps before which an own teacher is refreshed
    at       {step: what is done before it, given model, optimizer and Distiller}
    """
    model, optimizer = built(family, sizes=sizes or SIZES.get(name, {"num_hidden_layers": 4}))
    model.to(device, torch.float32)
    if teacher == "given":
        teacher = family.model(torch.float32, seed=5, **(sizes or SIZES.get(name, {"num_hidden_layers": 4}))).to(device)
    distiller = Distiller(model, teacher, **{"quarters": 2, **settings})
    optimizer = torch.optim.AdamW([*apt_ext.adapter_parameters(model), *distiller.parameters()], lr=1e-3)
    schedule = {"schedule": {"start": 4, "end": steps - 4, "events": 3}}
    driver = Controller(model, optimizer, steps, **{**schedule, **(controller or {})})
    step = GraphedStep(
        model,
        lambda model, batch: distiller.loss(batch, model(**batch, **distiller.asks), lambda: driver.progress),
        enabled="auto" if graph else False,
    )
    found = {key: [] for key in ("loss", "grad", "mask", "weight", "drawn")}
    with exact():
        for i in range(steps):
            if i in refresh:
                distiller.refresh()
            if at and i in at:
                at[i](model, optimizer, distiller)
            batch = on(device, batch_for(family, i))
            if graph:
                loss = step(**batch)
            else:
                loss = distiller.loss(batch, model(**batch, **distiller.asks), driver.progress)
                loss.backward()
            trained = [*apt_ext.adapter_parameters(model), *distiller.parameters()]
            found["loss"].append(loss.detach().clone())
            found["grad"].append([p.grad.clone() for p in trained if p.grad is not None])
            driver.observe()
            optimizer.step()
            optimizer.zero_grad()
            driver.step()
            found["mask"].append([mask for _, a in adapters(model) for mask in a.get_masks()])
            found["weight"].append([p.detach().clone() for p in trained])
            found["drawn"].append(distiller.state_dict()["generator"])
    return found, step, distiller
