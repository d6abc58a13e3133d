"""Tell once, by the logger "apt_ext", of adapters that learn nothing and of growth that recompiles."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from ...adapter.layer import APTAdapter
from ...common.checks import listed
from ...distributed.dtensor import is_sharded
from ...wrapping.module_hooks import is_compiled

logger = logging.getLogger("apt_ext")


class Advice:
    """Say each of these things at most once.

    adapters  {name: adapter} of those with a rank above 0
    """

    def __init__(self, adapters: Mapping[str, APTAdapter]) -> None:
        self.adapters = adapters
        self._said: set[str] = set()

    def of_gradients(self) -> None:
        """Name the adapters whose trainable factors have no gradient although those of others have one.

        Sharded factors do not count, since FSDP2 holds their gradients back. Merged adapters have a warning
        of their own.
        """
        if "gradients" in self._said:
            return
        without = [name for name, adapter in self.adapters.items() if _learns_nothing(adapter)]
        trained = (factor for adapter in self.adapters.values() for factor in _trained(adapter))
        if without and any(factor.grad is not None for factor in trained):
            self._said.add("gradients")
            logger.warning(
                "observe: %d of %d adapters got no gradient although others did: %s. The forward of such a "
                "linear was not called, or its output was not used. A loss that reads the linear's weight "
                "(Liger, cut-cross-entropy, the fused output layer of TRL) goes round the adapter: call "
                "the linear, or leave it out with exclude_modules. An expert that no token was routed to, "
                "or a layer that this step left out, learns in the steps that use it",
                len(without),
                len(self.adapters),
                listed(without, 6),
            )

    def of_growth(self, model: nn.Module, growing: Iterable[str]) -> None:
        """Say that a compiled `model` compiles again whenever one of `growing` without max_rank grows."""
        moving = [name for name in growing if self.adapters[name].max_rank is None]
        if moving and "growth" not in self._said and is_compiled(model):
            self._said.add("growth")
            logger.warning(
                "Controller: the model is compiled, and ranks grow in %d adapters without max_rank, %s "
                "first: their factors change shape, so torch.compile compiles again after each growth, "
                "which takes minutes, and gives up at its recompile limit; build the model with "
                "APTConfig(max_rank=...), within which ranks grow without compiling, or let none grow with "
                "growth=1",
                len(moving),
                moving[0],
            )


def _trained(adapter: APTAdapter) -> list[Tensor]:
    return [factor for factor in (adapter.lora_A, adapter.lora_B) if factor.requires_grad]


def _learns_nothing(adapter: APTAdapter) -> bool:
    factors = _trained(adapter)
    without = all(factor.grad is None and not is_sharded(factor) for factor in factors)
    return bool(factors) and without and not adapter.merged
