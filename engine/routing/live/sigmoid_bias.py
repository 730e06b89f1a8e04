"""`moe.router=sigmoid_bias`: DeepSeek-V3's router, balanced by a bias of the choice instead of a loss (arXiv
2412.19437, section 2.1.2; Wang et al., arXiv 2408.15664). It replaces the balance loss, whose gradient disturbs the
model's own. For those who want a learned router as large models have it today, also with a choice limited to groups of
experts. The further loss within each sequence of DeepSeek-V3, of weight 0.0001, is left out.

Letters: T tokens, D width, E experts, K active experts, G groups of experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foreroute.engine.config import MoEConfig
from foreroute.engine.config.option import option
from foreroute.engine.errors import require
from foreroute.engine.routing.live_router import LiveRoute, LiveRouter, gate_logits, gate_weight
from foreroute.engine.routing.method_options import Card, read_options
from foreroute.engine.routing.plan import Route

_EPSILON = 1e-20


@dataclass
class Options:
    """The method's own options."""

    update: float = option(
        0.001, "What a step adds to or takes from an expert's bias (u). Larger: faster balance, more noise.", at_least=0
    )
    scale: float = option(1.0, "Factor of the weights (DeepSeek-V3: 2.5).", above=0)
    groups: int = option(1, "Groups that the experts form, each of neighbours (DeepSeek-V3: 8).", at_least=1)
    group_limit: int = option(1, "Groups that a token's experts come from (DeepSeek-V3: 4).", at_least=1)


class SigmoidBiasRouter(LiveRouter):
    """s = sigmoid(x W^T); the k largest s + b are chosen, with the weights scale s / sum of the chosen s.

    After a step b rises by u for experts with fewer rows than the mean and falls by u for those with more. It takes no
    part in the weights and has no gradient. It is a buffer in fp32: part of the model's state, the same on all ranks.
    """

    card = Card(
        "top k of sigmoid + bias, weights sigmoid / sum; a step moves the bias towards equal load; groups",
        "DeepSeek-V3, arXiv 2412.19437; Wang et al., arXiv 2408.15664",
        "as frozen, and the gate's gradient; no loss, since a step's counts are known anyway",
        "a learned router without a balance loss",
    )
    uses = ("options",)
    bias: Tensor

    def __init__(self, width: int, moe: MoEConfig, layer: int = 0) -> None:
        """Make the router of a layer.

        Raises:
            UserError: the experts do not form so many groups.
        """
        super().__init__(width, moe, layer)
        self.options = read_options(moe, Options)
        groups, limit = self.options.groups, self.options.group_limit
        require(moe.experts % groups == 0, f"moe.options.groups={groups}: must divide moe.experts={moe.experts}")
        require(limit <= groups, f"moe.options.group_limit={limit}: must be at most moe.options.groups={groups}")
        self.most = limit * (moe.experts // groups)
        self.gate_weight = nn.Parameter(gate_weight(width, moe.experts))
        self.register_buffer("bias", torch.zeros(moe.experts))

    def forward(self, x_TD: Tensor, k: int, carried: Tensor | None = None) -> LiveRoute:
        """Route hidden states [T, D] to k experts each.

        Raises:
            UserError: the groups that a token may use have fewer than k experts.
        """
        logits_TE = gate_logits(x_TD, self.gate_weight)
        score_TE = logits_TE.sigmoid()
        expert_TK = self._within_groups(score_TE.detach() + self.bias, k).topk(k, dim=1).indices
        weight_TK = score_TE.gather(1, expert_TK)
        weight_TK = self.options.scale * weight_TK / (weight_TK.sum(dim=1, keepdim=True) + _EPSILON)
        return LiveRoute(Route(expert_TK, weight_TK), logits_TE)

    def _within_groups(self, score_TE: Tensor, k: int) -> Tensor:
        """Exclude all groups but those with the largest sums of their two best scores."""
        groups, limit = self.options.groups, self.options.group_limit
        if groups == limit:
            return score_TE
        require(k <= self.most, f"k={k}: must be at most {self.most}, the experts of moe.options.group_limit={limit}")
        size = self.experts // groups
        score_TGe = score_TE.view(len(score_TE), groups, size)
        best_TG = score_TGe.topk(min(2, size), dim=2).values.sum(dim=2)
        kept_TG = torch.zeros_like(best_TG, dtype=torch.bool).scatter(1, best_TG.topk(limit, dim=1).indices, True)
        return score_TGe.masked_fill(~kept_TG[..., None], -torch.inf).flatten(1)

    def after_step(self, count_E: Tensor) -> None:
        """Move the bias by u towards equal load."""
        self.bias += self.options.update * torch.sign(count_E.mean() - count_E).to(self.bias)


ROUTER = SigmoidBiasRouter
