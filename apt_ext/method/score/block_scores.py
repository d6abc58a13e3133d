"""The salience of every block of a model: where it is listened to, and what of it belongs together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...common.checks import FLOATING, checked_keys, checked_mapping, checked_number
from ...model import APTModel
from ...pruning.architectures.lookup import in_encoder, is_encoder_decoder, side_width
from ...pruning.block_masks import host_mask
from ...pruning.cut import alike
from .kurtosis import outliers, row_outliers
from .salience import Salience


class BlockScores:
    """`Salience` at the linears that read heads and neurons and, for hidden dimensions, at one linear that reads the stream before each.

    A hidden dimension has the sum of its scores there. Layers that have to keep the same heads share the sum of theirs.

    kinds     of "heads", "neurons", "hidden"
    kurtosis  0, or what is added for outliers: kurtosis * (mean score of the kind) * sqrt(max(excess kurtosis, 0)), so that loss scale,
              batch and length, which scale the score, leave the order alone
    """

    def __init__(self, apt: APTModel, kinds: Collection[str], decay: float = 0.85, kurtosis: float = 0.0) -> None:
        self.apt, self.kurtosis = apt, checked_number("kurtosis", kurtosis, 0.0)
        self.blocks = {name: block for name, block in apt.blocks.items() if block.kind in kinds}
        self._alike = alike(apt.model, self.blocks)
        sites: dict[str, tuple[nn.Module, int]] = {}
        self._readers = {name: block.reader for name, block in apt.blocks.items() if block.kind != "hidden"}
        self._stream: dict[str, str] = {}  # {site: the block before which it reads the stream}
        for name, reader in self._readers.items():
            if name in self.blocks or (kurtosis and "hidden" in self.blocks):
                sites[name] = self._module(reader), apt.blocks[name].count
        if "hidden" in self.blocks:
            for name in self._readers:
                site = f"hidden {apt.blocks[name].linear('q', 'up')}"
                self._stream[site] = name
                sites[site] = self._module(site.removeprefix("hidden ")), self.blocks["hidden"].count
        signed = [name for name in self._readers if name in sites and (apt.blocks[name].kind == "heads" or "hidden" in self.blocks)]
        behind = [site for site in sites if not in_encoder(apt.model, apt.blocks[self._stream.get(site, site)])]
        decoder = behind if is_encoder_decoder(apt.model) else ()
        self._sites = {site: "hidden" if site in self._stream else site for site in sites}  # {site: block}
        self._readers_of = {site: module for site, (module, _) in sites.items()}
        self.salience = Salience(apt.model, sites, decay, signed if kurtosis else (), decoder)
        self._outliers: dict[str, Tensor] = {}  # of the weights at the last look

    def _module(self, name: str) -> nn.Module:
        return self.apt.model.get_submodule(name)

    def follow_cut(self, kept: Mapping[str, Tensor]) -> bool:
        """The model was cut, and of each block what `kept` ([count] bool, on the host) says is left.

        False where a backward before the cut was heard, which is forgotten.
        """
        self.blocks = {name: self.apt.blocks[name] for name in self.blocks}
        self.salience.select({site: kept[block] for site, block in self._sites.items()})
        fits = all(len(found[0]) == side_width(self._readers_of[site], "in") for site, found in self.salience.sums().items())
        if not fits:
            self.salience.forget()
        self._outliers = {name: value[kept[name].to(value.device)] for name, value in self._outliers.items()}
        return fits

    def look_for_outliers(self) -> None:
        """Read the weights for the kurtosis: some passes over them, so not at every step."""
        if not self.kurtosis:
            return
        salience, found = self.salience, {}
        for name, block in self.blocks.items():
            if block.kind != "hidden":
                found[name] = outliers(self._module(block.reader), salience.means.get(name), block.count)
        if "hidden" in self.blocks:
            rows = [row_outliers(self._module(reader), salience.means.get(name)) for name, reader in self._readers.items()]
            found["hidden"] = torch.stack(rows).sum(0)
        self._outliers = found

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor]:
        """{block: [count] float32 on the host}; a block that no gradient reached counts 0. Waits for the device once."""
        averages, blocks = self.salience.scores, self.blocks
        like = next(iter(averages.values()), torch.zeros((), device="cpu"))
        found = {name: averages.get(name, like.new_zeros(block.count)) for name, block in blocks.items()}
        if "hidden" in blocks:
            found["hidden"] = sum((averages[site] for site in self._stream if site in averages), found["hidden"])
        for kind in {block.kind for block in blocks.values()} if self._outliers else ():
            names = [name for name, block in blocks.items() if block.kind == kind]
            there = torch.cat([found[name][self._kept(name).to(found[name].device)] for name in names])
            mean = there.mean() if len(there) else 0.0
            found |= {name: found[name] + self.kurtosis * mean * self._outliers[name] for name in names}
        for group in self._alike:
            found |= dict.fromkeys(group, sum((found[name] for name in group), torch.zeros((), device=like.device)))
        flat = torch.cat([found[name].float() for name in blocks]).cpu() if blocks else torch.zeros(0, device="cpu")
        return dict(zip(blocks, torch.split(flat, [block.count for block in blocks.values()]), strict=True))

    def _kept(self, name: str) -> Tensor:
        """Which of a block are there in any way, so that a mask and a cut give the same: [count] bool, on the host."""
        return host_mask(self.apt.model, self.blocks[name]) != 0

    def state_dict(self) -> dict[str, Any]:
        return {"salience": self.salience.state_dict(), "outliers": {name: value.clone() for name, value in self._outliers.items()}}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """TypeError or ValueError unless `state` is that of BlockScores of these blocks."""
        self.salience.check_state(checked_keys("state", state, ("salience", "outliers"))["salience"])
        for name, value in checked_mapping("state['outliers']", state["outliers"]).items():
            if not isinstance(value, Tensor) or value.dtype not in FLOATING:
                raise TypeError(f"state['outliers'][{name!r}]: expected a floating tensor, got {value!r:.80}")
            if name not in self.blocks or list(value.shape) != [self.blocks[name].count]:
                count = self.blocks[name].count if name in self.blocks else "no"
                raise ValueError(f"state: expected {count} outliers for {name!r}, got shape {list(value.shape)}")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises TypeError or ValueError, with nothing changed, for other blocks than these."""
        self.check_state(state)
        # What a file holds is on the CPU.
        devices = {site: next(module.parameters()).device for site, module in self._readers_of.items()}
        other = next(iter(devices.values()), torch.device("cpu"))

        def placed(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: value.to(devices.get(name, other), copy=True) for name, value in values.items()}

        self.salience.load_state_dict({key: placed(values) for key, values in state["salience"].items()})
        self._outliers = placed(state["outliers"])
