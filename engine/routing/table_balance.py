"""How evenly a text would load experts, blocks of experts and ranks, and how many rows it would put on the wire.

Counted from a table and a text alone, exactly, for every number of active experts; no model and no ranks are needed.
Expert e lives on rank e // (E / P). launch/tables.py prints it.

Letters: E experts, G blocks of experts, K active experts, P ranks of the expert group, r table rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.tables import Table, row_frequency


@dataclass(frozen=True, slots=True)
class RankBalance:
    """A text on a number of ranks at one k."""

    load: float  # expert rows of the busiest rank to the mean
    touched: float  # ranks that hold one of a token's active experts, mean over the tokens
    wire_rows: float  # rows that leave a token's rank, per layer and direction, mean; tokens lie on all ranks alike


@dataclass(frozen=True, slots=True)
class Balance:
    """A text at one k. Loads are max / mean of expert rows: 1 is perfectly even."""

    k: int
    experts: float
    blocks: float
    ranks: dict[int, RankBalance]  # by number of ranks


def balances(
    table: Table, ids: NDArray[np.uint8], ranks: Sequence[int], documents: NDArray[np.int64] | None = None
) -> list[Balance]:
    """Return the balance of a text at k = 1 .. E; ids before its first count as 0, documents as for build_tables.

    Example: rows [0, 1, 2, 3] and [2, 3, 0, 1], each used once, 2 ranks, pack 2. At k = 1, experts 0 and 2 have one
    expert row each: experts 2.0, blocks 1.0; a token needs one rank and sends half a row. At k = 3 it needs both and
    sends one row.

    Raises:
        UserError: the experts cannot be shared out evenly over one of the numbers of ranks.
    """
    order_rE = table.order_rE.numpy()
    experts = order_rE.shape[1]
    per_rank = {num: len(Mesh(0, num, num).local_experts(experts)) for num in ranks}
    freq_r = row_frequency(table, ids, documents)
    used_r = np.flatnonzero(freq_r)
    order_rE, freq_r = order_rE[used_r], freq_r[used_r]
    load_E = np.zeros(experts)
    touched_rP = {num: np.zeros((used_r.size, num), bool) for num in ranks}
    found = []
    for choice, expert_r in enumerate(order_rE.T):
        load_E += np.bincount(expert_r, weights=freq_r, minlength=experts)
        on_ranks = {}
        for num, size in per_rank.items():
            touched_rP[num][np.arange(used_r.size), expert_r // size] = True
            touched = float(touched_rP[num].sum(axis=1) @ freq_r / freq_r.sum())
            on_ranks[num] = RankBalance(_load(load_E, size), touched, touched * (num - 1) / num)
        found.append(Balance(choice + 1, _load(load_E, 1), _load(load_E, table.pack), on_ranks))
    return found


def _load(load_E: NDArray[np.float64], size: int) -> float:
    """Max / mean over neighbours of `size` experts."""
    parts = load_E.reshape(-1, size).sum(axis=1)
    return float(parts.max() / parts.mean())
