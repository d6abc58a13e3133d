"""Names that modules had before they moved to `pruning`, `storage`, `exporting` and `method`: the same modules, for old imports."""

import sys
from importlib import import_module

_MOVED = {
    "architecture_table": "pruning.architectures.table",
    "architecture_types": "pruning.architectures.types",
    "architectures": "pruning.architectures.lookup",
    "blocks": "pruning.block_masks",
    "carriers": "pruning.wrappers",
    "cutting": "pruning.cut",
    "export": "exporting.directories",
    "formats": "storage.formats",
    "on_meta": "pruning.on_meta",
    "per_layer": "storage.per_layer",
    "planner": "method.planner",
    "reload": "exporting.reload",
    "row_check": "pruning.row_check",
    "row_file": "storage.row_file",
    "saving": "storage.stock_saving",
    "shrink": "exporting.shrinking",
    "sizes": "pruning.sizes",
    "trials": "storage.trials",
}

for _old, _new in _MOVED.items():
    sys.modules[f"{__name__}.{_old}"] = globals()[_old] = import_module(f"apt_ext.{_new}")
