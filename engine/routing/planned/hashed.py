"""`moe.router=hashed`: the first k experts of the table row that the token's n-gram falls into.

Hash Layers (Roller et al. 2021, arXiv 2106.04426) with k experts, n-grams and tables that are balanced for every k. For
those who want expert parallelism without a router's cost: no gate, no balance loss, no counts exchange.

Letters: P ranks of the expert group, T tokens of a rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from foreroute.engine.config import Keys, MoEConfig, RouteWeights
from foreroute.engine.routing.method_options import Card
from foreroute.engine.routing.planned_router import GroupTokens, RouterInputs, TableRouter
from foreroute.engine.routing.row_counts import CountRule
from foreroute.engine.routing.row_sets import WEIGH, RowSets, joined
from foreroute.engine.routing.tables import Table, table_from_state, table_state, tables_of


class HashedRouter(TableRouter):
    """The router of one table."""

    card = Card(
        "the first k experts of the table row that the token's n-gram falls into, weights fixed by the table",
        "Hash Layers, arXiv 2106.04426, with k experts, n-grams and tables balanced at every k",
        "nothing beside the experts and one exchange of rows each way",
        "the default: the cheapest exact expert parallelism",
    )

    at_most_k = True
    uses: ClassVar[tuple[str, ...]] = (
        *("ngram", "rows", "builder", "pack", "spread", "share_table", "keys"),
        *("weights", "gate", "gate_normalised", "gate_scale"),
        *("constant_experts", "copy_experts", "null_experts"),
    )

    def __init__(
        self,
        table: Table,
        *,
        weights: RouteWeights = RouteWeights.table,
        experts: int = 0,
        columns: int = 0,
        shuffled: bool = False,
    ) -> None:
        """Take a table.

        Args:
            weights: `table` is `uniform` for a table without logits.
            experts: the table's first so many columns; 0 for all.
            columns: how many there are; 0 for as many as a row lists. A row that lists more, as after experts were
                merged, has some of them several times.
            shuffled: let each token have the row of another token of the group's micro-batch (moe.keys=shuffled). All
                tables of a seed shuffle alike, so a token has the key of one other token in every layer.
        """
        columns = columns or table.order_rE.shape[1]
        super().__init__(experts or columns, table.key_rows, columns=columns)
        if weights is RouteWeights.table and table.logits_rE is None:
            weights = RouteWeights.uniform
        self.table, self.weights, self.shuffled = table, weights, shuffled

    @classmethod
    def build(cls, moe: MoEConfig, inputs: RouterInputs) -> Sequence[Self]:
        """Build the tables, or read them from the cache."""
        tables = tables_of(moe, inputs, number=inputs.number, counts=cls.count_rule(moe, inputs))
        return cls.of_tables(moe, tables)

    @classmethod
    def count_rule(cls, moe: MoEConfig, inputs: RouterInputs) -> CountRule | None:
        """Return the rule for the number of experts of each row; None: all use k."""
        return None

    @classmethod
    def restore(cls, moe: MoEConfig, inputs: RouterInputs, states: Sequence[Mapping[str, Tensor]]) -> Sequence[Self]:
        """Take the saved tables."""
        return cls.of_tables(moe, [table_from_state(dict(state)) for state in states])

    @classmethod
    def of_tables(cls, moe: MoEConfig, tables: Sequence[Table]) -> list[Self]:
        """Make a router of each table."""
        shuffled = moe.keys is Keys.shuffled
        numbers = {"experts": moe.experts, "columns": moe.columns}
        return [cls(table, weights=moe.weights, **numbers, shuffled=shuffled) for table in tables]

    def keys(self, tokens: GroupTokens) -> NDArray[np.integer[Any]]:
        """Return the key that each token looks up [P, T]: its own, or with shuffled keys another token's."""
        return tokens.shuffled_keys(self.key_rows) if self.shuffled else tokens.keys(self.key_rows)

    def row_sets(self, k: int) -> RowSets:
        """Return the first experts of each row: k, or as many as the table says; each once."""
        sets = self.listed(k)
        return sets if self.table.order_rE.shape[1] == self.columns else joined(sets, self.columns)

    def listed(self, k: int) -> RowSets:
        """Return the first entries of each row: k, or as many as the table says."""
        order_rE, logits_rE, count_r = self.table.order_rE, self.table.logits_rE, self.table.count_r(k)
        most = k if count_r is None else int(count_r.max())
        scores_rK = None if logits_rE is None else logits_rE[:, :most]
        return RowSets(order_rE[:, :most], WEIGH[self.weights], scores_rK, count_r)

    def state(self) -> dict[str, Tensor]:
        """Return the table."""
        return table_state(self.table)

    def identity(self, *, weights: bool = True) -> Sequence[NDArray[Any]]:
        """Return the table."""
        return self.table.identity(self.shuffled, weights=weights)


ROUTER = HashedRouter
