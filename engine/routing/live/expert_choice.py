"""`moe.router=expert_choice`: experts choose tokens (Zhou et al., NeurIPS 2022, arXiv 2202.09368). It replaces the
balance loss: every expert has equally many tokens by construction. A token has any number of experts, none too.

The choice is local: each expert takes its tokens among those of a rank's micro-batch. It is not causal: whether a token
gets an expert depends on tokens to the right of it. So a language model's loss is not that of predicting the next
symbol, held-out numbers are too good, and generation, symbol by symbol, chooses otherwise. For encoders, and for
comparisons.

Letters: T tokens of a rank, D width, E experts.
"""

import torch
from torch import Tensor, nn

from foreroute.engine.config import MoEConfig
from foreroute.engine.routing.live_router import LiveRoute, LiveRouter, gate_logits, gate_weight, masked_route
from foreroute.engine.routing.method_options import Card


class ExpertChoiceRouter(LiveRouter):
    """s = softmax(x W^T) over the experts; each expert takes the C = T k / E tokens with its largest s, weighted by s.

    C is rounded down, but at least 1.
    """

    card = Card(
        "each expert takes the T k / E tokens of a rank with its largest softmax probability, which is the weight",
        "Zhou et al., arXiv 2202.09368",
        "as frozen, and the gate's gradient; no loss; no counts on one rank, or where all rows go to all ranks",
        "exact balance where the order of tokens does not matter; not causal",
    )

    def __init__(self, width: int, moe: MoEConfig, layer: int = 0) -> None:
        super().__init__(width, moe, layer)
        self.gate_weight = nn.Parameter(gate_weight(width, moe.experts))

    def forward(self, x_TD: Tensor, k: int, carried: Tensor | None = None) -> LiveRoute:
        """Route hidden states [T, D]; k experts each, on average."""
        logits_TE = gate_logits(x_TD, self.gate_weight)
        share_TE = logits_TE.softmax(dim=1)
        tokens = len(share_TE)
        capacity = min(max(tokens * k // self.experts, 1), tokens)
        token_CE = share_TE.detach().topk(capacity, dim=0).indices
        chosen_TE = torch.zeros_like(share_TE, dtype=torch.bool).scatter(0, token_CE, True)
        return masked_route(chosen_TE, share_TE, logits_TE, rows=capacity * self.experts, even=True)


ROUTER = ExpertChoiceRouter
