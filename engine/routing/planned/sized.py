"""`moe.router=sized`: experts of unequal width, chosen by the token's n-gram, as many as make k slices on average.

HMoE (Wang et al. 2024, arXiv 2408.10681) and Duo-LLM (Alizadeh et al. 2024, arXiv 2410.10846) with planned choices, in
place of a gate with a penalty on wide experts and of an oracle. For those who want to give rare or hard n-grams more
arithmetic than frequent ones, or to learn which width is enough.

An expert of width m F is m neighbouring slices of moe.experts, of width F = moe.expert_width each, that are active
together with the same weight; its output bias is in the first of them (Experts has the rule). That is equal to one wide
expert, its gradients and Adam's steps too. Dropout is not the wide expert's: each slice draws a mask of its own, with
the same rate.

A row has an order of the experts, random logits, and uses a prefix. The softmax is over experts, and each slice has
its expert's weight. Choices are in the order of the slices before them, ties by a hash, and at k as many are in as make
the mean over the training text k slices (engine/routing/row_counts.py). So at a k below the mean size of the first
choices some rows have no expert, or, with least=1, the mean is above k.

The order is the greedy one of engine/routing/tables.py, for loads at equal numbers of slices before the choice: each
expert has as many tokens as another, each slice and each rank as much arithmetic.

Letters: G experts, E slices, r table rows, K columns listed of a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foreroute.engine.config import Builder, MoEConfig, RouteWeights
from foreroute.engine.config.option import option
from foreroute.engine.errors import require
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.hashing import Purpose, hash64
from foreroute.engine.routing.loops.sized_orders import greedy_sized
from foreroute.engine.routing.method_options import Card, read_options
from foreroute.engine.routing.planned_router import RouterInputs, TableRouter
from foreroute.engine.routing.row_counts import solve
from foreroute.engine.routing.row_sets import RowSets, Weigh, column_dtype, unit_weights
from foreroute.engine.routing.tables import Table, row_uses, table_from_state, table_state, tables_of


@dataclass
class SizedOptions:
    """moe.options of this router."""

    sizes: list[int] = option(
        [1, 1, 2], "Slices of each expert, again and again until there are moe.experts slices: the width of experts."
    )
    least: int = option(
        0,
        "Experts that every row has, 0 or 1; with 1 the mean is above k where first experts are wider.",
        at_least=0,
        at_most=1,
    )
    small_first: bool = option(False, "The most frequent rows have a small expert as their first choice.")


class SizedRouter(TableRouter):
    """The router of one table over experts of unequal width."""

    card = Card(
        "a prefix of the experts of the token's n-gram, which are 1, 2, 4, ... slices wide; k slices on average",
        "HMoE, arXiv 2408.10681; Duo-LLM, arXiv 2410.10846; planned",
        "as hashed; a row that reaches a wide expert is read once for each slice",
        "experts of unequal width, balanced in arithmetic",
    )
    uses = ("ngram", "rows", "weights", "spread", "share_table", "options")

    def __init__(self, table: Table, size_G: NDArray[np.int64], *, weights: RouteWeights) -> None:
        """Take a table of the experts.

        Args:
            table: its orders are of the G experts, and its first_rE those k at which rows use their choices.
            size_G: slices of each expert.
        """
        super().__init__(int(size_G.sum()), table.key_rows)
        self.table, self.size_G = table, size_G
        self._weigh: Weigh = unit_weights if weights is RouteWeights.sum else self._of_experts
        self._place_E = torch.from_numpy(np.concatenate([np.arange(size) for size in size_G]))  # within its expert

    @classmethod
    def slices(cls, moe: MoEConfig) -> Sequence[int]:
        """Return moe.options.sizes, again and again."""
        sizes = read_options(moe, SizedOptions).sizes
        ok = isinstance(sizes, list) and all(isinstance(size, int) and size >= 1 for size in sizes)
        require(
            ok and len(sizes) > 0, f"moe.options.sizes={sizes}: must be a list of numbers of slices, at least 1 each"
        )
        times, rest = divmod(moe.experts, sum(sizes))
        require(
            times > 0 and rest == 0,
            f"moe.options.sizes={sizes}: are {sum(sizes)} slices; moe.experts={moe.experts} must be a multiple",
        )
        return sizes * times

    @classmethod
    def build(cls, moe: MoEConfig, inputs: RouterInputs) -> Sequence[Self]:
        """Build the tables; they are not in the cache."""
        require(moe.columns == moe.experts, "moe.router=sized: takes no constant, copy or null experts")
        require(moe.weights is not RouteWeights.live, "moe.router=sized: moe.weights=live would weigh slices alone")
        size_G, options = np.array(cls.slices(moe)), read_options(moe, SizedOptions)
        plain = replace(moe, router="hashed", options={}, experts=size_G.size, builder=Builder.random, pack=None)
        drawn = tables_of(plain, replace(inputs, cache_dir=None), number=inputs.number)
        routers = []
        for table, use_r in zip(drawn, row_uses(drawn, inputs), strict=True):
            order_rG = _balanced(table, use_r, size_G, small_first=options.small_first)
            first_rG = _first_k(table, order_rG, use_r, size_G, least=options.least)
            table = replace(table, order_rE=torch.from_numpy(order_rG), first_rE=torch.from_numpy(first_rG))
            routers.append(cls(replace(table, builder=Builder.balanced), size_G, weights=moe.weights))
        return routers

    @classmethod
    def restore(cls, moe: MoEConfig, inputs: RouterInputs, states: Sequence[Mapping[str, Tensor]]) -> Sequence[Self]:
        """Take the saved tables."""
        return [cls(table_from_state(dict(s)), s["size_G"].numpy(), weights=moe.weights) for s in states]

    def state(self) -> dict[str, Tensor]:
        """Return the table and the experts' sizes."""
        return table_state(self.table) | {"size_G": torch.tensor(self.size_G)}

    def place(self, mesh: Mesh) -> Self:
        """Plan for this rank from now on.

        Raises:
            UserError: the slices of an expert would be on several ranks.
        """
        local = len(mesh.local_experts(self.experts))
        end_G = self.size_G.cumsum()
        apart = np.flatnonzero((end_G - self.size_G) // local != (end_G - 1) // local)
        require(
            not apart.size,
            f"moe.options.sizes: expert {apart[:1]} of {self.size_G[apart][:1]} slices would lie on several of the"
            f" {mesh.ep_size} ranks, which have {local} slices each",
        )
        return super().place(mesh)

    def row_sets(self, k: int) -> RowSets:
        """Return the slices of each row's experts, those of an expert beside each other."""
        assert self.table.first_rE is not None
        order_rG, first_rG = self.table.order_rE.numpy(), self.table.first_rE.numpy()
        size_rG = self.size_G[order_rG]
        count_r = (size_rG * (first_rG <= k)).sum(axis=1, dtype=np.int32)
        width = max(1, int(count_r.max()))
        start_G = self.size_G.cumsum() - self.size_G
        start_rE = np.repeat(start_G[order_rG].reshape(-1), size_rG.reshape(-1)).reshape(-1, self.experts)[:, :width]
        first_rE = np.repeat((size_rG.cumsum(axis=1) - size_rG).reshape(-1), size_rG.reshape(-1))
        order_rK = start_rE + np.arange(width) - first_rE.reshape(-1, self.experts)[:, :width]
        score_rK = None
        if self.table.logits_rE is not None:
            score_rE = np.repeat(self.table.logits_rE.numpy().reshape(-1), size_rG.reshape(-1))
            score_rK = torch.from_numpy(score_rE.reshape(-1, self.experts)[:, :width].copy())
        order = torch.from_numpy(order_rK.astype(column_dtype(self.experts)))
        return RowSets(order, self._weigh, score_rK, torch.from_numpy(count_r))

    def _of_experts(self, sets: RowSets) -> Tensor:
        """Return for each slice the weight of its expert: the softmax over the row's experts, or 1 / their number."""
        place_rK, used_rK = self._place_E[sets.order_rK.long()], sets.used_rK
        assert used_rK is not None
        score_rK = torch.zeros(place_rK.shape) if sets.score_rK is None else sets.score_rK
        weight_rK = score_rK.masked_fill(~used_rK | (place_rK > 0), -torch.inf).softmax(dim=1).nan_to_num(0.0)
        return weight_rK.gather(1, torch.arange(place_rK.shape[1]) - place_rK)

    def identity(self, *, weights: bool = True) -> Sequence[NDArray[Any]]:
        """Return the table, the sizes and what each row uses at each k."""
        return [self.size_G, *self.table.identity(weights=weights)]


def _balanced(table: Table, use_r: NDArray[np.int64], size_G: NDArray[np.int64], *, small_first: bool) -> NDArray[Any]:
    """Return the table's orders with those of rows that the text uses chosen anew, the most frequent first."""
    order_rG = table.order_rE.numpy().copy()
    row_s = np.argsort(-use_r, kind="stable")[: np.count_nonzero(use_r)]
    state = np.uint64(hash64(Purpose.sized_tie, table.seed, table.index))
    greedy_sized(row_s, use_r[row_s], state, size_G, small_first, order_rG)
    return order_rG


def _first_k(
    table: Table, order_rG: NDArray[Any], use_r: NDArray[np.int64], size_G: NDArray[np.int64], *, least: int
) -> NDArray[np.int16]:
    size_rG = size_G[order_rG]
    rows, experts = order_rG.shape
    tie_rG = hash64(Purpose.sized_count_tie, table.seed, table.index, np.arange(rows)[:, None], np.arange(experts))
    use_r = use_r if use_r.any() else np.ones_like(use_r)
    return solve(size_rG.cumsum(axis=1) - size_rG, use_r, tie_rG, least=least, size_sE=size_rG)


ROUTER = SizedRouter
