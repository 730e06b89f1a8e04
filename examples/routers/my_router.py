"""The smallest planned router: token id i has experts i, i + 1, ... modulo E, each with weight 1/k.

python -m launch.train experiment=debug moe.router=examples.routers.my_router:MyRouter
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from numpy.typing import NDArray

from foreroute.engine.config import MoEConfig
from foreroute.engine.routing.method_options import Card
from foreroute.engine.routing.ngram_rows import KeyRows
from foreroute.engine.routing.planned_router import RouterInputs, TableRouter
from foreroute.engine.routing.row_sets import RowSets, column_dtype, equal_weights


class MyRouter(TableRouter):
    """Has a row for each token id, and in it an order of all experts."""

    card = Card("experts i, i + 1, ... of token id i", "ours", "as hashed", "a first router of your own")
    at_most_k = True

    def __init__(self, experts: int, vocab_size: int) -> None:
        super().__init__(experts, KeyRows(ngram=1, vocab_size=vocab_size, rows=vocab_size, seed=0, index=0))
        order_rE = (torch.arange(vocab_size)[:, None] + torch.arange(experts)) % experts
        self.order_rE = torch.from_numpy(order_rE.numpy().astype(column_dtype(experts)))

    @classmethod
    def build(cls, moe: MoEConfig, inputs: RouterInputs) -> Sequence[Self]:
        """Make one router for each expert layer."""
        return [cls(moe.experts, inputs.vocab_size) for _ in range(inputs.number)]

    def row_sets(self, k: int) -> RowSets:
        """Return the first k experts of each row."""
        return RowSets(self.order_rE[:, :k], equal_weights)

    def identity(self, *, weights: bool = True) -> Sequence[NDArray[Any]]:
        """Return the orders."""
        return [self.order_rE.numpy()]
