"""`moe.router=adamoe`: top k of experts and null experts (AdaMoE, Zeng et al., arXiv 2406.13233). It replaces top k: a
token whose k contain null experts uses fewer experts with rows, none where all are null. For studies of dynamic numbers
of experts; a planned router with moe.null_experts is its planned form.

Letters: T tokens, D width, E experts, X of them and the null experts.
"""

import torch
from torch import Tensor, nn

from foreroute.engine.config import MoEConfig
from foreroute.engine.errors import require
from foreroute.engine.routing.live_router import (
    LiveRoute,
    LiveRouter,
    count_all,
    gate_logits,
    gate_weight,
    masked_route,
    top_k_mask,
)
from foreroute.engine.routing.losses import balance_loss, z_loss
from foreroute.engine.routing.method_options import Card


class AdaMoERouter(LiveRouter):
    """p = softmax(x W^T) over all X, of which the k largest are chosen; weights are p / sum of p over chosen experts
    that have rows.

    The balance loss X sum_i f_i P_i has for each null expert the mean f of all of them: it holds experts to equal load,
    and leaves open which of the null experts, all alike, a token takes. f_i is the share of tokens that chose i. The
    published code takes that mean over another axis, where it changes nothing; this is what the paper says.
    """

    card = Card(
        "top k of experts and null experts, weights renormalised over those with rows; null-aware balance loss",
        "AdaMoE, arXiv 2406.13233",
        "as learned, with fewer rows; one rank's host waits for their number, too",
        "studies of dynamic numbers of experts",
    )
    uses = ("null_experts", "balance_loss", "balance_over", "z_loss")
    balances = True

    def __init__(self, width: int, moe: MoEConfig, layer: int = 0) -> None:
        """Make the router of a layer.

        Raises:
            UserError: there is no null expert.
        """
        super().__init__(width, moe, layer)
        self.nulls = moe.null_experts
        require(self.nulls > 0, f"moe.null_experts={self.nulls}: must be at least 1 for moe.router=adamoe")
        self.gate_weight = nn.Parameter(gate_weight(width, moe.columns))
        self.balance_weight, self.z_weight = moe.balance_loss, moe.z_loss

    def forward(self, x_TD: Tensor, k: int, carried: Tensor | None = None) -> LiveRoute:
        """Route hidden states [T, D] to k experts and null experts each."""
        logits_TX = gate_logits(x_TD, self.gate_weight)
        chosen_TX = top_k_mask(logits_TX, k)
        chosen_TE = chosen_TX[:, : self.experts]
        share_TE = logits_TX.softmax(dim=1)[:, : self.experts].masked_fill(~chosen_TE, 0.0)
        sum_T1 = share_TE.sum(dim=1, keepdim=True)
        weight_TE = share_TE / sum_T1.masked_fill(~chosen_TE.any(dim=1, keepdim=True), 1.0)
        route = masked_route(chosen_TE, weight_TE, logits_TX).route
        return LiveRoute(route, logits_TX, column_weight_TJ=chosen_TX[:, self.experts :].to(weight_TE))

    def counts(self, live: LiveRoute) -> Tensor:
        """Count the tokens that chose each of all experts, and all tokens, int64 [X + 1]."""
        return count_all(live, self.experts)

    def loss(self, live: LiveRoute, count_E: Tensor) -> Tensor:
        """Return the balance loss and the z-loss."""
        count_X = count_E[:-1].to(live.logits_TE)
        null_J = count_X[self.experts :].mean().expand(self.nulls)
        loss = balance_loss(live.logits_TE, torch.cat((count_X[: self.experts], null_J)), total=count_E[-1])
        return self.balance_weight * loss + self.z_weight * z_loss(live.logits_TE)


ROUTER = AdaMoERouter
