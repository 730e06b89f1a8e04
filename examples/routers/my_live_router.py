"""The smallest live router: the k experts with the largest logits, each weighted by the sigmoid of its logit.

python -m launch.train experiment=debug moe.router=examples.routers.my_live_router:MyLiveRouter
"""

from torch import Tensor, nn

from foreroute.engine.config import MoEConfig
from foreroute.engine.routing.live_router import LiveRoute, LiveRouter, gate_logits, gate_weight
from foreroute.engine.routing.method_options import Card
from foreroute.engine.routing.plan import Route


class MyLiveRouter(LiveRouter):
    """Has a trained linear gate."""

    card = Card("top k of a linear gate, weighted by sigmoids", "ours", "as learned", "a first live router of your own")

    def __init__(self, width: int, moe: MoEConfig, layer: int) -> None:
        super().__init__(width, moe, layer)
        self.gate = nn.Parameter(gate_weight(width, moe.experts))

    def forward(self, x_TD: Tensor, k: int, carried: Tensor | None = None) -> LiveRoute:
        """Route hidden states [T, D] to k experts each."""
        logits_TE = gate_logits(x_TD, self.gate)
        top_TK, expert_TK = logits_TE.topk(k)
        return LiveRoute(Route(expert_TK, top_TK.sigmoid()), logits_TE)
