"""Tables of merged or pruned experts.

Merged: each entry becomes its group's number, so a row may list an expert several times. At every k the row's set is
the merged experts of its first k entries, each with the sum of its entries' weights (engine/routing/row_sets.py,
joined). A table of distinct experts could not hold this, since the weight of a group depends on k.

Pruned: the entries of dropped experts leave the row. At k it uses its first k of those that are left, so a row that
had a dropped one takes the next of its order.

Letters: r rows, E entries of a row.
"""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from foreroute.engine.compress.groups import DROPPED, Groups
from foreroute.engine.config import Builder
from foreroute.engine.routing.row_sets import column_dtype
from foreroute.engine.routing.tables import Table


def regrouped_table(table: Table, groups: Groups, columns: int) -> Table:
    """Return the table of merged or pruned experts, which has no blocks.

    Args:
        columns: experts and columns without one, before.
    """
    new_e = _new_columns(groups, columns)
    order_rE = new_e[table.order_rE.numpy().astype(np.int64)]
    keep_rE, left = order_rE != DROPPED, table.order_rE.shape[1] - int((groups.group_E == DROPPED).sum())
    shape = len(order_rE), left
    order = torch.from_numpy(order_rE[keep_rE].reshape(shape).astype(column_dtype(int(new_e.max()) + 1)))
    logits = None if table.logits_rE is None else table.logits_rE[torch.from_numpy(keep_rE)].reshape(shape)
    first = None if table.first_rE is None else table.first_rE[:, :left].contiguous()
    builder = Builder.balanced if table.builder is Builder.packed else table.builder
    return replace(table, order_rE=order, logits_rE=logits, first_rE=first, builder=builder, pack=left)


def _new_columns(groups: Groups, columns: int) -> NDArray[np.int64]:
    """Return the new number of each column; those without experts follow the experts as before."""
    experts = len(groups.group_E)
    others = len(groups.leader_G) + np.arange(columns - experts)
    return np.concatenate([groups.group_E, others])
