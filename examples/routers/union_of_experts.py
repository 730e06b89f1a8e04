"""The slices of Union of Experts (Yang et al. 2025, arXiv 2503.02495): experts are the parts of one feed-forward, and
their outputs are added up.

It replaces weights: each chosen slice counts once, so all E slices together are the dense feed-forward that they were
cut from (`slices_of`), at k = E exactly. At a smaller k a token goes through a part of it, chosen here by its n-gram as
`hashed` does; published is a choice by hidden states of a whole sequence, which a router of tokens does not see. The
published slices of attention are left out. For those who start from a dense model, or want one that may be run whole.

The example shows tables that are balanced on the training text, and state that is saved with the model.

Letters: D width, E experts, F their hidden width.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from numpy.typing import NDArray
from torch import Tensor

from foreroute.engine.config import MoEConfig
from foreroute.engine.errors import require
from foreroute.engine.routing.method_options import Card
from foreroute.engine.routing.planned_router import RouterInputs, TableRouter
from foreroute.engine.routing.row_sets import RowSets, unit_weights
from foreroute.engine.routing.tables import Table, table_from_state, table_state, tables_of


class SliceRouter(TableRouter):
    """The router of one table, which adds slices up."""

    card = Card(
        "the first k slices of the table row that the token's n-gram falls into, each with weight 1",
        "Union of Experts, arXiv 2503.02495, its feed-forward",
        "as hashed",
        "a dense feed-forward cut into slices",
    )
    uses = ("ngram", "rows", "builder", "pack", "share_table")
    at_most_k = True

    def __init__(self, table: Table) -> None:
        super().__init__(table.order_rE.shape[1], table.key_rows)
        self.table = table

    @classmethod
    def build(cls, moe: MoEConfig, inputs: RouterInputs) -> Sequence[Self]:
        """Build the tables, or read them from the cache."""
        return [cls(table) for table in tables_of(moe, inputs, number=inputs.number)]

    @classmethod
    def restore(cls, moe: MoEConfig, inputs: RouterInputs, states: Sequence[Mapping[str, Tensor]]) -> Sequence[Self]:
        """Take the saved tables."""
        return [cls(table_from_state(dict(state))) for state in states]

    def row_sets(self, k: int) -> RowSets:
        """Return the first k slices of each row."""
        return RowSets(self.table.order_rE[:, :k], unit_weights)

    def state(self) -> dict[str, Tensor]:
        """Return the table."""
        return table_state(self.table)

    def identity(self, *, weights: bool = True) -> Sequence[NDArray[Any]]:
        """Return the table."""
        return self.table.identity(weights=weights)


def slices_of(weights: Mapping[str, Tensor], experts: int) -> dict[str, Tensor]:
    """Cut a feed-forward W2 act(W1 x + b1) + b2 into experts whose sum it is; the first one has the output bias.

    Args:
        weights: "w1" [E F, D], "b1" [E F], "w2" [E F, D] (one row for each hidden unit) and "b2" [D].

    Returns:
        The parameters of a layer's experts: "w1" [E, F, D], "b1" [E, F], "w2" [E, F, D], "b2" [E, D].

    Raises:
        UserError: the hidden units cannot be shared out evenly.
    """
    units = len(weights["b1"])
    require(units % experts == 0, f"{experts} slices of {units} hidden units: must divide them")
    cut = {name: weights[name].unflatten(0, (experts, -1)) for name in ("w1", "b1", "w2")}
    bias_ED = torch.zeros(experts, len(weights["b2"])).to(weights["b2"])
    bias_ED[0] = weights["b2"]
    return {**cut, "b2": bias_ED}
