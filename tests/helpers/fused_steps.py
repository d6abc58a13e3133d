"""Fused optimizers on Parameters of another size than their state: a program of its own, as without the guard it crashes."""

import torch
from torch import nn

from apt_ext.optim.resize import Resize, resize_parameters
from apt_ext.optim.step_guard import guard

P = torch.optim
for make in (
    lambda p: P.AdamW(p, fused=True),
    lambda p: P.Adam(p, fused=True, amsgrad=True),
    lambda p: P.SGD(p, lr=0.1, momentum=0.9, fused=True),
    lambda p: P.Adagrad(p, fused=True),
):
    for how in ("growth", "load", "grad", "closure"):
        p = nn.Parameter(torch.ones(64, 64))
        optimizer = make([p])
        p.grad = torch.ones(64, 64)
        optimizer.step()
        guard(p)
        if how == "growth":
            resize_parameters([Resize(p, torch.ones(4096, 64), 0)])
        elif how == "load":
            saved = optimizer.state_dict()
            p = nn.Parameter(torch.ones(4096, 64))
            guard(p)
            optimizer = make([p])
            optimizer.load_state_dict(saved)
        elif how == "closure":
            kept = (p * 2.0).sum()
            resize_parameters([Resize(p, torch.ones(4096, 64), 0)], optimizer)
            p.grad = None
        else:
            resize_parameters([Resize(p, torch.ones(4096, 64), 0)], optimizer)
            with torch.no_grad():  # another size behind our back, the gradient stays
                p.set_(torch.ones(64, 64))
                p.grad = torch.ones(64, 64)
                p.set_(torch.ones(4096, 64))
        if how in ("growth", "load"):
            p.grad = torch.ones(4096, 64)
        value, state = p.detach().clone(), {k: torch.as_tensor(v).clone() for k, v in optimizer.state.get(p, {}).items()}
        try:
            optimizer.step(kept.backward if how == "closure" else None)
        except RuntimeError as error:
            assert "expected the Parameter's (4096, 64)" in str(error), error
        else:
            raise SystemExit(f"{type(optimizer).__name__} stepped after {how}")
        assert torch.equal(p, value)
        assert all(torch.equal(torch.as_tensor(v), state[k]) for k, v in optimizer.state.get(p, {}).items())
print("fine")
