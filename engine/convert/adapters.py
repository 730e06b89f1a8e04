"""Adapters as experts over a frozen model (PESC, Wu et al. 2024, arXiv 2401.02731).

    y = FFN(x);  out = y + scale * sum_i w_i e_i(y),   e_i(y) = W_up gelu(W_down y)

FFN is the dense feed-forward, frozen with the rest of the model: gradients reach the adapters and, if it is live, their
router alone. W_up begins with zeros, so before training the outputs are those of the model bit for bit. A token's
weights sum to 1, so that sum_i w_i (y + e_i(y)) of the paper is the sum above. A live router reads x, as in the paper,
or what its experts read, y.

Letters: D width, F hidden width of an adapter, E experts.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from foreroute.engine.config import Activation, MoEConfig
from foreroute.engine.convert.dense import Dense
from foreroute.engine.convert.start import Converted, Start
from foreroute.engine.errors import require
from foreroute.engine.routing.methods import live_method


class AdaptedFeedForward(nn.Module):
    """A frozen feed-forward and experts that read its output.

    Args:
        router_reads_input: the experts' live router reads what the feed-forward reads.
    """

    def __init__(self, base: nn.Module, scale: float, router_reads_input: bool) -> None:
        super().__init__()
        self.base, self.scale, self.router_reads_input = base, scale, router_reads_input
        self.experts: nn.Module = nn.Identity()  # set later: the expert layer

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x [..., D]."""
        y: Tensor = self.base(x)
        y = y + self.scale * (self.experts(y, x) if self.router_reads_input else self.experts(y))
        return y


@dataclass(frozen=True)
class Adapters(Start):
    """Adapters of `width` hidden units; `scale` multiplies their sum.

    `router_reads_input`: a live router reads the feed-forward's input, otherwise its output.
    """

    kind = "adapters"
    freezes = True
    width: int = 64
    scale: float = 1.0
    router_reads_input: bool = True

    def __post_init__(self) -> None:
        require(self.width >= 1, f"width={self.width}: must be at least 1")

    def section(self, moe: MoEConfig, dense: Dense) -> MoEConfig:
        """Return the options with experts that are adapters."""
        return replace(moe, expert_width=self.width, activation=Activation.gelu)

    def convert(self, dense: Dense, moe: MoEConfig, module: nn.Module, seed: int) -> Converted:
        """Draw W_down from N(0, 1/D) and set W_up to zeros."""
        generator = torch.Generator().manual_seed(seed)
        width = dense.weights["w1"].shape[1]
        down = torch.randn(moe.experts, self.width, width, generator=generator) * width**-0.5
        reads_input = self.router_reads_input and live_method(moe) is not None
        around = AdaptedFeedForward(module, self.scale, reads_input)
        return Converted({"w1": down, "w2": torch.zeros_like(down)}, around)
