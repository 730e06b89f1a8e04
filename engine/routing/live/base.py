"""`moe.router=base`: BASE layers (Lewis et al., ICML 2021, arXiv 2103.16716). In training the assignment of tokens is
the one of the largest sum of scores in which each expert has equally many. It replaces the balance loss. For
comparisons with a router that is balanced exactly.

The assignment is that of a rank's micro-batch. The published code shuffles tokens over the ranks before, which is left
out. Each token has one expert, so schedule.k_max is 1. At evaluation each token takes its best expert, so generation is
causal; in training it is not, since tokens compete.

The published layer returns a E(h) + (1 - a) h with a = sigmoid(h w_e) and E(h) = h + f(h). That is h + a f(h): an
expert of weight a in a block with a residual sum, which is how blocks use the layer. With model.pre_norm the scores are
those of the normalised hidden states.

Letters: T tokens of a rank, D width, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foreroute.engine.config import MoEConfig
from foreroute.engine.config.option import option
from foreroute.engine.errors import require
from foreroute.engine.routing.live_router import LiveRoute, LiveRouter, gate_logits
from foreroute.engine.routing.method_options import Card, read_options
from foreroute.engine.routing.plan import Route


@dataclass
class Options:
    """The method's own options."""

    tolerance: float = option(
        0.02,
        "What an assigned token may miss on average, as a share of the range of scores. Smaller: more rounds.",
        above=0,
    )


class BaseRouter(LiveRouter):
    """Scores x w_e; the weight of the assigned expert is the sigmoid of its score."""

    card = Card(
        "in training the assignment of largest score with equally many tokens for each expert, then the best expert",
        "BASE layers, arXiv 2103.16716",
        "as frozen without its counts, and an auction, whose rounds the host waits for",
        "comparisons with exact balance; one expert for a token",
    )
    uses = ("options",)

    def __init__(self, width: int, moe: MoEConfig, layer: int = 0) -> None:
        super().__init__(width, moe, layer)
        self.options, self.most = read_options(moe, Options), 1
        self.centroids = nn.Parameter(nn.init.orthogonal_(torch.empty(moe.experts, width), gain=0.1))

    def forward(self, x_TD: Tensor, k: int, carried: Tensor | None = None) -> LiveRoute:
        """Route hidden states [T, D] to one expert each.

        Raises:
            UserError: k is not 1.
        """
        require(k == 1, f"k={k}: must be 1 for moe.router=base")
        logits_TE = gate_logits(x_TD, self.centroids)
        scores_TE = logits_TE.detach()
        expert_T = assign(scores_TE, self.options.tolerance) if self.training else scores_TE.argmax(dim=1)
        weight_T1 = logits_TE.gather(1, expert_T[:, None]).sigmoid()
        even = self.training and len(x_TD) % self.experts == 0
        return LiveRoute(Route(expert_T[:, None], weight_T1, rows=len(x_TD), even=even), logits_TE)


def assign(scores_TE: Tensor, tolerance: float) -> Tensor:
    """Assign each token an expert so that the sum of scores is nearly the largest; each gets at most T / E, rounded up.

    An auction (Bertsekas and Castanon 1989, "The auction algorithm for the transportation problem"): each token without
    an expert bids for the one with the largest score minus price, as high as it may before the second becomes better.
    Each expert keeps the highest bids; once it is full, its price is the lowest that it keeps.

    Args:
        tolerance: the sum is at most T x tolerance x (largest - smallest score) below the best.

    Returns:
        int64 [T].

    Example: scores [[5, 1], [4, 3]]: both tokens want expert 0. The best sum is 5 + 3, so the experts are [0, 1].
    """
    tokens, experts = scores_TE.shape
    if tokens == 0 or experts == 1:
        return torch.zeros(tokens, dtype=torch.int64, device=scores_TE.device)
    capacity = -(-tokens // experts)
    scores_TE = scores_TE.double()
    step = (tolerance * (scores_TE.max() - scores_TE.min())).clamp(min=1e-12)
    price_E = scores_TE.new_zeros(experts)
    expert_T = torch.full((tokens,), experts, device=scores_TE.device)  # experts: none
    bid_T = scores_TE.new_zeros(tokens)
    while True:
        bidder_B = torch.nonzero(expert_T == experts).squeeze(1)
        if len(bidder_B) == 0:
            return expert_T
        best_B2, found_B2 = (scores_TE[bidder_B] - price_E).topk(2, dim=1)
        expert_T[bidder_B] = found_B2[:, 0]
        bid_T[bidder_B] = price_E[found_B2[:, 0]] + best_B2[:, 0] - best_B2[:, 1] + step
        # the tokens of each expert one after the other, highest bids first
        order_T = bid_T.argsort(descending=True, stable=True)
        order_T = order_T[expert_T[order_T].argsort(stable=True)]
        wanted_E = torch.bincount(expert_T, minlength=experts)
        first_E = wanted_E.cumsum(0) - wanted_E
        place_T = torch.arange(tokens, device=order_T.device) - first_E[expert_T[order_T]]
        expert_T[order_T[place_T >= capacity]] = experts
        last_E = order_T[(first_E + capacity - 1).clamp(max=tokens - 1)]
        price_E = torch.where(wanted_E >= capacity, bid_T[last_E], price_E)


ROUTER = BaseRouter
