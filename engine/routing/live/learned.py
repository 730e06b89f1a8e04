"""`moe.router=learned`: top k of a trained linear gate with the balance loss of Switch Transformer (arXiv 2101.03961)
and the z-loss of ST-MoE (arXiv 2202.08906). What most models with experts have, and what planned routers replace.
"""

import torch
from torch import Tensor, nn

from foreroute.engine.config import MoEConfig
from foreroute.engine.routing.live_router import LiveRoute, LiveRouter, gate_logits, gate_weight, top_k_route
from foreroute.engine.routing.losses import balance_loss, z_loss
from foreroute.engine.routing.method_options import Card


class LearnedRouter(LiveRouter):
    """The same gate as FrozenRouter's with trainable parameters."""

    card = Card(
        "top k of a trained linear gate, softmax over those k, with balance loss and z-loss",
        "Switch Transformer, arXiv 2101.03961; ST-MoE, arXiv 2202.08906",
        "as frozen, and the gate's gradient and losses",
        "comparisons with what most models have",
    )

    uses = ("balance_loss", "balance_over", "z_loss")
    balances = True

    def __init__(self, width: int, moe: MoEConfig, layer: int = 0) -> None:
        super().__init__(width, moe, layer)
        self.gate_weight = nn.Parameter(gate_weight(width, moe.experts))
        self.gate_bias = nn.Parameter(torch.zeros(moe.experts))
        self.balance_weight, self.z_weight = moe.balance_loss, moe.z_loss

    def forward(self, x_TD: Tensor, k: int, carried: Tensor | None = None) -> LiveRoute:
        """Route hidden states [T, D] to k experts each."""
        return top_k_route(gate_logits(x_TD, self.gate_weight, self.gate_bias), k)

    def loss(self, live: LiveRoute, count_E: Tensor) -> Tensor:
        """Return the balance loss and the z-loss."""
        loss = self.balance_weight * balance_loss(live.logits_TE, count_E)
        return loss + self.z_weight * z_loss(live.logits_TE)


ROUTER = LearnedRouter
