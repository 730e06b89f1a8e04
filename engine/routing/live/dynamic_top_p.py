"""`moe.router=dynamic_top_p`: each token takes experts until their probabilities pass a threshold ("Harder Tasks Need
More Experts", Huang et al., ACL 2024, arXiv 2403.07652). It replaces top k: sure tokens use few experts, others more.
XMoE's threshold router (arXiv 2403.18926) is the same rule. For studies of dynamic numbers of experts; `top_p` is
its planned form.

The threshold decides how many experts a token uses. `k` is then only the mean that is asked for: FLOPs, certificates
and the choice of the exchange count with it, and training does not hold to it; metrics have the number of expert rows.

Letters: T tokens, D width, E experts.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreroute.engine.config import MoEConfig
from foreroute.engine.config.option import option
from foreroute.engine.routing.live_router import (
    LiveRoute,
    LiveRouter,
    count_all,
    gate_logits,
    gate_weight,
    masked_route,
)
from foreroute.engine.routing.losses import balance_loss, z_loss
from foreroute.engine.routing.method_options import Card, read_options


@dataclass
class Options:
    """The method's own options."""

    threshold: float = option(
        0.4, "Sum of probabilities that a token's experts reach. Larger: more experts.", at_least=0, below=1
    )
    entropy_loss: float = option(
        1e-4, "Weight of the mean entropy of the probabilities (nats). Larger: fewer experts.", at_least=0
    )


class DynamicTopPRouter(LiveRouter):
    """p = softmax(x W^T), in falling order; an expert is chosen if the ones before it sum up to at most the threshold.

    So the expert that crosses the threshold is the last one, and at least one is chosen. The weights are the
    probabilities as they are, not divided by their sum. The loss is the balance loss E sum_e f_e P_e, where f_e is the
    share of tokens that chose e, and the mean entropy of p, which keeps p from becoming flat and all experts active.
    """

    card = Card(
        "experts in order of softmax probability until their sum passes a threshold, weights as they are",
        "Harder Tasks Need More Experts, arXiv 2403.07652; XMoE, arXiv 2403.18926",
        "as learned; the number of rows depends on the text, and one rank's host waits for it, too",
        "studies of dynamic numbers of experts",
    )
    uses = ("balance_loss", "balance_over", "z_loss", "options")
    balances = True

    def __init__(self, width: int, moe: MoEConfig, layer: int = 0) -> None:
        super().__init__(width, moe, layer)
        self.options = read_options(moe, Options)
        self.gate_weight = nn.Parameter(gate_weight(width, moe.experts))
        self.balance_weight, self.z_weight = moe.balance_loss, moe.z_loss

    def forward(self, x_TD: Tensor, k: int, carried: Tensor | None = None) -> LiveRoute:
        """Route hidden states [T, D] to the experts that the threshold asks for; k changes nothing."""
        logits_TE = gate_logits(x_TD, self.gate_weight)
        share_TE = logits_TE.softmax(dim=1)
        sorted_TE, expert_TE = share_TE.detach().sort(dim=1, descending=True, stable=True)
        before_TE = F.pad(sorted_TE.cumsum(dim=1)[:, :-1], (1, 0))
        chosen_TE = torch.empty_like(before_TE, dtype=torch.bool)
        chosen_TE.scatter_(1, expert_TE, before_TE <= self.options.threshold)
        return masked_route(chosen_TE, share_TE, logits_TE)

    def counts(self, live: LiveRoute) -> Tensor:
        """Count the tokens that chose each expert, and all of them, int64 [E + 1]."""
        return count_all(live, self.experts)

    def loss(self, live: LiveRoute, count_E: Tensor) -> Tensor:
        """Return the balance loss, the entropy and the z-loss, each times its weight."""
        loss = self.balance_weight * balance_loss(live.logits_TE, count_E[:-1], total=count_E[-1])
        log_share_TE = live.logits_TE.log_softmax(dim=1)
        entropy = -(log_share_TE.exp() * log_share_TE).sum(dim=1).mean()
        return loss + self.options.entropy_loss * entropy + self.z_weight * z_loss(live.logits_TE)


ROUTER = DynamicTopPRouter
