"""The method: what is salient, which blocks stay, when masks move and which adapters grow. Everything here works on any model
whose structure gives blocks and adapters, and knows no architecture."""

from .controller import Controller
from .cost import Cost, Latency, Products, cost_of
from .distillation import Distiller
from .oneshot import block_scores, one_shot, within_density
from .schedule import Steps, cubic_density, distill_weight, linear_budget, step_mask
from .score.block_scores import BlockScores
from .score.kurtosis import kurtosis
from .score.salience import Salience
from .search import Group, search
from .select.latency import measure_latency
from .select.rank_budget import AdapterImportance, Growth, grown_ranks
from .select.top_k import top_k

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
