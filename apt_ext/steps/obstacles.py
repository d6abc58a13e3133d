"""What keeps a model's steps from being captured, as far as it can be seen without trying."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as hooks_of_all

from ..distributed.dtensor import is_sharded

_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # torch's registries of a module
_COLLECTING = "transformers.utils.output_capturing"
_GLOBAL = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")


def obstacle(model: nn.Module) -> str | None:
    """Return why no graph can be captured of `model`, in words, or None."""
    for name, module in model.named_modules():
        where = f"{name or 'the model'} ({type(module).__name__})"
        if type(module).__name__ in _WRAPPERS:
            return f"{where} exchanges gradients with other processes, which a graph would not do"
        for hooks in (getattr(module, one) for one in HOOKS):
            other = next((hook for hook in hooks.values() if not _is_own(hook)), None)
            if other is not None:
                return f"{where} has the hook {_name_of(other)}, which a replay would not call"
    for one in _GLOBAL:
        other = next(iter(getattr(hooks_of_all, one, {}).values()), None)
        if other is not None:
            return f"all modules have the hook {_name_of(other)}, which a replay would not call"
    devices = set()
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            return f"FSDP has sharded {name}, and a graph would not gather it"
        if parameter.requires_grad and (parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)):
            return f"{name} has a hook on its gradient, which a replay would not call"
        devices.add(parameter.device)
    if len(devices) > 1:
        return f"the model is on {len(devices)} devices ({', '.join(sorted(map(str, devices)))}), and a graph is of one"
    return None


def _is_own(hook: object) -> bool:
    """Whether what a hook hears is part of the graph: those of this package, and those by which transformers collects hidden states."""
    module: str = getattr(hook, "__module__", "")
    return type(hook).__module__.startswith("apt_ext.") or module.startswith(("apt_ext.", _COLLECTING))


def _name_of(hook: object) -> str:
    return getattr(hook, "__qualname__", type(hook).__name__)
