"""apt_ext: fine-tune with low-rank adapters while pruning, and end with a smaller ordinary model (APT, arXiv 2401.12200)."""

from . import _load  # first: refuses a torch this build does not fit, in words  # isort: skip
from . import ops, reference
from ._version import __version__
from .adapter.layer import APTAdapter
from .config import APTConfig, Schedule
from .exporting.directories import export
from .exporting.peft_directories import to_peft
from .exporting.shrinking import shrink
from .method.controller import Controller
from .method.planner import Plan, plan
from .method.select.rank_budget import Growth
from .model import APTModel, adapter_parameters, adapters, get_apt_model
from .optim.hold_pruned import hold_pruned
from .pruning.architectures.lookup import Architecture, BlockRule, Layers, Side, Stream, register_architecture
from .reporting.writing import report
from .steps.graphed import GraphedStep
from .storage.per_layer import load_export

__all__ = [
    "APTAdapter",
    "APTConfig",
    "APTModel",
    "Architecture",
    "BlockRule",
    "Controller",
    "GraphedStep",
    "Growth",
    "Layers",
    "Plan",
    "Schedule",
    "Side",
    "Stream",
    "__version__",
    "adapter_parameters",
    "adapters",
    "export",
    "get_apt_model",
    "hold_pruned",
    "load_export",
    "ops",
    "plan",
    "reference",
    "register_architecture",
    "report",
    "shrink",
    "to_peft",
]


def __dir__() -> list[str]:
    return sorted(__all__)
