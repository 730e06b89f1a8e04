"""Row sets: the experts that each row of a planned router's table uses at one k, and with which weights.

This is all that a planned router has to say; engine/routing/plans/planner.py makes plans of it. A row's set is the
first `count` of its columns, so a number of experts for each row, none too, is a prefix of another length. Columns from
E on are no experts: they cost no row and no byte (engine/moe/zero_experts.py).

Example: three rows over two experts (0 and 1) and one column without expert (2):

    order_rK   count_r   the row's set
    [0, 1]     2         experts 0 and 1
    [1, 0]     1         expert 1
    [2, 0]     1         column 2: nothing travels

Letters: r rows, K columns listed of each row, E experts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foreroute.engine.config import RouteWeights


class RowSets(NamedTuple):
    """The set of each row, the wanted first."""

    order_rK: Tensor  # uint8, or int16 above 256 columns: distinct within a row
    weigh: "Weigh | None"  # makes the weights of some rows; None: a gate weighs the experts (engine/moe/gate.py)
    score_rK: Tensor | None = None  # fp32: what `weigh` makes them from
    count_r: Tensor | None = None  # int32: how many of them each row uses; None: all

    def of_rows(self, row_N: Tensor) -> "RowSets":
        """Return the sets of these rows."""
        score_rK, count_r = self.score_rK, self.count_r
        return RowSets(
            self.order_rK.index_select(0, row_N),
            self.weigh,
            None if score_rK is None else score_rK.index_select(0, row_N),
            None if count_r is None else count_r.index_select(0, row_N),
        )

    @property
    def used_rK(self) -> Tensor | None:
        """Which columns each row uses; None: all."""
        if self.count_r is None:
            return None
        return torch.arange(self.order_rK.shape[1]) < self.count_r[:, None]

    def weights(self) -> Tensor:
        """Return the fp32 weights [r, K]; what an unused column has does not matter. Without `weigh` they are 0."""
        if self.weigh is None:
            return torch.zeros(self.order_rK.shape)
        return self.weigh(self)

    def dense_weights(self, columns: int) -> Tensor:
        """Return the fp32 weight of every column [r, columns]; 0 for those that a row does not use."""
        weight_rK, used_rK = self.weights(), self.used_rK
        if used_rK is not None:
            weight_rK = weight_rK.masked_fill(~used_rK, 0.0)
        return torch.zeros(len(weight_rK), columns).scatter_add_(1, self.order_rK.long(), weight_rK)


Weigh = Callable[[RowSets], Tensor]


class Choice(NamedTuple):
    """A planned router's choice for a micro-batch of an expert group."""

    row_PT: NDArray[np.integer[Any]]  # a row for each token of each rank
    sets: RowSets

    def of_real(self, real_PT: NDArray[np.bool_]) -> "Choice":
        """Return the choice with an empty set for each token that is padding; then each token has a row of its own."""
        sets = self.sets.of_rows(torch.from_numpy(np.ascontiguousarray(self.row_PT)).flatten())
        count_r = sets.count_r
        if count_r is None:
            count_r = torch.full((real_PT.size,), sets.order_rK.shape[1], dtype=torch.int32)
        count_r = count_r.where(torch.from_numpy(real_PT.reshape(-1)), 0)
        return Choice(np.arange(real_PT.size).reshape(real_PT.shape), sets._replace(count_r=count_r))


def joined(sets: RowSets, columns: int) -> RowSets:
    """Return the sets with each column once, where it is first; a row's weights of a column add up.

    Rows that list a column several times are those of merged experts (engine/compress/).

    Args:
        columns: how many there are.

    Example: a row 1, 0, 1 with weights 0.5, 0.3, 0.2 becomes 1, 0 with weights 0.7, 0.3.
    """
    assert sets.weigh is not None, "a gate weighs each column once"
    order_rK, used_rK = sets.order_rK.long(), sets.used_rK
    listed = order_rK.shape[1]
    place_rK = torch.arange(listed, dtype=torch.int16).expand(order_rK.shape)
    if used_rK is not None:
        place_rK = place_rK.masked_fill(~used_rK, listed)
    place_re = torch.full((len(order_rK), columns), listed, dtype=torch.int16)
    place_re = place_re.scatter_reduce_(1, order_rK, place_rK, "amin")
    count_r = (place_re < listed).sum(dim=1, dtype=torch.int32)
    order_rJ = place_re.argsort(dim=1, stable=True)[:, : int(count_r.max())]
    weight_rJ = sets.dense_weights(columns).gather(1, order_rJ)
    return RowSets(order_rJ.to(sets.order_rK.dtype), recorded_weights, weight_rJ, count_r)


def recorded_weights(sets: RowSets) -> Tensor:
    """Return the scores, which are weights already."""
    assert sets.score_rK is not None
    return sets.score_rK


def softmax_weights(sets: RowSets) -> Tensor:
    """Return the softmax of each row's scores over its set."""
    assert sets.score_rK is not None
    score_rK, used_rK = sets.score_rK, sets.used_rK
    if used_rK is None:
        return score_rK.softmax(dim=1)
    weight_rK = score_rK.masked_fill(~used_rK, -torch.inf).softmax(dim=1)
    return weight_rK.nan_to_num(0.0)  # a row without experts


def equal_weights(sets: RowSets) -> Tensor:
    """Return 1 / number of experts of each row's set."""
    rows, columns = sets.order_rK.shape
    if sets.count_r is None:
        return torch.full((rows, columns), 1.0 / columns)
    return (1.0 / sets.count_r.clamp(min=1))[:, None].expand(rows, columns).contiguous()


def unit_weights(sets: RowSets) -> Tensor:
    """Return 1 for each expert: their outputs are added up."""
    return torch.ones(sets.order_rK.shape)


WEIGH: dict[RouteWeights, Weigh | None] = {
    RouteWeights.table: softmax_weights,
    RouteWeights.uniform: equal_weights,
    RouteWeights.sum: unit_weights,
    RouteWeights.live: None,
}
"""Makers of the weights by moe.weights, for a router with fixed logits."""


def column_dtype(columns: int) -> type[np.uint8] | type[np.int16]:
    """Return the number format of columns: uint8 up to 256, int16 above."""
    return np.uint8 if columns <= 256 else np.int16
