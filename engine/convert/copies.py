"""Sparse upcycling (Komatsuzaki et al. 2023, arXiv 2212.05055): every expert is the dense feed-forward.

A token's weights sum to 1, so before training the layer returns what the feed-forward returned, at every k. Noise makes
the experts differ from the start; then the outputs differ, too. At k = E a pass costs E times the feed-forward.

Letters: D width, F hidden width, E experts.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from foreroute.engine.config import MoEConfig
from foreroute.engine.convert.dense import Dense
from foreroute.engine.convert.start import Converted, Start
from foreroute.engine.errors import require


@dataclass(frozen=True)
class Copies(Start):
    """Copies of the feed-forward.

    `noise`: standard deviation of what is added to each expert's matrices, as a share of that of the matrix; 0 for
    none.
    """

    kind = "copy"
    noise: float = 0.0

    def __post_init__(self) -> None:
        require(0 <= self.noise <= 1, f"noise={self.noise}: must be in 0 .. 1")

    def section(self, moe: MoEConfig, dense: Dense) -> MoEConfig:
        """Return the options with experts as wide as the feed-forward."""
        return replace(moe, expert_width=dense.hidden, activation=dense.activation)

    def convert(self, dense: Dense, moe: MoEConfig, module: nn.Module, seed: int) -> Converted:
        """Copy the weights."""
        generator = torch.Generator().manual_seed(seed)
        weights = {key: value for key, value in dense.weights.items() if key != "b3"}
        return Converted({key: self._copied(value, moe.experts, generator) for key, value in weights.items()})

    def _copied(self, value: Tensor, experts: int, generator: torch.Generator) -> Tensor:
        copies = value.expand(experts, *value.shape)
        if self.noise == 0.0 or value.dim() < 2:
            return copies
        drawn = torch.randn(copies.shape, generator=generator).to(value)
        return copies + self.noise * value.std() * drawn
