"""What a base model must not be: one with PEFT's layers in it, or with linears that are quantised."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor, nn

from ..common.checks import FLOATING
from ..distributed.dtensor import is_sharded

# Names of the classes of bitsandbytes, GPTQ, AWQ, HQQ, EETQ, AQLM, quanto, compressed-tensors and their like.
_QUANTISED = re.compile(
    r"quant|(?:4|8)bit|wqlinear|hqq|gptq|awq|eetq|aqlm|spqr|vptq|higgs|bitnet|bitlinear|fp8|fp4|nf4|int8|int4|qlinear|marlin|exllama",
    re.IGNORECASE,
)


def is_of_peft(module: nn.Module) -> bool:
    """Whether the class, or one that it comes from, is PEFT's."""
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__)


def refuse_peft(argument: str, model: nn.Module) -> None:
    """TypeError where PEFT has wrapped the model, or put layers into it."""
    for name, module in model.named_modules():
        if is_of_peft(module):
            where = f" at {name}" if name else ""
            raise TypeError(
                f"{argument}: expected a model without layers of PEFT, got a {type(module).__name__}{where}; its "
                "merge_and_unload() gives the plain model with the update in its weights, and "
                "apt_ext.APTModel.from_peft takes the factors over to train them on"
            )


def is_quantised(module: nn.Module) -> bool:
    """Whether this is a linear with a quantised weight: by the name of its class, or by the weight's class or dtype."""
    name, weight = type(module).__name__, getattr(module, "weight", None)
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and type(weight) is nn.Parameter:
        return weight.dtype not in FLOATING and not weight.dtype.is_complex  # a complex one is refused in other words
    if "linear" in name.lower() and _QUANTISED.search(name) is not None:
        return isinstance(module, nn.Linear) or hasattr(module, "in_features") or next(module.children(), None) is None
    if not isinstance(module, nn.Linear) or not isinstance(weight, Tensor) or is_sharded(weight):
        return False
    return weight.dtype not in FLOATING or _QUANTISED.search(type(weight).__name__) is not None or _is_packed(weight)


def refuse_quantised(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """TypeError naming the first that is quantised, with its class and its weight's."""
    for name, module in modules:
        if is_quantised(module):
            weight = getattr(module, "weight", None)
            held = f" with a weight of type {type(weight).__name__} and dtype {weight.dtype}" if isinstance(weight, Tensor) else ""
            kind = type(module)
            raise TypeError(
                f"{name}: expected a linear with a plain floating weight, got the quantised "
                f"{kind.__module__}.{kind.__name__}{held}; quantised layers cannot be merged or cut: load the model "
                "without quantisation"
            )


def _is_packed(weight: Tensor) -> bool:
    """Whether the weight's class comes from a library of quantised tensors."""
    return type(weight).__module__.partition(".")[0] in ("torchao", "hqq", "bitsandbytes", "optimum", "quanto")
