"""The plan of n-gram tables in one step: which rows travel, where they land and where their gradients are added up.

Row r of a table lies on rank r % P, there with the local number r // P. Rows do not change inside a step, so all its
micro-batches share one plan. Each rank finds the distinct rows that its own tokens read and the hosts exchange these
lists ahead of the step. In the step itself nothing is asked for: each owner knows which rows it sends to whom, and in
which order their gradients come back.

Letters: P ranks of the run, B streams, Q segment length, C ids left of a segment, X = C + Q, H heads of a table, S rows
that this rank sends, R rows that land on it, U distinct rows of its own that any rank reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foreroute.engine.parallel.cpu_group import CpuGroup

ID_BYTES = 4  # of a row's number between the hosts


class TableKeys(Protocol):
    """The map from n-grams to the rows of one table."""

    @property
    def context(self) -> int:
        """Ids left of a segment that its n-grams reach."""

    @property
    def rows(self) -> int:
        """Rows of the table, of all heads."""

    @property
    def heads(self) -> int:
        """Rows that each token reads (H)."""

    @property
    def whole(self) -> bool:
        """Whether each rank has the whole table in its model, so that no row travels."""

    def rows_of(self, ids_BQ: Tensor, left_BC: Tensor, new_document_BX: Tensor | None = None) -> Tensor:
        """Return the rows that each id reads, int64 [B, Q, H], each below `rows`."""


class Ids(Protocol):
    """The ids of one pass, as a Batch of engine/data/streams.py has them."""

    @property
    def ids_BQ(self) -> Tensor:
        """Int64 ids."""

    @property
    def left_BC(self) -> Tensor:
        """Int64 ids left of each segment."""

    @property
    def new_document_BX(self) -> Tensor | None:
        """Whether a document begins at an id, of those left of the segment and its own."""


class RowSource(Protocol):
    """A rank's rows of one table, as a step uses them (engine/ngram_tables/)."""

    def read(self, local_S: Tensor) -> Tensor:
        """Return the values [S, W] of local rows."""

    def update(
        self, local_U: Tensor, grad_UW: Tensor, *, step: int | Tensor, lr: float, keep: Tensor | None = None
    ) -> None:
        """Change distinct local rows by their gradients."""


@dataclass(frozen=True, slots=True)
class RowsPlan:
    """The rows of one table in one step, on one rank."""

    send_S: Tensor  # int64: local numbers of the rows to send, rank by rank, ascending for each
    send_splits: tuple[int, ...]  # rows to each rank, this one included
    recv_splits: tuple[int, ...]  # rows from each rank, this one included
    touched_U: Tensor  # int64: the distinct numbers in send_S, ascending
    order_S: Tensor
    """int64: places in send_S, sorted by row and for the same row by rank: the order in which gradients are added."""
    offset_U: Tensor  # int64: where in order_S each row of touched_U begins
    ahead: RowSource | None = None  # the rows of touched_U, fetched from host memory; None: they are where they lie

    @property
    def id_bytes_P(self) -> list[int]:
        """Bytes by which this rank's host asks each rank for the table's rows: their numbers, and how many they are."""
        return [ID_BYTES * (rows + 1) for rows in self.recv_splits]


class TableRows(NamedTuple):
    """The rows of all tables that one pass reads."""

    plans: tuple[RowsPlan, ...]  # of the step that begins with this pass; empty: the rows have landed before
    landed_BQH: tuple[Tensor, ...]
    """int64: of each table, which landed row each head of each token reads; which row, of a whole table."""


NO_ROWS = TableRows((), ())


class Distinct(NamedTuple):
    """The distinct rows of a table that a rank reads, in the order in which they land."""

    local_R: NDArray[np.int64]  # their numbers on their owners; owner by owner, ascending for each
    splits: tuple[int, ...]  # rows of each owner
    place: NDArray[np.int64]  # of the rows as they were given, each one's place in local_R; of their shape


