"""apt_ext: fine-tune with low-rank adapters while pruning, and end with a smaller ordinary model (APT, arXiv 2401.12200)."""

from . import _load  # first: refuses a torch this build does not fit, in words  # isort: skip
from . import ops, reference
from ._version import __version__
from .adapter import APTAdapter
from .config import APTConfig, Schedule
from .hold import hold_pruned
from .method.allocation import Growth
from .method.controller import Controller
from .model import APTModel, adapter_parameters, adapters, get_apt_model
from .structure.architectures import Architecture, BlockRule, Layers, Side, Stream, register_architecture
from .structure.export import export
from .structure.per_layer import load_export
from .structure.planner import Plan, plan
from .structure.shrink import shrink

__all__ = [
    "APTAdapter",
    "APTConfig",
    "APTModel",
    "Architecture",
    "BlockRule",
    "Controller",
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
    "shrink",
]
