"""A student with trained factors, and what its teacher computes."""

import torch
from families import FAMILIES, adapted, with_loss

from apt_ext import APTConfig


def student(name="bert", layers=4, **more):
    """An APTModel with trained factors, a batch, and its family."""
    field = {"distilbert": "n_layers", "gpt2": "n_layer", "t5": "num_layers"}.get(name, "num_hidden_layers")
    apt = adapted(FAMILIES[name], APTConfig(r=2), **{field: layers}, **more)
    return apt, next(with_loss(FAMILIES[name], apt)), FAMILIES[name]


def passed(apt, distiller, batch, progress=1.0):
    return distiller.loss(batch, apt(**batch, **distiller.asks), progress)


def taught(distiller, batch):
    with torch.no_grad():
        outputs = distiller.teacher(**batch, output_hidden_states=True)
    return [outputs.logits, *(getattr(outputs, "hidden_states", None) or outputs.decoder_hidden_states)]
