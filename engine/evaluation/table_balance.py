"""How evenly a text would load experts, blocks of experts and ranks, and how many rows it would put on the wire.

Counted from a table and a text alone, exactly, for every number of active experts; no model and no ranks are needed.
Expert e lives on rank e // (E / P). launch/tables.py prints it, and how many distinct n-grams a micro-batch has.

Letters: E experts, G blocks of experts, K active experts, P ranks of the expert group, r table rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.data.streams import Streams
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.ngram_rows import KeyRows
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
    table: Table,
    ids: NDArray[np.uint8],
    ranks: Sequence[int],
    documents: NDArray[np.int64] | None = None,
    *,
    experts: int | None = None,
) -> list[Balance]:
    """Return the balance of a text at each k, 1 to the table's columns; ids before its first count as 0, documents as
    for build_tables.

    Args:
        experts: the table's first so many columns; the others cost no row. None: all.

    Example: rows [0, 1, 2, 3] and [2, 3, 0, 1], each used once, 2 ranks, pack 2. At k = 1, experts 0 and 2 have one
    expert row each: experts 2.0, blocks 1.0; a token needs one rank and sends half a row. At k = 3 it needs both and
    sends one row.

    Raises:
        UserError: the experts cannot be shared out evenly over one of the numbers of ranks.
    """
    columns = table.order_rE.shape[1]
    experts = experts or columns
    per_rank = {num: len(Mesh(0, num, num).local_experts(experts)) for num in ranks}
    freq_r = row_frequency(table, ids, documents)
    used_r = np.flatnonzero(freq_r)
    order_rE, freq_r = table.order_rE.numpy()[used_r], freq_r[used_r]
    level_rE = np.broadcast_to(np.arange(columns), order_rE.shape)
    if table.first_rE is not None:
        level_rE = table.first_rE.numpy()[used_r].astype(np.int64) - 1
    load_kE = _up_to_k(level_rE, order_rE, freq_r, (columns, columns))[:, :experts]
    touched_k = {
        num: _touched(level_rE, np.minimum(order_rE // size, num), freq_r, num) for num, size in per_rank.items()
    }
    found = []
    for level, load_E in enumerate(load_kE):
        on_ranks = {}
        for num, size in per_rank.items():
            touched = float(touched_k[num][level] / freq_r.sum())
            on_ranks[num] = RankBalance(_load(load_E, size), touched, touched * (num - 1) / num)
        found.append(Balance(level + 1, _load(load_E, 1), _load(load_E, min(table.pack, experts)), on_ranks))
    return found


def _up_to_k(
    level_rX: NDArray[np.int64], thing_rX: NDArray[np.integer[Any]], freq_r: NDArray[np.float64], shape: tuple[int, int]
) -> NDArray[np.float64]:
    """Add up the rows' frequencies by thing at each k [k, things]; a row has its thing number x from level_rX on."""
    levels, things = shape
    weight_rX = np.broadcast_to(freq_r[:, None], level_rX.shape).ravel()
    load_n = np.bincount((level_rX * things + thing_rX).ravel(), weight_rX, levels * things)
    load_kX: NDArray[np.float64] = load_n.reshape(shape).cumsum(axis=0)
    return load_kX


def _touched(
    level_rE: NDArray[np.int64], rank_rE: NDArray[np.integer[Any]], freq_r: NDArray[np.float64], ranks: int
) -> NDArray[np.float64]:
    """Count the ranks that the rows touch, by their frequencies, at each k; a column on rank number `ranks` is none."""
    rows, columns = rank_rE.shape
    first_rP = np.empty((rows, ranks + 1), np.int64)
    for choice in reversed(range(columns)):
        first_rP[np.arange(rows), rank_rE[:, choice]] = level_rE[:, choice]
    first_rP = first_rP[:, :ranks]
    return _up_to_k(first_rP, np.zeros_like(first_rP), freq_r, (columns, 1))[:, 0]


def _load(load_E: NDArray[np.float64], size: int) -> float:
    """Max / mean over neighbours of `size` experts."""
    parts = load_E.reshape(-1, size).sum(axis=1)
    return float(parts.max() / parts.mean())


def unique_ngrams(
    streams: Streams, vocab_size: int, orders: Sequence[int], *, accumulation: int = 1, most: int = 1000
) -> dict[int, float]:
    """Return the distinct n-grams of a micro-batch divided by its tokens, by n: the mean over an epoch's micro-batches
    on one rank, or over `most` of them, evenly spaced.

    Args:
        streams: with a context of at least n - 1 ids.
        orders: each n.
        accumulation: micro-batches of a step.

    Example: streams 0 1 0 and 1 0 1 in one micro-batch: 2 of 6 for n = 1. For n = 2 the ids before them are 0: 0 0,
    0 1, 1 0 and 0 1, 1 0, 0 1 are 3 of 6.
    """
    steps = streams.segments_per_epoch
    batches = [
        streams.batch(step, streams.streams_of(0, number % accumulation, world=1, accumulation=accumulation))
        for number, step in enumerate(np.unique(np.linspace(0, steps - 1, min(most, steps)).astype(int)).tolist())
    ]
    keys = {n: KeyRows(n, vocab_size, rows=1, seed=0, index=0) for n in orders}
    found = {
        n: [np.unique(key.keys(batch.ids_BQ, batch.left_BC, batch.new_document_BX)).size for batch in batches]
        for n, key in keys.items()
    }
    return {n: float(np.mean(counts)) / batches[0].ids_BQ.numel() for n, counts in found.items()}
