"""`moe.router=moe_plus_plus`: top k of experts, constants, copies and null experts, with the logits of the layer before
(MoE++, Jin et al., ICLR 2025, arXiv 2410.07348). It replaces top k: easy tokens take experts that compute and send
nothing. For those who want a dynamic amount of work; planned routers with moe.copy_experts, moe.constant_experts and
moe.null_experts are its planned form.

The published capacities are left out: no token is dropped. So is that the released code multiplies the layer's input by
k, which it can be told not to do.

Letters: T tokens, D width, E experts with rows, X experts of all kinds, J those without rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foreroute.engine.config import MoEConfig
from foreroute.engine.config.option import option
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
from foreroute.engine.routing.method_options import Card, read_options


@dataclass
class Options:
    """The method's own options."""

    gate_hidden: int = option(
        8, "Hidden units of the gate, with tanh, for each expert of any kind; 0 for a linear gate.", at_least=0
    )
    tau: float = option(
        0.75, "Weight of experts without rows in the balance loss. Smaller: more tokens choose them.", at_least=0
    )


class MoEPlusPlusRouter(LiveRouter):
    """logits = W2 tanh(W1 x) + G (logits of the layer before); p = softmax; the k largest p are chosen.

    A null expert's weight is 0, the others' are p / sum of the chosen p that are not null. The balance loss is
    X sum_i eta_i f_i P_i, where f_i is the share of tokens that chose i; eta_i is 1 for experts with rows, tau for
    those without. The factor X, which the paper's sum lacks, makes it 1 at even load, as other balance losses here.
    """

    card = Card(
        "top k of experts, constants, copies and nulls; a gate that adds the logits of the layer before",
        "MoE++, arXiv 2410.07348",
        "as learned, with fewer rows; one rank's host waits for their number, too",
        "a dynamic amount of work for each token",
    )
    uses = (
        *("constant_experts", "copy_experts", "null_experts"),
        *("balance_loss", "balance_over", "z_loss", "options"),
    )
    balances = True
    hidden_weight: nn.Parameter | None
    residual_weight: nn.Parameter | None

    def __init__(self, width: int, moe: MoEConfig, layer: int = 0) -> None:
        """Make the router of a layer; that of the first has no residual.

        Raises:
            UserError: there is no constant, copy or null expert.
        """
        super().__init__(width, moe, layer)
        columns = moe.columns
        require(columns > moe.experts, "moe.router=moe_plus_plus: needs constant, copy or null experts")
        self.options, self.nulls = read_options(moe, Options), moe.null_experts
        hidden = self.options.gate_hidden * columns
        self.hidden_weight = nn.Parameter(gate_weight(width, hidden)) if hidden else None
        self.gate_weight = nn.Parameter(gate_weight(hidden or width, columns))
        self.residual_weight = nn.Parameter(gate_weight(columns, columns)) if layer else None
        self.balance_weight, self.z_weight = moe.balance_loss, moe.z_loss

    def forward(self, x_TD: Tensor, k: int, carried: Tensor | None = None) -> LiveRoute:
        """Route hidden states [T, D] to k experts of any kind each.

        Args:
            carried: the logits of the layer before [T, X].
        """
        input_TH = x_TD if self.hidden_weight is None else gate_logits(x_TD, self.hidden_weight).tanh()
        logits_TX = gate_logits(input_TH, self.gate_weight)
        if carried is not None and self.residual_weight is not None:
            logits_TX = logits_TX + gate_logits(carried, self.residual_weight)
        chosen_TX = top_k_mask(logits_TX, k)
        share_TX = logits_TX.softmax(dim=1).masked_fill(~chosen_TX, 0.0)
        not_null_TX = share_TX[:, : share_TX.shape[1] - self.nulls]
        sum_T1 = not_null_TX.sum(dim=1, keepdim=True)
        weight_TX = share_TX / sum_T1.masked_fill(sum_T1 == 0, 1.0)
        route = masked_route(chosen_TX[:, : self.experts], weight_TX[:, : self.experts], logits_TX).route
        return LiveRoute(route, logits_TX, logits_TX, weight_TX[:, self.experts :])

    def counts(self, live: LiveRoute) -> Tensor:
        """Count the tokens that chose each of all experts, and all tokens, int64 [X + 1]."""
        return count_all(live, self.experts)

    def loss(self, live: LiveRoute, count_E: Tensor) -> Tensor:
        """Return the balance loss and the z-loss."""
        count_X = count_E[:-1].to(live.logits_TE)
        count_X = torch.cat((count_X[: self.experts], self.options.tau * count_X[self.experts :]))
        loss = balance_loss(live.logits_TE, count_X, total=count_E[-1])
        return self.balance_weight * loss + self.z_weight * z_loss(live.logits_TE)


ROUTER = MoEPlusPlusRouter
