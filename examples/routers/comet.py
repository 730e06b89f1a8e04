"""COMET (Ibrahim et al., KDD 2023, arXiv 2306.02824): trees of smooth decisions choose experts exactly and trainably.

It replaces top k, whose choice has no gradient. Each of k trees has the experts as its leaves. A node sends the share
s = step(w x + b) of a token to the left and 1 - s to the right; a leaf's share p is the product along its path. step is
a cubic from 0 to 1 of width gamma and exactly 0 or 1 beyond, so most leaves get exactly nothing once the trees have
made up their minds. Until then a token has many experts. A leaf also has a score a(x), linear. Weights are the softmax
of a + log p over the leaves of all trees, added up over the trees. A loss on the entropy of p makes shares exact.

The trees used are the first k of moe.options.trees, so k is at most their number. The published gate also learns a
permutation of the experts for each tree, which is left out (permuted.py searches those of tables). The example shows a
mask: any number of experts for a token.

Letters: T tokens, D width, J trees, I inner nodes (E - 1) in order of their level, E experts, k trees used.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foreroute.engine.config import MoEConfig
from foreroute.engine.config.option import option
from foreroute.engine.errors import require
from foreroute.engine.routing.live_router import LiveRoute, LiveRouter, gate_logits, masked_route
from foreroute.engine.routing.method_options import Card, read_options

_NOTHING = 1e-8  # beside p in log p
_ENTROPY = 1e-6  # beside p in the loss's log p


@dataclass
class Options:
    """The method's own options."""

    trees: int = option(4, "Trees of a gate; k of them are used, so at least schedule.k_max.", at_least=1)
    gamma: float = option(1.0, "Width of a decision's smooth part. Larger: more experts for longer.", above=0)
    entropy: float = option(0.01, "Weight of the entropy of the leaves' shares. Larger: exact sooner.", at_least=0)


class TreeRouter(LiveRouter):
    """The trees of one layer."""

    card = Card(
        "the leaves that k trees of smooth decisions reach, softmax of their scores and shares",
        "COMET, arXiv 2306.02824",
        "as learned, with more than k experts for a token until decisions are exact",
        "studies of choices that have a gradient",
    )
    uses = ("options",)

    def __init__(self, width: int, moe: MoEConfig, layer: int = 0) -> None:
        super().__init__(width, moe, layer)
        self.options = read_options(moe, Options)
        self.most = self.options.trees
        experts, gamma = moe.experts, self.options.gamma
        require(
            experts >= 2 and experts & (experts - 1) == 0,
            f"moe.experts={experts}: must be 2, 4, 8, ..., the leaves of the trees of moe.router={moe.router}",
        )
        nodes = self.options.trees * (experts - 1), self.options.trees * experts
        self.node_weight = nn.Parameter(torch.empty(nodes[0], width).uniform_(-gamma / 100, gamma / 100))
        self.node_bias = nn.Parameter(torch.empty(nodes[0]).uniform_(-gamma / 100, gamma / 100))
        self.score_weight = nn.Parameter(torch.empty(nodes[1], width).uniform_(-0.05, 0.05))
        self.score_bias = nn.Parameter(torch.empty(nodes[1]).uniform_(-0.05, 0.05))

    def forward(self, x_TD: Tensor, k: int, carried: Tensor | None = None) -> LiveRoute:
        """Route hidden states [T, D] by k trees.

        Raises:
            UserError: there are fewer trees.
        """
        trees = self.options.trees
        require(k <= trees, f"k={k}: moe.options.trees={trees} must be at least as many")
        step_TJI = smooth_step(gate_logits(x_TD, self.node_weight, self.node_bias), self.options.gamma)
        share_TJE = leaf_shares(step_TJI.view(-1, trees, self.experts - 1)[:, :k])
        score_TJE = gate_logits(x_TD, self.score_weight, self.score_bias).view(-1, trees, self.experts)[:, :k]
        reached_TJE = share_TJE > 0
        lowest = torch.finfo(score_TJE.dtype).min
        logits_TJE = torch.where(reached_TJE, score_TJE + (share_TJE + _NOTHING).log(), lowest)
        weight_TE = logits_TJE.flatten(1).softmax(dim=1).view_as(logits_TJE).sum(dim=1)
        return masked_route(reached_TJE.any(dim=1), weight_TE, share_TJE.flatten(1))

    def loss(self, live: LiveRoute, count_E: Tensor) -> Tensor:
        """Return the entropy of the leaves' shares, added up over leaves and trees, the mean over tokens."""
        share_TX = live.logits_TE
        return self.options.entropy * -(share_TX * (share_TX + _ENTROPY).log()).sum(dim=1).mean()


def smooth_step(x: Tensor, gamma: float) -> Tensor:
    """Return 0 up to -gamma/2, 1 from gamma/2 on, and -2 x^3 / gamma^3 + 3 x / (2 gamma) + 1/2 between."""
    inside = x.clamp(-gamma / 2, gamma / 2)
    cubic = -2 / gamma**3 * inside**3 + 3 / (2 * gamma) * inside + 0.5
    return torch.where(x <= -gamma / 2, 0.0, torch.where(x >= gamma / 2, 1.0, cubic))


def leaf_shares(step_TJI: Tensor) -> Tensor:
    """Return the share [T, J, E] of each leaf.

    Args:
        step_TJI: the share that each inner node sends to the left; the root first, then level by level.

    Example: shares [0.5, 0.25, 1] of three nodes give leaves [0.125, 0.375, 0.5, 0].
    """
    share, first = torch.ones_like(step_TJI[..., :1]), 0
    while first < step_TJI.shape[-1]:
        left = step_TJI[..., first : 2 * first + 1]
        share = torch.stack((share * left, share * (1 - left)), dim=-1).flatten(-2)
        first = 2 * first + 1
    return share
