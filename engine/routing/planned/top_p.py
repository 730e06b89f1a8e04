"""`moe.router=top_p`: of a row's experts as many as its cumulative weight needs, k of them on average.

The planned form of dynamic top-p routing (Huang et al. 2024, "Harder Tasks Need More Experts", arXiv 2403.07652) and
XMoE (Yang et al. 2024, arXiv 2403.18926): in the order of descending weight p, a row has its experts up to the first
with which p_1 + .. + p_c exceeds a threshold. There p is a softmax of the hidden state and the threshold an option;
here p is the softmax of the table row's fixed logits over all columns, and for each k the threshold is solved on the
training text, so that the mean number is k. Rows that the text does not have use k. Nothing is decided in the step: no
gate, no counts exchange, an exact certificate. With copy, constant or null experts (moe.copy_experts and so on) it is
the planned form of MoE++ (arXiv 2410.07348) and AdaMoE (arXiv 2406.13233), where a token's number of true experts
varies with how many of its columns are none; they count among the k. For those who want tokens to cost unequally much.

The published weights are the p of the chosen experts as they are, `raw`; otherwise they are normalised over the set.

Letters: r rows, E columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from foreroute.engine.config import MoEConfig, RouteWeights
from foreroute.engine.config.option import option
from foreroute.engine.errors import require
from foreroute.engine.routing.method_options import Card, read_options
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.planned_router import RouterInputs
from foreroute.engine.routing.row_counts import CountRule, Value, Values
from foreroute.engine.routing.row_sets import RowSets
from foreroute.engine.routing.tables import Table

_UNIT = 2.0**32  # of a cumulative weight in whole numbers


@dataclass
class Options:
    """Options of moe.router=top_p."""

    least: int = option(
        1,
        "Experts that every row has, 0 or 1; with 0, a row whose first weight is large gets none.",
        at_least=0,
        at_most=1,
    )
    raw: bool = option(
        False, "Weights are the softmax over all columns, not normalised over a token's set; needs moe.weights=table."
    )


class TopPRouter(HashedRouter):
    """The router of a table whose rows have numbers of experts by cumulative weight."""

    card = Card(
        "of a hashed row's experts as many as its cumulative weight needs, the threshold solved so that the mean is k",
        "dynamic top-p, arXiv 2403.07652, and XMoE, arXiv 2403.18926, planned; with experts without rows MoE++,"
        " arXiv 2410.07348, and AdaMoE, arXiv 2406.13233",
        "as hashed at equal k; certificate exact",
        "tokens that cost unequally much, without a gate",
    )

    at_most_k = False
    uses = (*HashedRouter.uses, "options")
    only_with: ClassVar = {name: need for name, need in HashedRouter.only_with.items() if name != "spread"}
    raw = False

    @classmethod
    def count_rule(cls, moe: MoEConfig, inputs: RouterInputs) -> CountRule:
        """Return the rule by cumulative weight."""
        least = read_options(moe, Options).least
        return CountRule(("top_p", least), cumulative(least), least)

    @classmethod
    def of_tables(cls, moe: MoEConfig, tables: Sequence[Table]) -> list[Self]:
        """Make a router of each table."""
        raw = read_options(moe, Options).raw
        require(
            not raw or moe.weights is RouteWeights.table,
            f"moe.options.raw=true with moe.weights={moe.weights.name}: needs moe.weights=table",
        )
        routers = super().of_tables(moe, tables)
        for router in routers:
            router.raw = raw
        return routers

    def listed(self, k: int) -> RowSets:
        """Return the first entries of each row, as many as the table says."""
        sets = super().listed(k)
        if not self.raw:
            return sets
        assert self.table.logits_rE is not None
        log_weight_rE = self.table.logits_rE.log_softmax(dim=1)
        return sets._replace(score_rK=log_weight_rE[:, : sets.order_rK.shape[1]], weigh=_exp)


def cumulative(least: int) -> Value:
    """Return the rule's values: a row has its choice number c, from 0, when its first c weights (of `least` 0: c + 1)
    are at most the threshold together.

    Example: weights 0.5, 0.3, 0.2 and a threshold of 0.6: with least 1 a row has 2 experts, since 0.5 does not exceed
    it, and 0.5 + 0.3 does; with least 0 it has one.
    """

    def value(row_s: NDArray[np.int64], logit_sE: NDArray[np.float64], use_s: NDArray[np.int64]) -> Values:
        weight_sE = np.exp(logit_sE - logit_sE[:, :1])
        weight_sE /= weight_sE.sum(axis=1, keepdims=True)
        value_sE = np.rint(_UNIT * weight_sE.cumsum(axis=1)).astype(np.int64)
        if least:
            value_sE = np.pad(value_sE[:, :-1], [(0, 0), (1, 0)])
        return value_sE

    return value


def _exp(sets: RowSets) -> Tensor:
    """Return the weights whose logarithms are the scores."""
    assert sets.score_rK is not None
    return sets.score_rK.exp()


ROUTER = TopPRouter
