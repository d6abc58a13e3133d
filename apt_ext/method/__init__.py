"""The method: what is salient, which blocks stay, when masks move and which adapters grow. Everything here works on any model
whose structure gives blocks and adapters, and knows no architecture."""

from .allocation import AdapterImportance, Growth, grown_ranks
from .controller import Controller
from .cost import Cost, Latency, Products, cost_of
from .distillation import Distiller
from .kurtosis import kurtosis
from .latency import measure_latency
from .oneshot import block_scores, one_shot, within_density
from .salience import Salience
from .schedule import Steps, cubic_density, distill_weight, linear_budget, step_mask
from .scores import BlockScores
from .search import Group, search
from .selection import top_k

__all__ = [
    "AdapterImportance",
    "BlockScores",
    "Controller",
    "Cost",
    "Distiller",
    "Group",
    "Growth",
    "Latency",
    "Products",
    "Salience",
    "Steps",
    "block_scores",
    "cost_of",
    "cubic_density",
    "distill_weight",
    "grown_ranks",
    "kurtosis",
    "linear_budget",
    "measure_latency",
    "one_shot",
    "search",
    "step_mask",
    "top_k",
    "within_density",
]
