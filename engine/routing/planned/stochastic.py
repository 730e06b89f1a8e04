"""`moe.router=stochastic`: THOR (Zuo et al., ICLR 2022, arXiv 2110.04260), one new random order of experts for all
tokens of each of two passes, which a loss makes agree (moe.consistency). THOR has k = 1. The other extreme beside
`fresh`: random experts without any load balance in a step.
"""

from foreroute.engine.routing.method_options import Card
from foreroute.engine.routing.planned.fresh import FreshRouter


class StochasticRouter(FreshRouter):
    """Draws one order of the experts for all tokens of a pass."""

    card = Card(
        "one new random order of experts for all tokens of each of two passes, which a loss makes agree",
        "THOR, arXiv 2110.04260",
        "two forward and backward passes; all rows of a step go to k experts",
        "comparisons with THOR",
    )

    uses = ("share_table", "consistency")
    each_token = False
    passes = 2


ROUTER = StochasticRouter