def distinct_rows(rows: NDArray[np.int64], size: int, ranks: int) -> Distinct:
    """Find the distinct rows among those that a rank reads.

    Args:
        rows: of any shape, each below `size`.
        size: rows of the whole table.
        ranks: over which they lie (P).

    Example: of 10 rows on 2 ranks a rank reads 4, 7, 4 and 1. Rank 0 sends its row 2 (4), rank 1 its rows 0 (1) and 3
    (7): local = [2, 0, 3], splits = (1, 2), place = [0, 2, 0, 1].
    """
    most = -(-size // ranks)  # of a rank
    sorted_R, place = np.unique(rows % ranks * most + rows // ranks, return_inverse=True)
    ends = np.searchsorted(sorted_R, most * np.arange(1, ranks + 1))
    splits = np.diff(ends, prepend=0)
    local_R = sorted_R - np.repeat(most * np.arange(ranks), splits)
    return Distinct(local_R, tuple(splits.tolist()), place.reshape(rows.shape))


def plan_rows(tables: Sequence[TableKeys], passes: Sequence[Ids], hosts: CpuGroup) -> list[TableRows]:
    """Plan the rows of one step for each of its passes, one micro-batch after the other; a collective of all ranks if a
    table's rows are shared out.

    Leaves: 4 bytes for each distinct row and shared table, to the host of its owner, and 4 for each table and host.

    Args:
        hosts: all ranks of the run.
    """
    if not tables:
        return [NO_ROWS] * len(passes)
    found, landed = list[Distinct](), list[Tensor]()
    for keys in tables:
        row_MBQH = _read(keys, passes)
        if keys.whole:
            landed.append(row_MBQH)
        else:
            found.append(distinct_rows(row_MBQH.numpy(), keys.rows, hosts.ranks))
            landed.append(torch.from_numpy(found[-1].place))
    plans = _planned(found, hosts.all_to_all(_requests(found, hosts.ranks))) if found else ()
    return [
        TableRows(plans if number == 0 else (), tuple(places[number] for places in landed))
        for number in range(len(passes))
    ]


def row_request(tables: Sequence[TableKeys], passes: Sequence[Ids], ranks: int, owner: int) -> NDArray[np.int32]:
    """Return what a rank that reads these passes sends to one of the ranks in plan_rows."""
    found = [distinct_rows(_read(keys, passes).numpy(), keys.rows, ranks) for keys in tables if not keys.whole]
    counts, begins = [d.splits[owner] for d in found], [sum(d.splits[:owner]) for d in found]
    return _request(
        counts, [d.local_R[begin : begin + count] for d, begin, count in zip(found, begins, counts, strict=True)]
    )


def _read(keys: TableKeys, passes: Sequence[Ids]) -> Tensor:
    """Return the rows that a rank reads in a step, int64 [M, B, Q, H] for M passes."""
    return torch.stack([keys.rows_of(ids.ids_BQ, ids.left_BC, ids.new_document_BX) for ids in passes])


def _requests(found: Sequence[Distinct], ranks: int) -> list[NDArray[np.int32]]:
    """Return the message to each owner."""
    of_tables = [np.split(d.local_R, np.cumsum(d.splits)[:-1]) for d in found]
    return [_request([d.splits[rank] for d in found], [rows[rank] for rows in of_tables]) for rank in range(ranks)]


def _request(counts: Sequence[int], rows: Sequence[NDArray[np.int64]]) -> NDArray[np.int32]:
    """Return a message to an owner: the number of each table's rows, then these."""
    return np.concatenate([np.array(counts), *rows]).astype(np.int32)


def _planned(found: Sequence[Distinct], asked: Sequence[NDArray[np.int32]]) -> tuple[RowsPlan, ...]:
    """Plan what this rank sends from the message of each rank."""
    count_Py = np.stack([message[: len(found)] for message in asked]).astype(np.int64)
    lists = [
        np.split(message[len(found) :], np.cumsum(count_y)[:-1])
        for message, count_y in zip(asked, count_Py, strict=True)
    ]
    return tuple(
        _plan(np.concatenate([of_rank[y] for of_rank in lists]), count_Py[:, y].tolist(), distinct.splits)
        for y, distinct in enumerate(found)
    )


def _plan(send_S: NDArray[np.int32], send_splits: list[int], recv_splits: tuple[int, ...]) -> RowsPlan:
    """Complete a plan by the order in which gradients are added up.

    Example: rows [2, 5] for rank 0 and [0, 2] for rank 1 touch [0, 2, 5]; order = [2, 0, 3, 1], offset = [0, 1, 3].
    """
    order_S = np.argsort(send_S, kind="stable")
    sorted_S = send_S[order_S]
    offset_U = np.flatnonzero(np.diff(sorted_S, prepend=-1))
    return RowsPlan(
        send_S=torch.from_numpy(send_S.astype(np.int64)),
        send_splits=tuple(send_splits),
        recv_splits=recv_splits,
        touched_U=torch.from_numpy(sorted_S[offset_U].astype(np.int64)),
        order_S=torch.from_numpy(order_S),
        offset_U=torch.from_numpy(offset_U),
    )


def some_rows(keys: TableKeys) -> NDArray[np.int64]:
    """Return the rows of a few n-grams of the ids 0 and 1, of which every vocabulary has some."""
    ids_BQ = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1]])
    found = keys.rows_of(ids_BQ, torch.zeros(1, keys.context, dtype=torch.int64))
    return np.append(found.numpy().reshape(-1), keys.rows)
