"""The rows of n-gram tables that each step moves, counted from the ids alone, for every pair of ranks.

They are the same whatever the routers do: each rank reads the distinct rows of its own tokens of a step once, their
owners send them, and as many gradients come back (engine/routing/plans/row_plan.py).

Letters: t tables, P ranks of the run, B streams, Q segment length, H heads of a table.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.tally import Spread, Tally
from foreroute.engine.data.streams import Streams
from foreroute.engine.routing.plans.row_plan import ID_BYTES, TableKeys, distinct_rows

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TableCounts:
    """Rows of the tables in one step."""

    read_tPP: Counts  # distinct rows, by the rank that reads them, then by their owner
    touched_tP: Counts  # distinct rows of an owner that any rank reads

    @property
    def landed_tP(self) -> Counts:
        """Rows that land on a rank, its own included."""
        landed_tP: Counts = self.read_tPP.sum(axis=2)
        return landed_tP

    @property
    def sent_tP(self) -> Counts:
        """Rows that a rank sends, its own included; as many gradients come back."""
        sent_tP: Counts = self.read_tPP.sum(axis=1)
        return sent_tP

    def link_bytes_PP(self, row_bytes: int) -> Counts:
        """Count the bytes from each rank to each other: rows, gradients, and the row numbers that hosts exchange."""
        rows_PP = self.read_tPP.sum(axis=0)
        bytes_PP: Counts = (rows_PP + rows_PP.T) * row_bytes + id_bytes(self.read_tPP).sum(axis=0)
        np.fill_diagonal(bytes_PP, 0)
        return bytes_PP


def id_bytes(read_tPP: Counts) -> Counts:
    """Count the bytes by which hosts ask for rows, as RowsPlan.id_bytes_P does."""
    return ID_BYTES * (read_tPP + 1)


@dataclass(frozen=True, slots=True)
class RowCounter:
    """Counts the rows of steps.

    Args:
        streams: of the training split, laid out.
    """

    layout: Layout
    keys: Sequence[TableKeys]
    streams: Streams

    def count(self, step: int) -> TableCounts:
        """Count a step."""
        config, ranks = self.layout.config, self.layout.placement.world_size
        batch = self.streams.batch(step, range(self.streams.streams))
        read, touched = [], []
        for keys in self.keys:
            rows_BQH = keys.rows_of(batch.ids_BQ, batch.left_BC, batch.new_document_BX).numpy()
            # rank by rank, as Streams.streams_of
            rows_PN = rows_BQH.reshape(ranks, config.train.accumulation * self.layout.tokens * keys.heads)
            read.append([distinct_rows(row_N, keys.rows, ranks).splits for row_N in rows_PN])
            touched.append(distinct_rows(rows_PN, keys.rows, ranks).splits)
        return TableCounts(np.array(read), np.array(touched))

    def landed(self, step: int) -> list[float]:
        """Count for each table the distinct rows that a rank reads in a step, the mean of the ranks."""
        found: list[float] = self.count(step).landed_tP.mean(axis=1).tolist() if self.keys else []
        return found


@dataclass(frozen=True, slots=True)
class OfTable:
    """The rows of one table; spreads are over ranks and steps."""

    place: str  # the input, or a layer
    rows: int
    heads: int
    landed: Spread  # distinct rows that a rank reads in a step
    touched: Spread  # distinct rows of an owner that a step changes


def of_tables(
    layout: Layout, keys: Sequence[TableKeys], landed: Sequence[Tally], touched: Sequence[Tally]
) -> list[OfTable]:
    """Describe each table by what was collected of its rows."""
    places = ["input" if place is None else f"layer {place}" for place in layout.config.ngram_tables.places]
    return [
        OfTable(place, of_keys.rows, of_keys.heads, Tally.spread([landed]), Tally.spread([touched]))
        for place, of_keys, landed, touched in zip(places, keys, landed, touched, strict=True)
    ]


def tables_of_rank(
    layout: Layout, keys: Sequence[TableKeys], counts: TableCounts, rank: int, step: int
) -> list[OfTable]:
    """Describe each table by the rows of one rank in one step."""
    found = []
    for rows_tP in (counts.landed_tP, counts.touched_tP):
        tallies = [Tally() for _ in keys]
        for tally, rows_P in zip(tallies, rows_tP, strict=True):
            tally.add(rows_P[rank : rank + 1], step, 1)
        found.append(tallies)
    return of_tables(layout, keys, *found)


@dataclass(frozen=True, slots=True)
class TableStatistics:
    """The rows of all tables in the counted steps, and the bytes that they send; ranks and steps are places."""

    tables: list[OfTable]
    width: int  # numbers in a row
    row_bytes: int  # of a row or of its gradient between ranks
    rank: Spread  # bytes that leave a rank in a step
    link: Spread  # bytes from one rank to another in a step; 0 on one rank
    between: Spread  # bytes that leave a rank for other nodes in a step
    ids: Spread  # bytes of row numbers among those that leave a rank
    total: int  # bytes of all ranks in all counted steps


class TableTally:
    """Collects the rows of the steps."""

    def __init__(self, layout: Layout, keys: Sequence[TableKeys]) -> None:
        self._layout, self._keys = layout, keys
        self._landed, self._touched = ([Tally() for _ in keys] for _ in range(2))
        self._bytes = {name: Tally() for name in ("rank", "link", "between", "ids")}

    def add(self, counts: TableCounts, step: int, times: int) -> None:
        """Take in a step that occurs so many times."""
        for table in range(len(self._keys)):
            self._landed[table].add(counts.landed_tP[table], step, times)
            self._touched[table].add(counts.touched_tP[table], step, times)
        ranks = self._layout.placement.world_size
        bytes_PP = counts.link_bytes_PP(self._layout.table_row_bytes)
        others_PP = ~np.eye(ranks, dtype=bool)
        node_P = np.arange(ranks) // self._layout.placement.ranks_per_node
        far_PP = node_P[:, None] != node_P
        found = {
            "rank": bytes_PP.sum(axis=1),
            "link": bytes_PP[others_PP] if ranks > 1 else np.zeros(1, np.int64),
            "between": (bytes_PP * far_PP).sum(axis=1),
            "ids": (id_bytes(counts.read_tPP).sum(axis=0) * others_PP).sum(axis=1),
        }
        for name, values in found.items():
            self._bytes[name].add(values, step, times)

    def statistics(self) -> TableStatistics:
        """Describe all steps."""
        return TableStatistics(
            of_tables(self._layout, self._keys, self._landed, self._touched),
            self._layout.config.ngram_tables.width,
            self._layout.table_row_bytes,
            **{name: Tally.spread([tally]) for name, tally in self._bytes.items()},
            total=Tally.total([self._bytes["rank"]]),
        )
