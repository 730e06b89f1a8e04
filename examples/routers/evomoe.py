"""EvoMoE's dense-to-sparse gate (Nie et al. 2021, arXiv 2112.14397): all experts at first, few in the end.

It replaces top k, which has to choose before it knows the experts. In training the weights are p, the softmax of
(log softmax(x W) + g) / tau with Gumbel noise g. A token has the experts with p above a threshold, and p is not
normalised again. The temperature tau falls linearly from step to step, and with it the number of experts. At evaluation
a token has the k most likely experts without noise, each weighted by its probability; published is k = 1.

In training k is not used: moe.options.start and end say how many experts a token has. The balance loss is that of
Switch Transformer with the experts that tokens have. The published first phase, one expert that becomes E copies, is
not a router's and left out. The example shows a router that changes by itself after each step (`after_step`).

Letters: T tokens, D width, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foreroute.engine.config import MoEConfig
from foreroute.engine.config.option import option
from foreroute.engine.routing.live_router import LiveRoute, LiveRouter, gate_logits, gate_weight, masked_route
from foreroute.engine.routing.losses import balance_loss
from foreroute.engine.routing.method_options import Card, read_options
from foreroute.engine.routing.plan import Route


@dataclass
class Options:
    """The method's own options."""

    start: float = option(2.0, "Temperature at the first step. Larger: more even weights.", above=0)
    end: float = option(0.3, "Temperature from step moe.options.steps on. Smaller: fewer experts.", above=0)
    steps: int = option(1000, "Steps in which the temperature falls.", at_least=1)
    threshold: float = option(0.001, "Weight above which a token has an expert.", at_least=0, below=1)
    noise: float = option(1.0, "Factor of the Gumbel noise; 0 for none.", at_least=0)


class DenseToSparseRouter(LiveRouter):
    """The gate of one layer."""

    card = Card(
        "all experts with a Gumbel-softmax weight above a threshold, at a temperature that falls",
        "EvoMoE, arXiv 2112.14397",
        "as learned; at first the arithmetic of all experts",
        "runs that can afford a dense beginning",
    )
    uses = ("options", "balance_loss", "balance_over")
    balances = True
    steps: Tensor

    def __init__(self, width: int, moe: MoEConfig, layer: int = 0) -> None:
        super().__init__(width, moe, layer)
        self.options, self.balance_weight = read_options(moe, Options), moe.balance_loss
        self.gate_weight = nn.Parameter(gate_weight(width, moe.experts))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x_TD: Tensor, k: int, carried: Tensor | None = None) -> LiveRoute:
        """Route hidden states [T, D]."""
        logits_TE = gate_logits(x_TD, self.gate_weight)
        if not self.training:
            top_TK, expert_TK = logits_TE.softmax(dim=1).topk(k)
            return LiveRoute(Route(expert_TK, top_TK), logits_TE)
        noise_TE = -torch.empty_like(logits_TE).exponential_().log()
        noisy_TE = logits_TE.log_softmax(dim=1) + self.options.noise * noise_TE
        weight_TE = (noisy_TE / self.temperature()).softmax(dim=1)
        return masked_route(weight_TE > self.options.threshold, weight_TE, logits_TE)

    def temperature(self) -> Tensor:
        """Return the temperature of the next step, a scalar on the device."""
        share = (self.steps.double() / self.options.steps).clamp(max=1.0)
        return self.options.start + share * (self.options.end - self.options.start)

    def loss(self, live: LiveRoute, count_E: Tensor) -> Tensor:
        """Return the balance loss."""
        return self.balance_weight * balance_loss(live.logits_TE, count_E)

    def after_step(self, count_E: Tensor) -> None:
        """Count the step."""
        self.steps += 1
