"""The method: what is salient, which blocks stay, when masks move and which adapters grow. Everything here works on any model
whose structure gives blocks and adapters, and knows no architecture."""

from .allocation import AdapterImportance, grown_ranks
from .distillation import Distiller
from .oneshot import one_shot
from .salience import Salience
from .schedule import cubic_density, distill_weight, linear_budget, step_mask
from .selection import kept_count, top_k

__all__ = [
    "AdapterImportance",
    "Distiller",
    "Salience",
    "cubic_density",
    "distill_weight",
    "grown_ranks",
    "kept_count",
    "linear_budget",
    "one_shot",
    "step_mask",
    "top_k",
]
