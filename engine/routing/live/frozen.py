"""`moe.router=frozen`: SMoE-Dropout's router (Chen et al., ICLR 2023, arXiv 2303.01610), a random linear gate that is
never trained. It costs no gradient and no balance loss; but its experts depend on hidden states, so counts are
exchanged in every layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from foreroute.engine.config import MoEConfig
from foreroute.engine.config.option import option
from foreroute.engine.routing.live_router import LiveRoute, LiveRouter, gate_logits, gate_weight, top_k_route
from foreroute.engine.routing.method_options import Card, read_options


@dataclass
class Options:
    """The method's own options."""

    sum: bool = option(
        False,
        "Each of the k experts counts 1, as slices of one feed-forward do, instead of the softmax; then no gradient"
        " flows through the weights.",
    )


class FrozenRouter(LiveRouter):
    """logits = x W^T + b with W ~ N(0, 0.02^2) and b = 0, top k, softmax over those k.

    The gradient flows through the weights into x, not into W: the gate is held in buffers. It is part of the model's
    state. With moe.options.sum each of the k has the weight 1.
    """

    card = Card(
        "top k of a random linear gate that is never trained, softmax over those k",
        "SMoE-Dropout, arXiv 2303.01610",
        "the gate, one exchange of counts that the host waits for, and one of weights",
        "SMoE-Dropout to the letter",
    )
    uses = ("options",)
    gate_weight: Tensor
    gate_bias: Tensor

    def __init__(self, width: int, moe: MoEConfig, layer: int = 0) -> None:
        super().__init__(width, moe, layer)
        self.options = read_options(moe, Options)
        self.register_buffer("gate_weight", gate_weight(width, moe.experts))
        self.register_buffer("gate_bias", torch.zeros(moe.experts))

    def forward(self, x_TD: Tensor, k: int, carried: Tensor | None = None) -> LiveRoute:
        """Route hidden states [T, D] to k experts each."""
        live = top_k_route(gate_logits(x_TD, self.gate_weight, self.gate_bias), k)
        if not self.options.sum:
            return live
        return live._replace(route=live.route._replace(weight_TK=torch.ones_like(live.route.weight_TK)))


ROUTER = FrozenRouter
